"""One episode's figures: every row against the truth, in every window."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from decmem.evaluation import quality
from decmem.evaluation.protocol import Window

ROWS = (
    "decoupled",
    "window",
    "without_global_memory",
    "shuffled_memory",
    "nearest_pose",
    "oracle_warp",
    "copy_last",
    "codec",
)
"""The rows of every table: the model, its controls, and the yardsticks that need no model."""

METRICS = (
    "psnr_per_frame",
    "psnr_pooled",
    "psnr_legacy_worldmem",
    "psnr_vs_codec",
    "ssim",
    "sharpness",
)

METRIC_DEFINITIONS = {
    "psnr_per_frame": "mean over the window's frames of 10 log10(1 / MSE of the frame), in dB, "
    "images in [0, 1], each frame capped at 60 dB",
    "psnr_pooled": "10 log10(1 / MSE over all frames of the window), in dB, capped at 60 dB",
    "psnr_legacy_worldmem": "psnr_pooled with a data range of 2 on [0, 1] images (+6.02 dB): "
    "WorldMem's figures before December 2025",
    "psnr_vs_codec": "psnr_per_frame against the truth after the codec instead of the raw render",
    "ssim": "11x11 Gaussian window of sigma 1.5 where it fits whole, data range 1, per RGB "
    "channel, mean over channels, positions and frames",
    "sharpness": "gradient energy over that of the truth, energies averaged over the window first",
    "gradient_energy": "mean squared difference of horizontal plus vertical neighbours, over "
    "pixels and channels of [0, 1] images; stands in the row named truth",
    "psnr_per_frame_minus_decoupled": "paired difference, over the episodes both rows have",
}

Frames = UInt8[np.ndarray, "_ H W 3"]
"""Any number of frames, all of one size."""


@dataclass(frozen=True)
class EpisodeScore:
    """What is kept of one episode.

    ``seen``: per window the share of pixels that the bank shows. ``psnr``: per row one value a
    dreamt frame, None where the row was not drawn. ``windows``: window -> row -> metric -> value;
    the row ``truth`` holds its gradient energy.
    """

    seed: int
    walk: str
    seen: dict[str, float]
    psnr: dict[str, list[float | None]]
    windows: dict[str, dict[str, dict[str, float | None]]]

    def to_plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def window_scores(prediction: Frames, truth: Frames, coded: Frames) -> dict[str, float | None]:
    """All of ``METRICS`` on the frames of one window; ``coded`` is the truth after the codec."""
    return {
        "psnr_per_frame": _rounded(quality.psnr_per_frame(prediction, truth).mean()),
        "psnr_pooled": _rounded(quality.psnr_pooled(prediction, truth)),
        "psnr_legacy_worldmem": _rounded(quality.psnr_legacy_worldmem(prediction, truth)),
        "psnr_vs_codec": _rounded(quality.psnr_per_frame(prediction, coded).mean()),
        "ssim": _rounded(quality.ssim_per_frame(prediction, truth).mean()),
        "sharpness": _rounded(quality.sharpness(prediction, truth)),
    }


def score_episode(
    seed: int,
    walk: str,
    truth: Frames,
    rows: Mapping[str, Mapping[int, Frames]],
    seen: Mapping[str, float],
    windows: Sequence[Window],
    bank: int,
) -> EpisodeScore:
    """Figures of one episode.

    Args:
        truth: the frames after the bank.
        rows: row -> pieces of it, each by the index of its first frame in ``truth``. A row drawn
            throughout is one piece at 0; every window must lie within one piece.
        seen: per window the share of pixels that the bank shows.
    """
    psnr: dict[str, list[float | None]] = {}
    for name, pieces in rows.items():
        curve: list[float | None] = [None] * len(truth)
        for start, frames in pieces.items():
            values = quality.psnr_per_frame(frames, truth[start : start + len(frames)])
            curve[start : start + len(frames)] = [_rounded(value) for value in values]
        psnr[name] = curve
    scores: dict[str, dict[str, dict[str, float | None]]] = {}
    for window in windows:
        part = window.of_dream(bank)
        coded = _piece(rows["codec"], part)
        energy = _rounded(quality.gradient_energy(truth[part]).mean(), 8)
        scores[window.name] = {"truth": {"gradient_energy": energy}}
        for name, pieces in rows.items():
            scores[window.name][name] = window_scores(_piece(pieces, part), truth[part], coded)
    return EpisodeScore(seed, walk, dict(seen), psnr, scores)


def _piece(pieces: Mapping[int, Frames], part: slice) -> Frames:
    for start, frames in pieces.items():
        if start <= part.start and part.stop <= start + len(frames):
            return frames[part.start - start : part.stop - start]
    raise ValueError(f"no piece of the row covers frames {part.start} to {part.stop}")


def _rounded(value: float | np.floating | None, digits: int = 4) -> float | None:
    return None if value is None else round(float(value), digits)
