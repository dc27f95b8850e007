"""The roll-out benchmark: what it times, and the form of its rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from decmem.bench import rollout as rollout_module
from decmem.bench.history import random_bank, wandering
from decmem.bench.lists import RandomLists, WatchedLists
from decmem.cli import main
from decmem.errors import UserError
from decmem.memory import Bank
from decmem.memory.quantised import FP8
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
    assert row["gemm_dtype"] == "float32"
    assert set(row) == FORM
    assert [s["blocks"] for s in written["seen"][:2]] == [5 * 6, 9 * 6]
    assert "| decoupled | 5 |" in capsys.readouterr().out


FORM = {
    *("preset", "memory", "steps", "guidance", "history", "device", "gpu_count", "dtype"),
    *("parallel", "gemm_dtype", "bank_dtype", "retrieval", "lists", "ms_per_chunk", "fps"),
    *("bytes_per_latent", "covers"),
}


def test_rows_say_how_chunks_were_computed(tmp_path: Path) -> None:
    options = ["--preset", "tiny", "--device", "cpu", "--steps", "2", "--repeats", "1"]
    options += ["--history", "9", "--memory", "decoupled", "--guidance", "2", "--graphs", "eager"]
    options += ["--bank-dtype", "fp8", "--retrieve-until", "1", "--share-lists", "--random-lists"]
    options += ["--gemm", "fp8"]
    assert main(["bench", "rollout", *options, "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "rollout_cpu.json").read_text())
    found, drawn = written["rows"]
    assert (found["retrieval"], found["lists"], found["guidance"]) == ("reused", "shared", 2)
    assert (drawn["retrieval"], drawn["lists"]) == ("random", "own")
    assert found["bank_dtype"] == drawn["bank_dtype"] == "float8_e4m3fn"
    assert found["gemm_dtype"] == drawn["gemm_dtype"] == "float8_e4m3fn"
    assert found["bytes_per_latent"] == TINY.build_model().bytes_per_latent(FP8)
    for seen in written["seen"]:
        assert seen["engine"] == "eager"
        assert seen["listed_blocks"] == 4 * 6 * TINY.model.reading.retrieved
        assert 4 <= seen["distinct_blocks"]["fewest"] <= seen["distinct_blocks"]["most"] <= 9 * 6
    # Drawn uniformly, 24 lists of 4 out of 54 leave hardly a block out.
    assert written["seen"][1]["distinct_blocks"]["fewest"] > 0.75 * 9 * 6


def test_what_does_not_fit_says_so_and_spoils_no_other_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(model: WorldModel, latents: int, *rest: Any) -> Bank:
        if latents > 6:
            raise UserError("history", "no room", "Ask for less")
        return random_bank(model, latents, *rest)

    monkeypatch.setattr(rollout_module, "random_bank", short)
    options = ["--preset", "tiny", "--device", "cpu", "--steps", "1", "--repeats", "1"]
    options += ["--memory", "decoupled", "--out", str(tmp_path)]
    assert main(["bench", "rollout", *options, "--history", "5", "9"]) == 0
    written = json.loads((tmp_path / "rollout_cpu.json").read_text())
    assert [row["history"] for row in written["rows"]] == [5]
    assert "no room" in written["seen"][1]["failure"]
    assert "| decoupled | 9 | " in capsys.readouterr().out
    assert main(["bench", "rollout", *options, "--history", "9"]) == 2


def test_random_lists_are_lists(model: WorldModel) -> None:
    lists = RandomLists(blocks=50, calls=4, count=7)
    asked = []

    def retrieve() -> torch.Tensor:
        asked.append(1)
        return torch.zeros(1, 2, 12, 9, dtype=torch.int32)

    passes = [[lists(retrieve) for _ in range(4)] for _ in range(2)]
    assert len(asked) == 8
    for one in lists.lists:
        assert one.shape == (1, 2, 12, 7)
        assert (one.diff(dim=-1) > 0).all()
        assert (one >= 0).all()
        assert (one < 50).all()
    assert all(a is b for a, b in zip(*passes, strict=True))
    assert not torch.equal(passes[0][0], passes[0][1])


def test_watched_lists_count_what_a_head_fetches() -> None:
    watched = WatchedLists()
    lists = torch.tensor([[[[1, 2, 3], [2, 3, -1]], [[0, 1, 2], [3, 4, 5]]]])
    assert watched(lambda: lists) is lists
    assert (watched.distinct, watched.listed) == ([4.5], [5.5])


@pytest.mark.parametrize("bad", ["--history 0", "--repeats 0", "--preset none", "--chunk 0"])
def test_bad_requests_exit_with_2(bad: str, tmp_path: Path) -> None:
    assert main(["bench", "rollout", *bad.split(), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
