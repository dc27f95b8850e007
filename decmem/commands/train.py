"""``decmem train``: from rendered worlds to weights."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from decmem.training.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class _Run(RunOptions):
    """The options of every run; `from` is no name that Python lets a field have."""

    init: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Weights to go on from, with a fresh optimiser, warmed up again, at a lower rate."""


@dataclass(frozen=True, kw_only=True)
class TrainCodec(_Run):
    """Train the video autoencoder on rendered walks.

    Example: decmem train codec --preset tiny --seconds 120

    Writes PRESET-codec.safetensors, its card and a sheet of truth above reconstruction.
    """

    def run(self) -> None:
        """Train, then say where the weights are."""
        from decmem.training.runs import train_codec

        _tell(train_codec(self), self)


@dataclass(frozen=True, kw_only=True)
class TrainMemory(_Run):
    """Train the world model with decoupled memory: sparse global and anchored local together.

    Example: decmem train memory --preset tiny --codec runs_out/tiny-codec/tiny-codec.safetensors

    Starts from nothing, or with --from on the causal backbone that `decmem train causal` makes.
    Writes PRESET.safetensors, its card and a sheet of truth above dream.
    """

    codec: Path | None = None
    """Codec weights; default those that come with the preset."""

    memory: Literal["decoupled", "window"] = "decoupled"
    """window: the local branch alone, the control of every comparison."""

    def run(self) -> None:
        """Train, then say where the weights are."""
        from decmem.experiment import shipped_weights
        from decmem.training.runs import train_memory

        codec = self.codec or shipped_weights(f"{self.preset}-codec")
        _tell(train_memory(self, codec, self.memory), self)


@dataclass(frozen=True, kw_only=True)
class TrainCausal(_Run):
    """Train the causal backbone with dense attention over all history: the paper's first stage.

    Example: decmem train causal --preset tiny --codec runs_out/tiny-codec/tiny-codec.safetensors
    """

    codec: Path | None = None
    """Codec weights; default those that come with the preset."""

    def run(self) -> None:
        """Train, then say where the weights are."""
        from decmem.experiment import shipped_weights
        from decmem.training.runs import train_memory

        codec = self.codec or shipped_weights(f"{self.preset}-codec")
        _tell(train_memory(self, codec, "dense"), self)


def _tell(weights: Path | None, options: RunOptions) -> None:
    if os.environ.get("RANK", "0") != "0":  # torchrun: one process speaks for all
        return
    if weights is None:
        print("paused; continue with the same command and --resume")
    else:
        print(f"weights in {weights}")
