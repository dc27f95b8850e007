"""One episode of the demo: what was true, what the model dreamt, and how far apart they are."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, UInt8

CURVES = ("full", "without_global_memory", "codec")
"""The roll-outs a take compares with the truth, in the order they are drawn and reported."""


@dataclass(frozen=True)
class Take:
    """One world: N frames the model saw, then F frames it had to dream from actions alone.

    ``full`` is the model as it is, ``without_global_memory`` the same weights with that branch
    switched off; ``psnr`` has one value in dB per dreamt frame for every name in ``CURVES``.
    """

    seed: int
    walk: str
    fps: float
    bank: UInt8[np.ndarray, "N H W 3"]
    actions: Float32[np.ndarray, "F A"]
    truth: UInt8[np.ndarray, "F H W 3"]
    full: UInt8[np.ndarray, "F H W 3"]
    without_global_memory: UInt8[np.ndarray, "F H W 3"]
    psnr: dict[str, Float64[np.ndarray, "F"]]

    @property
    def first_frame(self) -> int:
        """Number of the first dreamt frame; frames count from 1."""
        return len(self.bank) + 1

    def seconds_since_bank(self, index: int) -> float:
        """Time from the last frame of the bank to dreamt frame ``index`` (counted from 0)."""
        return (index + 1) / self.fps
