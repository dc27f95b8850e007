"""The training loop: built parts in, checkpoints and a log out. It knows no model and no data."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from decmem.distributed import Place
from decmem.errors import UserError
from decmem.training.average import WeightAverage
from decmem.training.checkpoint import latest_checkpoint, load_checkpoint, prune, save_checkpoint
from decmem.training.log import TrainingLog
from decmem.training.optimiser import Optimisers, rate


class Task(nn.Module):
    """What is learned. `forward(step, progress)` draws its batch from (seed, rank, step) and gives
    the loss and figures to log; `network` is what is optimised, averaged and stored."""

    network: nn.Module

    def forward(self, step: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        raise NotImplementedError


@dataclass(frozen=True)
class Budget:
    """When to stop and when to report.

    Args:
        steps: optimiser steps. seconds: of the whole run, which then sets the schedule instead
            (and makes it irreproducible: a machine's speed enters).
        warmup, decay_from: of the learning rate (see `optimiser.rate`).
        clip: largest gradient norm.
        report_every, checkpoint_every: in steps; 0 stores the end only.
        keep: checkpoints kept.
    """

    steps: int
    seconds: float | None = None
    warmup: int = 100
    decay_from: float = 0.4
    clip: float = 1.0
    report_every: int = 20
    checkpoint_every: int = 0
    keep: int = 2


class Trainer:
    """Runs a task to the end of its budget.

    Args:
        task: on `place.device`. config: plain values a checkpoint must agree with to be resumed.
        run: folder of the log and the checkpoints.
    """

    def __init__(
        self,
        task: Task,
        optimisers: Optimisers,
        average: WeightAverage,
        budget: Budget,
        place: Place,
        run: Path,
        config: dict[str, Any],
        title: str,
    ) -> None:
        self.task = task
        self.optimisers = optimisers
        self.average = average
        self.budget = budget
        self.place = place
        self.run_folder = run
        self.config = config
        self.title = title
        self.step = 0
        self.spent = 0.0

    def resume(self) -> bool:
        """Continues from the newest checkpoint of the run, if there is one."""
        found = latest_checkpoint(self.run_folder)
        if found is None:
            return False
        weights, state, loop = load_checkpoint(found, self.config)
        self.task.network.load_state_dict(weights)
        parts: dict[str, dict[str, Tensor]] = {"optimiser": {}, "average": {}}
        for name, value in state.items():
            part, key = name.split("/", 1)
            parts[part][key] = value
        self.optimisers.load_state(parts["optimiser"])
        self.average.load_state(parts["average"])
        self.step, self.spent = loop["step"], loop["spent"]
        return True

    def run(self, stop_after: float | None = None) -> bool:
        """Trains; returns whether the budget is used up.

        `stop_after` seconds in this process it stores a checkpoint and returns, to be resumed.
        """
        budget, place = self.budget, self.place
        task: nn.Module = self.task
        if place.world > 1:
            ids = [place.device.index] if place.device.type == "cuda" else None
            task = DistributedDataParallel(self.task, device_ids=ids)
        started, before = time.monotonic(), self.spent
        log = TrainingLog(self.run_folder, self.title, place.first, self.step, before)
        params = list(self.task.network.parameters())
        reported, reported_step = started, self.step
        progress = self._progress()
        done = progress >= 1.0  # so is a finished run that is resumed
        try:
            while not done:
                self.optimisers.set_rate(
                    rate(progress, self.step, budget.warmup, budget.decay_from)
                )
                loss, figures = task(self.step, progress)
                loss.backward()
                norm = nn.utils.clip_grad_norm_(params, budget.clip)
                self.optimisers.step()
                self.optimisers.zero_grad()
                self.average.update(self.task.network, self.step)
                self.step += 1

                # Between agreements the clock stands still for all: rates and the end hang on it.
                if self._timely():
                    self.spent = place.agree(before + time.monotonic() - started)
                progress = self._progress()
                done = progress >= 1.0
                pause = (
                    stop_after is not None and self._timely() and self.spent - before > stop_after
                )
                due = budget.checkpoint_every and self.step % budget.checkpoint_every == 0
                report, store = self.step % budget.report_every == 0 or done, done or pause or due
                if report or store:
                    # A checkpoint that cannot be resumed must not push out one that can.
                    self._require_finite(loss, norm)
                if report:
                    now = time.monotonic()
                    pace = (self.step - reported_step) / max(now - reported, 1e-9)
                    reported, reported_step = now, self.step
                    shown = {"loss": float(loss.detach()), "norm": float(norm), "steps_per_s": pace}
                    shown |= {k: float(v) for k, v in figures.items()}
                    log.report(self.step, progress, shown)
                if store:
                    self._store()
                if pause and not done:
                    return False
        finally:
            log.close()
        return True

    def _require_finite(self, loss: Tensor, norm: Tensor) -> None:
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise UserError(
                "training",
                f"loss {float(loss.detach())} and gradient norm {float(norm)} at step {self.step}",
                "Lower the learning rate, or resume from the last checkpoint",
            )

    def _timely(self) -> bool:
        """Steps at which processes agree on the time; agreeing costs a synchronisation."""
        return self.place.world == 1 or self.step % 10 == 0

    def _progress(self) -> float:
        if self.budget.seconds is not None:
            return min(1.0, self.spent / self.budget.seconds)
        return min(1.0, self.step / self.budget.steps)

    def _store(self) -> None:
        if self.place.first:
            state = {f"optimiser/{k}": v for k, v in self.optimisers.state().items()}
            state |= {f"average/{k}": v for k, v in self.average.state().items()}
            weights = dict(self.task.network.state_dict())
            loop = {"spent": self.spent}
            save_checkpoint(self.run_folder, self.step, weights, state, self.config, loop)
            prune(self.run_folder, self.budget.keep)
        self.place.wait()
