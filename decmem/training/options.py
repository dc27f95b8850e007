"""Options every training run has; imports nothing heavy, the command line shows them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run a training, whatever is trained."""

    preset: str = "pocket"
    """Which experiment: tiny (a CPU, minutes), pocket (one GPU, minutes), paper."""

    out: Path | None = None
    """Folder of the run: log, checkpoints, sample sheet, weights. Default runs_out/PRESET-STAGE."""

    device: str = "auto"
    """auto, cpu or cuda. Several GPUs: torchrun --nproc-per-node N -m decmem train ..."""

    seed: int = 0
    """Of initial weights and of every batch."""

    steps: int | None = None
    """Optimiser steps; default the preset's."""

    seconds: float | None = None
    """Train this long instead of a number of steps; the learning rate follows the clock."""

    resume: bool = False
    """Continue the run in --out from its newest checkpoint; bit for bit as if never stopped."""

    pause_after: float | None = None
    """Seconds after which to store a checkpoint and leave, to be resumed."""

    checkpoint_every: int = 1000
    """Steps between checkpoints."""

    init: Path | None = None
    """Weights to go on from, with a fresh optimiser, warmed up again, at a lower rate."""

    rate: float | None = None
    """Factor on all learning rates; default 1, and 0.3 with --from."""

    batch: int | None = None
    """Clips a step and process; default the preset's."""

    walks: int | None = None
    """Walks rendered and trained on, per process; default the preset's."""

    int8: bool = False
    """Store matrices as int8 rows: half the size, 0.02 dB less (docs/results.md)."""

    deterministic: bool = False
    """On a GPU too, the same bits every time (slower)."""

    @property
    def rate_factor(self) -> float:
        """`rate`, or its default: full rates would first undo what given weights have learned."""
        if self.rate is not None:
            return self.rate
        return 1.0 if self.init is None else 0.3
