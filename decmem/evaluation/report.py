"""From episodes to tables: means with intervals, paired differences, results.json, table.md."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from decmem.evaluation.protocol import Protocol, group_of, groups_of
from decmem.evaluation.scoring import METRIC_DEFINITIONS, METRICS, ROWS, EpisodeScore

Cells = Mapping[tuple[str, str, str, str], Mapping[str, Any]]
"""Rows of the results by memory, walk, window and metric."""

SCHEMA_VERSION = 1
DIFFERENCE = "psnr_per_frame_minus_decoupled"
RESAMPLES = 10_000

CONVENTIONS: dict[str, Any] = {
    "metrics": METRIC_DEFINITIONS,
    "reference": "raw render (psnr_vs_codec: the render after the codec)",
    "frames": "uint8, before video coding; counted from 1, windows inclusive",
    "psnr_cap_db": 60,
    "ci95": f"2.5 and 97.5 percent of {RESAMPLES} bootstrap means over episodes, fixed seed; null "
    "below two episodes",
    "poses": "those of the truth are given for generated frames",
    "free_seen": "windows of free walks with at least 80 % of their pixels seen in the bank",
    "free_novel": "windows of free walks with at most 20 % of their pixels seen in the bank",
    "still": "a free walk that stands still from the end of the bank on, for 30 s",
    "shuffled_memory": "the history of the next world of the batch, the own local window kept",
}


def bootstrap_interval(values: Sequence[float]) -> list[float] | None:
    """95 % percentile interval of the mean, resampling episodes; None below two values."""
    if len(values) < 2:
        return None
    draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    means = np.asarray(values)[draws].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return [round(float(low), 4), round(float(high), 4)]


def _row(
    memory: str, walk: str, window: str, metric: str, values: Sequence[float]
) -> dict[str, Any]:
    return {
        "memory": memory,
        "walk": walk,
        "window": window,
        "metric": metric,
        "value": round(float(np.mean(values)), 6) if len(values) else None,
        "ci95": bootstrap_interval(values),
        "n": len(values),
    }


def _scores(
    episodes: Sequence[EpisodeScore], walk: str, group: str, window: str
) -> Iterator[dict[str, dict[str, float | None]]]:
    """The scores of one window in every episode that counts in ``group``."""
    for episode in episodes:
        if episode.walk == walk and group_of(walk, episode.seen[window]) == group:
            yield episode.windows[window]


def tabulate(protocol: Protocol, episodes: Sequence[EpisodeScore]) -> list[dict[str, Any]]:
    """The ``rows`` of results.json: one per memory, walk, window and metric, all of them always
    there; what was not measured has value None and n 0."""
    rows = []
    for walk in protocol.walks:
        for group in groups_of(walk):
            for window in (window.name for window in protocol.windows_of(walk)):
                scores = list(_scores(episodes, walk, group, window))
                for memory, metric in _cells():
                    values = [_value(score, memory, metric) for score in scores]
                    known = [value for value in values if value is not None]
                    rows.append(_row(memory, group, window, metric, known))
    return rows


def _cells() -> Iterator[tuple[str, str]]:
    yield "truth", "gradient_energy"
    for memory in ROWS:
        yield from ((memory, metric) for metric in METRICS)
        if memory != "decoupled":
            yield memory, DIFFERENCE


def _value(
    score: Mapping[str, Mapping[str, float | None]], memory: str, metric: str
) -> float | None:
    if metric != DIFFERENCE:
        return score.get(memory, {}).get(metric)
    ours = score.get("decoupled", {}).get("psnr_per_frame")
    theirs = score.get(memory, {}).get("psnr_per_frame")
    return None if ours is None or theirs is None else theirs - ours


def mean_curves(episodes: Sequence[EpisodeScore], walk: str) -> dict[str, Float64[np.ndarray, "F"]]:
    """Mean PSNR per dreamt frame of every row over the episodes of a walk; NaN where nothing was
    drawn, rows that were never drawn left out."""
    curves = {}
    for memory in ROWS:
        drawn = [e.psnr[memory] for e in episodes if e.walk == walk and memory in e.psnr]
        if drawn:
            values = np.array(drawn, dtype=np.float64)  # None becomes NaN
            known = np.isfinite(values)
            total = np.where(known, values, 0).sum(axis=0)
            counts = known.sum(axis=0)
            curves[memory] = np.where(counts > 0, total / np.maximum(counts, 1), np.nan)
    return curves


def curves_json(protocol: Protocol, episodes: Sequence[EpisodeScore]) -> dict[str, Any]:
    """Per-frame PSNR: means per walk and row, and every episode's own values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "first_frame": protocol.bank + 1,
        "mean": {walk: _listed(mean_curves(episodes, walk)) for walk in protocol.walks},
        "episodes": [{"seed": e.seed, "walk": e.walk, "psnr": e.psnr} for e in episodes],
    }


