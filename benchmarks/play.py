"""How soon the live page answers, how many it serves, and whether it keeps to its memory.

python benchmarks/play.py [--seconds 30] [--search 0] [-- flags of decmem play]
python benchmarks/play.py --soak --clients 8 --seconds 600 [-- flags of decmem play]

The first form times `--clients` visitors who walk at once and then, for at most `--search`
seconds, looks for the largest number of them that all see at least 9.9 frames a second. The
second has them walk for long and says whether the server holds exactly what its banks state,
whether memory returns to within 5 % of the start once they left, and whether all stayed; it ends
within `--seconds` and `--margin`, says so where a limit was met, and writes what it has. Visitors
run in this process and do not paint, the server in its own. Writes play_DEVICE_YYYYMM.json or
play_soak_DEVICE_YYYYMM.json.
"""

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from play_figures import HELD, most_that_hold, per_session, timing, told
from play_phases import Overdue, Phases, say
from play_soak import BEHIND, Soak, warmed
from play_visitors import START_SECONDS, Server, Visitor, served

from decmem.machine import code_commit, describe_machine
from decmem.storage import write_json

SETTLED = 2.0
"""Seconds of walking before it is counted."""
ANSWER = 60.0
"""Seconds in which a busy server tells of its memory."""


async def all_walk(visitors: Sequence[Visitor], seconds: float) -> dict[str, Any]:
    """These walk at once; their figures."""
    await asyncio.gather(*(visitor.walk(True) for visitor in visitors))
    await asyncio.sleep(SETTLED)
    for visitor in visitors:
        visitor.forget()
    await asyncio.sleep(seconds)
    return timing(visitors, seconds)


async def speed(server: Server, asked: argparse.Namespace) -> dict[str, Any]:
    """Figures of `--clients` visitors, then the largest number that all keep the world's rate."""
    idle = await warmed(server, asked.set)
    crowd: list[Visitor] = []

    async def walk(count: int, seconds: float) -> dict[str, Any]:
        coming = [Visitor(server, i, asked.set) for i in range(len(crowd), count)]
        # Who is there already stands still: their chunks would hold up who comes.
        paused = crowd[:] if coming else crowd[count:]
        async with asyncio.timeout(START_SECONDS):
            await asyncio.gather(*(visitor.walk(False) for visitor in paused))
            crowd.extend(coming)
            await asyncio.gather(*(visitor.enter() for visitor in coming))
            return await all_walk(crowd[:count], seconds)

    try:
        first = await walk(asked.clients, asked.seconds)
        memory = per_session(await server.memory(ANSWER), idle)
        hello = crowd[0].hello
        found = {"idle": idle, "rows": [first | {"memory_per_session": memory}]}
        if asked.search:
            found["sessions_at_10_fps"] = await search(server, walk, asked, idle, first)
    finally:
        await asyncio.gather(*(visitor.leave() for visitor in crowd))
    return {"preset": hello["preset"], "weights": hello["weights"], **found}


async def search(
    server: Server,
    walk: Callable[[int, float], Awaitable[dict[str, Any]]],
    asked: argparse.Namespace,
    idle: dict[str, Any],
    first: dict[str, Any],
) -> dict[str, Any]:
    """The largest number of visitors that all keep the world's rate, and all that were tried
    after the `first`, who are not asked again."""
    until = time.monotonic() + asked.search
    tried: list[dict[str, Any]] = []

    async def holds(count: int) -> bool:
        begun = time.monotonic()
        row = await walk(count, asked.round)
        row["memory_per_session"] = per_session(await server.memory(ANSWER), idle)
        tried.append(row)
        slowest, spent = row["frames_per_second"]["slowest"], time.monotonic() - begun
        say(f"{count} visitors: the slowest sees {slowest:.2f} frames/s, after {spent:.0f} s")
        return slowest >= HELD

    def over() -> bool:
        return time.monotonic() + SETTLED + asked.round > until

    known = asked.clients, first["frames_per_second"]["slowest"] >= HELD
    most, complete = await most_that_hold(holds, asked.most, over, known)
    return {"most": most, "complete": complete, "at_least": HELD, "tried": tried}


async def soak(server: Server, phases: Phases, asked: argparse.Namespace) -> dict[str, Any]:
    """All walk for long; memory before, while, and after."""
    task = asyncio.current_task()
    assert task is not None
    # Whoever ends it gets what was measured so far.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    coming = max(asked.margin - BEHIND - phases.elapsed, 1.0)
    return await Soak(server, phases, asked.clients, asked.seconds, coming, asked.set).run()


def measured(asked: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, from a server of its own. Raises `Overdue` where that does not start."""
    phases = Phases()
    most = max(asked.clients, asked.most if asked.search else 0)
    limit = max(asked.margin - BEHIND, 1.0) if asked.soak else START_SECONDS
    with served(asked.flags, most, limit) as server:
        phases.took["server up"] = round(phases.elapsed, 2)
        say(f"[{phases.elapsed:6.1f} s] the server's port is open")
        found = asyncio.run(soak(server, phases, asked) if asked.soak else speed(server, asked))
    if asked.soak:
        found["phases"] = phases.took | {"server's end": server.ended}
        found["verdict"]["server_ends"] = server.ended is not None
        say(f"[{phases.elapsed:6.1f} s] the server is gone")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=1, help="visitors at once")
    parser.add_argument("--seconds", type=float, default=30, help="of walking that are counted")
    parser.add_argument("--soak", action="store_true", help="watch memory instead of speed")
    parser.add_argument(
        "--margin", type=float, default=240,
        help=f"seconds that a soak may take beyond --seconds; {BEHIND:.0f} are kept for its end",
    )  # fmt: skip
    parser.add_argument("--search", type=float, default=0, help="seconds for the largest number")
    parser.add_argument("--round", type=float, default=15, help="seconds a number is tried for")
    parser.add_argument("--most", type=int, default=64, help="visitors that are tried at most")
    parser.add_argument("--set", type=json.loads, default={}, help='settings, as {"chunk": 2}')
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for the JSON")
    parser.add_argument("flags", nargs="*", help="flags of decmem play, after --")
    asked = parser.parse_args()
    commit = code_commit()
    # Ended from outside, it takes its server along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    try:
        found = measured(asked)
    except (Overdue, TimeoutError) as error:
        raise SystemExit(f"nothing was measured: {error or 'a visitor waited too long'}") from error
    idle = found["memory"]["idle"] if asked.soak else found["idle"]
    device = "cuda" if (idle and idle["gpu_bytes"] is not None) else "cpu"
    theme = "play_soak" if asked.soak else "play"
    path = asked.out / f"{theme}_{device}_{time.strftime('%Y%m')}.json"
    write_json(
        path,
        {
            "schema_version": 1,
            "theme": theme,
            "commit": commit,
            "machine": describe_machine(torch.device(device)),
            "flags": [flag for flag in asked.flags if "/" not in flag],
            "settings": asked.set,
            **found,
        },
    )
    print(told(found))
    print(f"{path} holds every figure and the machine.")
    broken = [name for name, good in found.get("verdict", {}).items() if not good]
    if broken:
        why = found["overdue"] or ", ".join(broken).replace("_", " ")
        raise SystemExit(f"the soak failed: {why}")


if __name__ == "__main__":
    main()
