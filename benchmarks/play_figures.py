"""The figures of the live page: from what visitors and the server told to what is quoted."""

import math
import statistics
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from play_phases import Overdue

HELD = 9.9
"""Frames a second that count as the world's own 10."""
RETURNED = 0.05
"""Share of the start that memory may differ by once everybody has left."""


def rate(arrivals: Sequence[tuple[float, int]], seconds: float) -> float:
    """Frames a second of one visitor, from the time and the frames of every chunk it got within
    so many seconds; who gets nothing for longer than a chunk's time is slower for it."""
    if len(arrivals) < 2:
        return 0.0
    frames = sum(count for _, count in arrivals[1:])
    between = frames / (arrivals[-1][0] - arrivals[0][0])
    return min(between, (frames + 2 * arrivals[0][1]) / seconds)


def timing(visitors: Sequence[Any], seconds: float) -> dict[str, Any]:
    """Figures over the last so many seconds of all visitors."""
    chunks = [chunk for visitor in visitors for chunk in visitor.chunks]
    if not chunks:
        raise Overdue("no chunk came")
    waits = sorted(c["action_to_frame"] for c in chunks if c["action_to_frame"] is not None)
    rates = [rate([(c["at"], c["frames"]) for c in v.chunks], seconds) for v in visitors]
    return {
        "clients": len(visitors),
        "seconds": seconds,
        "frames_per_second": {"slowest": min(rates), "median": statistics.median(rates)},
        "action_to_frame": {
            "median": statistics.median(waits) if waits else None,
            "p95": waits[math.ceil(0.95 * len(waits)) - 1] if waits else None,
            "count": len(waits),
        },
        "seconds_per_chunk": {
            name: statistics.median(c["times"][name] for c in chunks) for name in chunks[0]["times"]
        },
        "frames_per_chunk": chunks[0]["frames"],
        "seconds_to_first_chunk": max(visitor.ready for visitor in visitors),
    }


def per_session(memory: dict[str, Any], idle: dict[str, Any]) -> dict[str, Any]:
    """What one world takes, from what all take beyond the idle server."""
    worlds = memory["worlds"]
    grown = {
        name: None if memory[name] is None else round((memory[name] - idle[name]) / worlds)
        for name in ("resident_bytes", "gpu_bytes", "gpu_reserved_bytes")
    }
    held = {name: round(memory[name] / worlds) for name in ("latents", "arena_bytes", "past_bytes")}
    return {"worlds": worlds} | held | grown