def _listed(curves: Mapping[str, np.ndarray]) -> dict[str, list[float | None]]:
    return {
        name: [round(value, 4) if np.isfinite(value) else None for value in curve.tolist()]
        for name, curve in curves.items()
    }


def markdown(results: Mapping[str, Any]) -> str:
    """table.md: for every walk, rows by windows, with the paired difference to the model."""
    cells = {
        (row["memory"], row["walk"], row["window"], row["metric"]): row for row in results["rows"]
    }
    walks = list(dict.fromkeys(row["walk"] for row in results["rows"]))
    lines = [
        "# Evaluation",
        "",
        f"Preset {results['preset']}, {results['steps']} steps, {results['episodes']} held-out "
        f"worlds per walk, {results['world_version']}, commit {results['commit']}, weights "
        f"{str(results['weights_sha256'])[:12]}. {results['bank_frames']} frames of ground truth "
        "in the bank; windows count frames from 1.",
        "",
        "PSNR per frame in dB against the raw render, mean over episodes [95 % interval], and the "
        "paired difference to decoupled. A dash was not measured.",
    ]
    for walk in walks:
        measured = (row["window"] for row in results["rows"] if row["walk"] == walk)
        windows = list(dict.fromkeys(measured))
        lines += ["", f"## {walk}", "", *_psnr_table(cells, walk, windows)]
        lines += ["", "SSIM / sharpness (gradient energy over the truth's)", ""]
        lines += _detail_table(cells, walk, windows)
    return "\n".join(lines) + "\n"


def _psnr_table(cells: Cells, walk: str, windows: Sequence[str]) -> Iterator[str]:
    yield _line(["memory", *(text for window in windows for text in (window, "vs decoupled"))])
    yield _line(["---"] * (1 + 2 * len(windows)))
    for memory in ROWS:
        values = []
        for window in windows:
            values.append(_interval(cells[memory, walk, window, "psnr_per_frame"]))
            difference = cells.get((memory, walk, window, DIFFERENCE))
            values.append(_interval(difference, "+") if difference else "")
        yield _line([memory, *values])
    counts, energies = [], []
    for window in windows:
        truth = cells["truth", walk, window, "gradient_energy"]
        counts += [str(truth["n"]), ""]
        energies += [_number(truth, 5), ""]
    yield _line(["episodes", *counts])
    yield _line(["truth's gradient energy", *energies])


def _detail_table(cells: Cells, walk: str, windows: Sequence[str]) -> Iterator[str]:
    yield _line(["memory", *windows])
    yield _line(["---"] * (1 + len(windows)))
    for memory in ROWS:
        pairs = []
        for window in windows:
            ssim, sharp = (cells[memory, walk, window, name] for name in ("ssim", "sharpness"))
            pairs.append(f"{_number(ssim, 3)} / {_number(sharp, 3)}")
        yield _line([memory, *pairs])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(row: Mapping[str, Any], digits: int) -> str:
    return "-" if row["value"] is None else f"{row['value']:.{digits}f}"


def _interval(row: Mapping[str, Any], sign: str = "") -> str:
    if row["value"] is None:
        return "-"
    ci = row["ci95"]
    text = f"{row['value']:{sign}.2f}"
    return text if ci is None else f"{text} [{ci[0]:{sign}.2f}, {ci[1]:{sign}.2f}]"
