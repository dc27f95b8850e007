"""PSNR against time, for the demo and for the evaluation."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from decmem.evaluation.lettering import COLOURS, INK, MUTED, PAPER, RULE, Colour
from decmem.evaluation.take import CURVES, Take
from decmem.storage import atomic_file

LABELS = {
    "full": "dream",
    "without_global_memory": "global memory off",
    "codec": "codec alone (ceiling)",
    "decoupled": "decoupled",
    "window": "window model",
    "shuffled_memory": "another world's memory",
    "nearest_pose": "copy nearest pose",
    "oracle_warp": "warp by true depth",
    "copy_last": "copy last frame",
}

_ROW_COLOURS: dict[str, Colour] = {
    **COLOURS,
    "decoupled": COLOURS["full"],
    "window": (204, 121, 167),
    "shuffled_memory": (230, 159, 0),
    "nearest_pose": (0, 158, 115),
    "oracle_warp": (86, 180, 233),
    "copy_last": (150, 110, 70),
}


def draw_demo_curves(takes: Sequence[Take], path: Path) -> None:
    """``psnr.png``: mean PSNR of every dreamt frame over the takes, each take thin behind it."""
    figure = _figure(1)
    axes = _axes(figure, 1, 0, "How close each frame stays to the truth")
    numbers = takes[0].first_frame + np.arange(len(takes[0].truth))
    for name in reversed(CURVES):
        curves = np.stack([take.psnr[name] for take in takes])
        colour = _ink(name)
        if len(takes) > 1:
            axes.plot(numbers, curves.T, color=colour, alpha=0.25, linewidth=1)
        axes.plot(numbers, curves.mean(axis=0), color=colour, linewidth=2.2)
    ends = {name: _tail(np.mean([take.psnr[name] for take in takes], axis=0)) for name in CURVES}
    _label_ends(axes, float(numbers[-1]), ends)
    _seconds_axis(axes, takes[0].first_frame, takes[0].fps)
    worlds = f"{len(takes)} held-out world{'s' if len(takes) > 1 else ''}"
    axes.set_xlabel(f"frame ({len(takes[0].bank)} frames seen before; {worlds})", color=MUTED_HEX)
    _save(figure, path)


def draw_row_curves(
    walks: Mapping[str, Mapping[str, Float64[np.ndarray, "F"]]],
    first_frame: int,
    fps: float,
    titles: Mapping[str, str],
    path: Path,
) -> None:
    """``curves.png``: a panel a walk, one line a row of the evaluation, mean PSNR per frame.

    Frames that were not measured are NaN and left out, so rows measured in windows only show as
    short pieces.
    """
    figure = _figure(len(walks))
    for number, (walk, rows) in enumerate(walks.items()):
        axes = _axes(figure, len(walks), number, titles[walk])
        ends = {}
        for name, curve in rows.items():
            numbers = first_frame + np.arange(len(curve))
            width = 2.6 if name == "decoupled" else 1.6
            axes.plot(numbers, curve, color=_ink(name), linewidth=width)
            known = np.flatnonzero(np.isfinite(curve))
            if len(known):
                ends[name] = _tail(curve[: known[-1] + 1])
        longest = max(len(curve) for curve in rows.values())
        _label_ends(axes, float(first_frame + longest - 1), ends)
        _seconds_axis(axes, first_frame, fps)
        axes.set_xlabel("frame", color=MUTED_HEX)
    _save(figure, path)


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


MUTED_HEX, RULE_HEX, INK_HEX, PAPER_HEX = _hex(MUTED), _hex(RULE), _hex(INK), _hex(PAPER)


def _ink(name: str) -> str:
    return _hex(_ROW_COLOURS.get(name, MUTED))


def _tail(curve: np.ndarray) -> float:
    """Where a curve ends, without the jitter of its last frames."""
    return float(np.nanmean(curve[-8:]))


def _figure(panels: int) -> Figure:
    figure = Figure(figsize=(10, 5 * panels), dpi=150, facecolor=PAPER_HEX, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, panels: int, number: int, title: str) -> Axes:
    axes = figure.add_subplot(panels, 1, number + 1, facecolor=PAPER_HEX)
    axes.set_title(title, loc="left", color=INK_HEX, fontsize=14, pad=12)
    axes.set_ylabel("PSNR (dB)", color=MUTED_HEX)
    axes.grid(axis="y", color=RULE_HEX, linewidth=0.8)
    axes.tick_params(colors=MUTED_HEX, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _label_ends(axes: Axes, last: float, ends: Mapping[str, float]) -> None:
    """Name every line at its right end, names pushed apart where lines end close together."""
    axes.set_xlim(right=last)
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)
    place = -np.inf
    for name, value in sorted(ends.items(), key=lambda item: item[1]):
        place = max(value, place + gap)
        axes.annotate(
            LABELS.get(name, name),
            (last, place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=_ink(name),
            fontsize=10,
            annotation_clip=False,
        )


def _seconds_axis(axes: Axes, first_frame: int, fps: float) -> None:
    def to_seconds(frame: ArrayLike) -> np.ndarray:
        return (np.asarray(frame) - first_frame + 1) / fps

    def to_frame(seconds: ArrayLike) -> np.ndarray:
        return np.asarray(seconds) * fps + first_frame - 1

    upper = axes.secondary_xaxis("top", functions=(to_seconds, to_frame))
    upper.set_xlabel("seconds since the memory ended", color=MUTED_HEX)
    upper.tick_params(colors=MUTED_HEX, length=0)
    upper.spines["top"].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with atomic_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
