"""A run that was stopped and resumed is, bit for bit, the run that never stopped."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from decmem.errors import UserError
from decmem.training.checkpoint import latest_checkpoint
from decmem.training.trainer import Budget, Trainer

Made = Callable[..., Trainer]
BUDGET = Budget(steps=4, warmup=3, report_every=1, checkpoint_every=2)


def figures(run: Path) -> list[dict[str, float]]:
    """The log without what a clock says."""
    lines = (run / "log.jsonl").read_text().splitlines()
    clock = {"seconds", "steps_per_s"}
    return [{k: v for k, v in json.loads(x).items() if k not in clock} for x in lines]


def stored(run: Path) -> dict[str, bytes]:
    """Weights, average and optimiser state of the newest checkpoint."""
    newest = latest_checkpoint(run)
    assert newest is not None
    assert newest.name == "step_00000004"
    return {name: (newest / f"{name}.safetensors").read_bytes() for name in ("model", "state")}


@pytest.mark.parametrize("kind", ["codec", "memory", "dreaming memory"])
def test_pausing_after_every_step_changes_nothing(kind: str, trainer: Made, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert trainer(kind, whole, BUDGET).run()
    for step in range(1, 4):
        part = trainer(kind, parts, BUDGET)
        assert part.resume() == (step > 1)
        assert not part.run(stop_after=0.0)
        assert part.step == step
    last = trainer(kind, parts, BUDGET)
    assert last.resume()
    assert last.run(stop_after=1e9)
    assert stored(parts) == stored(whole)
    assert figures(parts) == figures(whole)
    assert [line["step"] for line in figures(whole)] == [1, 2, 3, 4]


def test_a_finished_run_resumes_to_its_end(trainer: Made, tmp_path: Path) -> None:
    assert trainer("line", tmp_path, BUDGET).run()
    before = stored(tmp_path), figures(tmp_path)
    again = trainer("line", tmp_path, BUDGET)
    assert again.resume()
    assert again.run()
    assert again.task.seen == []
    assert (stored(tmp_path), figures(tmp_path)) == before


def test_an_older_checkpoint_leads_to_the_same_end(trainer: Made, tmp_path: Path) -> None:
    assert trainer("line", tmp_path, BUDGET).run()
    before = stored(tmp_path), figures(tmp_path)
    # The process was killed while it wrote the newest one, and in the middle of a line.
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    newest.rename(tmp_path / ".step_00000004.123.part")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    again = trainer("line", tmp_path, BUDGET)
    assert again.resume()
    assert again.step == 2
    assert again.run()
    assert (stored(tmp_path), figures(tmp_path)) == before
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["log.jsonl", "step_00000002", "step_00000004"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state.safetensors").write_bytes(b"half"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "state.json").write_text(""),
        lambda folder: (folder / "config.json").write_text("{"),
    ],
    ids=["cut", "missing", "empty", "config"],
)
def test_a_damaged_checkpoint_is_one_clear_error(
    damage: Callable[[Path], object], trainer: Made, tmp_path: Path
) -> None:
    assert trainer("line", tmp_path, BUDGET).run()
    before = stored(tmp_path)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    damage(newest)
    with pytest.raises(UserError, match=r"resume: .*step_00000004 cannot be read") as told:
        trainer("line", tmp_path, BUDGET).resume()
    assert "Remove it" in told.value.cure
    # The cure works.
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    again = trainer("line", tmp_path, BUDGET)
    assert again.resume()
    assert again.run()
    assert stored(tmp_path) == before


def test_a_checkpoint_of_another_configuration_is_refused(trainer: Made, tmp_path: Path) -> None:
    written = {"stage": "line", "training": {"batch": 4, "sizes": [1, 2], "lr": 0.1}, "seed": 0}
    assert trainer("line", tmp_path, BUDGET, written).run()
    assert trainer("line", tmp_path, BUDGET, written | {"new": 1}).resume(), "a later version's"
    for changed, named in (
        (written | {"seed": 1}, "(seed differ)"),
        (written | {"training": written["training"] | {"batch": 5, "lr": 0.2}},
         "(training.batch, training.lr differ)"),
        ({"stage": "line"}, "(seed, training differ)"),
    ):  # fmt: skip
        other = trainer("line", tmp_path, BUDGET, changed)
        bias = other.task.network.bias.clone()
        with pytest.raises(UserError, match="another configuration") as told:
            other.resume()
        assert named in told.value.problem
        assert other.task.network.bias.equal(bias)
        assert other.step == 0
