"""The training benchmark: what it counts, and its command."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from decmem.bench.training import TrainBench, forward_flop
from decmem.cli import main
from decmem.memory import training_plan
from decmem.presets import PAPER, POCKET, TINY

CPU = torch.device("cpu")


def test_operations_are_those_that_pytorch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Dense attention, in plain products: those PyTorch can count.
    model = TINY.with_memory("dense").build_model()
    bench = TrainBench(TINY.with_memory("dense"), CPU, torch.float32, 2, 4, 4, repeats=1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        bench.row()
    streams = 1 + TINY.memory_training.noisy_streams
    plan = training_plan(model.config.reading.reach, 4, 4, streams - 1)
    steps = 2 + 1
    # PyTorch also counts the conditioning.
    ratio = counter.get_total_flops() / (3 * forward_flop(model, plan, 2) * steps)
    assert 0.95 < ratio < 1.3


def test_the_global_branch_costs_what_it_retrieves() -> None:
    counted = []
    for retrieved in (0, 8, 16):
        reading = dataclasses.replace(POCKET.model.reading, retrieved=retrieved)
        config = dataclasses.replace(POCKET.model, reading=reading)
        with torch.device("meta"):
            model = dataclasses.replace(POCKET, model=config).build_model()
        plan = training_plan(reading.reach, 84, 4, 1)
        counted.append(forward_flop(model, plan, 1))
    none, half, whole = counted
    assert half - none == pytest.approx(whole - half, rel=0.05)
    assert 0 < whole - none < none


def test_the_paper_counts_as_its_parameters_say() -> None:
    with torch.device("meta"):
        model = PAPER.build_model()
    plan = training_plan(PAPER.model.reading.reach, 60, 4, 1)
    tokens = 120 * 880
    parameters = sum(p.numel() for p in model.blocks.parameters())
    # The rest is attention: per token 880 of its latent, some 9 latents, and 80 blocks.
    seen = 880 + 9 * 880 + 80 * 880 / 6
    expected = 2 * tokens * parameters + 20 * 4 * 1728 * tokens * seen
    assert forward_flop(model, plan, 1) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("recompute", [False, True])
def test_command(recompute: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--clips", "1", "--latents", "8", "--chunk", "4", "--repeats", "1", "--peak", "1"]
    asked += ["--recompute", str(recompute)]
    options = ["--preset", "tiny", "--device", "cpu", *asked, "--out", str(tmp_path)]
    assert main(["bench", "train", *options]) == 0
    written = json.loads((tmp_path / "train_cpu.json").read_text())
    (row,) = written["rows"]
    assert (row["clips"], row["latents"], row["recompute"]) == (1, 8, recompute)
    assert row["flops_utilisation"] == pytest.approx(row["model_tflops"], abs=1e-3)
    assert "tokens_per_s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--clips", "0"], "--clips: got 0"),
        (["--latents", "9", "--chunk", "4"], "no whole chunks of 4"),
    ],
)
def test_bad_options(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "--preset", "tiny", "--device", "cpu", *options]) != 0
    assert said in capsys.readouterr().err
