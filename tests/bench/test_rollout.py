"""The roll-out benchmark: what it times, and the form of its rows."""

import json
from pathlib import Path

import pytest
import torch

from decmem.bench.history import random_bank, wandering
from decmem.cli import main
from decmem.model import WorldModel
from decmem.presets import TINY


@pytest.fixture(scope="module")
def model() -> WorldModel:
    return TINY.build_model().eval().requires_grad_(False)


def test_a_random_bank_is_a_bank(model: WorldModel) -> None:
    bank = random_bank(model, 37, torch.float32)
    assert bank.length == 37
    assert bank.time.tolist() == list(range(37))
    for layer in bank.layers:
        keys, values = layer.keys[:, :, :37], layer.values[:, :, :37]
        assert keys.std() == pytest.approx(1, abs=0.05)
        assert values.std() == pytest.approx(1, abs=0.05)
        blocks = keys.unflatten(3, (model.layout.M, -1)).mean(4).flatten(2, 3)
        torch.testing.assert_close(layer.pooled[:, :, : 37 * model.layout.M], blocks)


def test_the_way_through_it_is_rigid_and_slow(model: WorldModel) -> None:
    way = wandering(model, 3, 5)
    rotation = way.world_to_camera[..., :3, :3]
    torch.testing.assert_close(
        rotation @ rotation.mT, torch.eye(3, dtype=torch.float64).expand_as(rotation)
    )
    centres = -(rotation.mT @ way.world_to_camera[..., :3, 3:])[..., 0].view(-1, 3)
    assert centres.diff(dim=0).norm(dim=-1).max() < 0.5
    later = wandering(model, 4, 4)
    torch.testing.assert_close(way.world_to_camera[:, 1:], later.world_to_camera)


def test_command_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "tiny", "--device", "cpu", "--steps", "2", "--repeats", "1", "--codec"]
    options += ["--history", "5", "9"]
    assert main(["bench", "rollout", *options, "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "rollout_cpu.json").read_text())
    assert [(r["memory"], r["history"]) for r in written["rows"]] == [
        ("decoupled", 5), ("decoupled", 9), ("dense", 5), ("dense", 9),
    ]  # fmt: skip
    row = written["rows"][0]
    heads = TINY.model.heads
    S, M, D = 24, 6, TINY.model.position.head_dim
    assert row["bytes_per_latent"] == TINY.model.layers * heads * (2 * S + M) * D * 4
    assert row["fps"] == pytest.approx(16 / row["ms_per_chunk"] * 1000, rel=1e-3)
    assert (row["covers"], row["steps"], row["dtype"]) == ("dit+codec", 2, "float32")
    assert "| decoupled | 5 |" in capsys.readouterr().out


@pytest.mark.parametrize("bad", ["--history 0", "--repeats 0", "--preset none", "--chunk 0"])
def test_bad_requests_exit_with_2(bad: str, tmp_path: Path) -> None:
    assert main(["bench", "rollout", *bad.split(), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