async def most_that_hold(
    holds: Callable[[int], Awaitable[bool]], most: int, over: Callable[[], bool],
    known: tuple[int, bool] = (0, True),
) -> tuple[int, bool]:  # fmt: skip
    """The largest number up to `most` that holds, by doubling, then by halving what is between;
    and whether it was found before time was `over`. `known`: a number that was tried already, and
    whether it holds."""
    count, held = known
    low, high = (min(count, most), most + 1) if held else (0, min(count, most + 1))
    asked = max(1, min(2 * low, most)) if held else max(1, high // 2)
    while high - low > 1:
        if over():
            return low, False
        if await holds(asked):
            low = asked
        else:
            high = asked
        asked = min(2 * low, most) if high > most else (low + high) // 2
    return low, True


def verdict(
    idle: dict[str, Any], samples: Sequence[dict[str, Any]], told: int, after: dict[str, Any],
    lost: Sequence[str],
) -> dict[str, bool]:  # fmt: skip
    """Whether the server kept its word. What worlds share, they have to give back as well.

    Args:
        idle: its memory before anybody came, samples: while they walked, the last of them while
            all stood still, and told: what the newest chunks said of the banks then. after: once
            they had left. lost: why any was dropped.
    """
    returned = (
        abs(after[name] - idle[name]) <= RETURNED * idle[name]
        for name in ("resident_bytes", "gpu_bytes")
        if idle[name] is not None
    )
    stated = (sample["stated_bytes"] == sample["arena_bytes"] for sample in samples)
    return {
        "held_is_exactly_stated": all(stated) and samples[-1]["stated_bytes"] == told,
        "nothing_stays_of_closed_worlds": not any(
            after[name] for name in ("worlds", "arena_bytes", "stable_bytes")
        ),
        "memory_returns_within_5_percent": all(returned),
        "nobody_is_dropped": not lost,
    }


def growth(samples: Sequence[dict[str, Any]], idle: dict[str, Any]) -> dict[str, Any]:
    """What grew from the first sample to the last, and what of it no world accounts for. A CPU's
    memory is taken when it is written to, a GPU's when it is reserved."""
    first, last = samples[0], samples[-1]
    gpu = last["gpu_bytes"] is not None
    figures = {
        name: None if last[name] is None else last[name] - first[name]
        for name in ("arena_bytes", "written_bytes", "past_bytes", "resident_bytes", "gpu_bytes")
    }
    if figures["resident_bytes"] is not None:
        known = 0 if gpu else figures["written_bytes"] + figures["past_bytes"]
        figures["resident_beyond_worlds"] = figures["resident_bytes"] - known
    if gpu:
        held = sum(last[name] for name in ("arena_bytes", "vacant_bytes", "past_bytes"))
        figures["gpu_beyond_worlds_since_idle"] = last["gpu_bytes"] - idle["gpu_bytes"] - held
    return figures


def told(found: dict[str, Any]) -> str:
    """The figures that are quoted, as a table."""
    lines = []
    for row in found["rows"][:1]:  # a soak that broke off may have none
        lines += _told_row(row)
    if "sessions_at_10_fps" in found:
        sessions = found["sessions_at_10_fps"]
        unsure = "" if sessions["complete"] else " or more, time was over"
        lines.append(("sessions at 10 frames/s each", f"{sessions['most']}{unsure}"))
    if "verdict" in found:
        lines += _told_soak(found)
    return "\n".join(["| figure | value |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in lines)])


def _told_row(row: dict[str, Any]) -> list[tuple[str, str]]:
    rates, memory = row["frames_per_second"], row["memory_per_session"]
    lines = [
        ("visitors", f"{row['clients']}"),
        ("frames/s, slowest and median", f"{rates['slowest']:.2f}, {rates['median']:.2f}"),
    ]
    if "action_to_frame" in row:
        waits, pieces = row["action_to_frame"], row["seconds_per_chunk"].items()
        if waits["count"]:
            shown = f"{waits['median']:.3f} s, {waits['p95']:.3f} s"
            lines.append(("action to frame, median and p95", shown))
        shown = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in pieces)
        lines.append(("a chunk's pieces", shown))
    bank = f"{memory['arena_bytes'] / 2**20:.1f} MiB, {memory['latents']} latents"
    lines.append(("bank a session", bank))
    for name, what in (("resident_bytes", "process"), ("gpu_bytes", "GPU")):
        if memory[name] is not None:
            lines.append((f"{what} memory a session", f"{memory[name] / 2**20:.1f} MiB"))
    return lines


def _told_soak(found: dict[str, Any]) -> list[tuple[str, str]]:
    lines = []
    idle, after = found["memory"]["idle"], found["memory"]["after"]
    for name, what, peak in (
        ("resident_bytes", "process before, at its peak, after", [found["resident_peak_bytes"]]),
        ("gpu_bytes", "GPU before and after", []),
    ):
        told = [idle and idle[name], *peak, after and after[name]]
        if None not in told:
            lines.append((what, ", ".join(f"{x / 2**20:.0f} MiB" for x in told)))
    for name, seconds in found.get("phases", {}).items():
        lines.append((name, "killed" if seconds is None else f"{seconds:.1f} s"))
    lines += [
        (name.replace("_", " "), "yes" if good else "NO") for name, good in found["verdict"].items()
    ]
    return lines
