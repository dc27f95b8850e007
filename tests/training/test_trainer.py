"""The loop on the cheapest task there is: what it does at which step."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from decmem.distributed import Place
from decmem.errors import UserError
from decmem.training import checkpoint
from decmem.training.checkpoint import latest_checkpoint, prune
from decmem.training.log import TrainingLog
from decmem.training.optimiser import rate
from decmem.training.trainer import Budget, Trainer

Made = Callable[..., Trainer]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in run.glob("step_*"))


def test_steps_progress_and_rates(
    trainer: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer("line", tmp_path, Budget(steps=5, warmup=2, decay_from=0.4))
    rates: list[float] = []
    monkeypatch.setattr(made.optimisers, "set_rate", rates.append)
    assert made.run()
    assert made.task.seen == [(0, 0.0), (1, 0.2), (2, 0.4), (3, 0.6), (4, 0.8)]
    assert rates == [rate(progress, step, 2, 0.4) for step, progress in made.task.seen]
    assert made.step == 5


def test_it_learns(trainer: Made, tmp_path: Path) -> None:
    made = trainer("line", tmp_path, Budget(steps=500, warmup=1, report_every=100))
    made.optimisers.peaks = [0.1]
    assert made.run()
    assert made.task.network.weight.item() == pytest.approx(3, abs=0.02)
    assert made.task.network.bias.item() == pytest.approx(-1, abs=0.02)
    average = made.average.state()
    assert float(average["weight"]) == pytest.approx(3, abs=0.02)


def test_gradients_are_clipped_and_not_carried_over(trainer: Made, tmp_path: Path) -> None:
    made = trainer("line", tmp_path, Budget(steps=3, clip=1e-3, report_every=1))
    seen = []
    step = made.optimisers.step

    def spied() -> None:
        grads = [p.grad for p in made.task.network.parameters()]
        seen.append(float(torch.cat([g.flatten() for g in grads]).norm()))
        step()

    made.optimisers.step = spied
    assert made.run()
    assert seen == pytest.approx([1e-3] * 3, rel=1e-3)
    assert all(p.grad is None for p in made.task.network.parameters())
    norms = [json.loads(x)["norm"] for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert min(norms) > 1, "the log tells the norm before clipping"


def test_what_is_reported_and_what_is_kept(trainer: Made, tmp_path: Path) -> None:
    budget = Budget(steps=11, report_every=4, checkpoint_every=3, keep=2)
    assert trainer("line", tmp_path, budget).run()
    lines = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 11]
    assert list(lines[0]) == ["step", "seconds", "loss", "norm", "steps_per_s", "bias"]
    assert checkpoints(tmp_path) == [9, 11]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert json.loads((newest / "state.json").read_text())["step"] == 11
    alone = tmp_path / "alone"
    assert trainer("line", alone, Budget(steps=3, checkpoint_every=0)).run()
    assert checkpoints(alone) == [3]


def test_a_budget_of_seconds_ends(trainer: Made, tmp_path: Path) -> None:
    made = trainer("line", tmp_path, Budget(steps=10**9, seconds=0.02))
    assert made.run()
    progress = [p for _, p in made.task.seen]
    assert progress == sorted(progress)
    assert progress[0] == 0.0
    assert progress[-1] < 1.0
    assert made.spent >= 0.02
    again = trainer("line", tmp_path, Budget(steps=10**9, seconds=0.02))
    assert again.resume()
    assert again.spent == made.spent
    assert again.run()
    assert again.task.seen == []


@pytest.mark.parametrize(("lost", "told"), [(3, 4), (4, 6)])
def test_what_is_not_finite_is_never_stored(
    lost: int, told: int, trainer: Made, tmp_path: Path
) -> None:
    made = trainer("line", tmp_path, Budget(steps=9, report_every=100, checkpoint_every=2))
    made.task.factor = {lost: float("nan")}
    with pytest.raises(UserError, match=f"nan .*at step {told}"):
        made.run()
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == f"step_{told - 2:08d}"
    again = trainer("line", tmp_path, Budget(steps=9, report_every=100, checkpoint_every=2))
    assert again.resume()
    assert torch.isfinite(again.task.network.weight).all()


def test_a_full_disk_leaves_the_older_checkpoint(
    trainer: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(steps=4, checkpoint_every=2, report_every=1)
    made = trainer("line", tmp_path, budget)
    save, saved = checkpoint.save_file, []

    def full(tensors: dict, path: Path) -> None:
        saved.append(path)
        if len(saved) == 4:  # the state of the second checkpoint
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        made.run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "step_00000002"]
    again = trainer("line", tmp_path, budget)
    assert again.resume()
    assert again.step == 2


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    for name in ("step_00000003", "step_00000012", "step_00000007", "step_by_step", "step_000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    (tmp_path / "step_00000099").mkdir()  # somebody copied half of it
    (tmp_path / ".step_00000013.77.part").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000012"
    assert latest_checkpoint(tmp_path / "nowhere") is None
    prune(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "step_00000007", "step_00000012", "step_00000099", "step_000001", "step_by_step"
    }  # fmt: skip
    prune(tmp_path, 5)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000012"


def test_log_is_json_whatever_the_figures(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "run", "x", active=True, spent=100.0)
    log.report(1, 0.5, {"loss": float("nan"), "psnr": 1 / 3})
    log.close()
    (line,) = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    entry = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert entry["loss"] is None
    assert entry["psnr"] == 0.333333
    assert 100.0 <= entry["seconds"] < 110.0, "the run's time, not this process's"


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "run", "x", active=False)
    log.report(1, 0.5, {"loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert [Place(rank, 2, torch.device("cpu")).first for rank in (0, 1)] == [True, False]


def test_a_pipe_gets_a_line_now_and_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    log = TrainingLog(tmp_path, "x", active=True)
    for step in (1, 2):
        log.report(step, step / 2, {"loss": 0.25})
    log.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [" 50.0% step 1 loss 0.25 (0 s)"]
