"""How soon the live page answers, how many it serves, and whether it keeps to its memory.

python benchmarks/play.py [--seconds 30] [--search 0] [-- flags of decmem play]
python benchmarks/play.py --soak --clients 8 --seconds 600 [-- flags of decmem play]

The first form times `--clients` visitors who walk at once and then, for at most `--search`
seconds, looks for the largest number of them that all see at least 9.9 frames a second. The
second has them walk for long and says whether the server holds exactly what its banks state,
whether memory returns to within 5 % of the start once they left, and whether all stayed. Visitors
run in this process and do not paint, the server in its own. Writes play_DEVICE_YYYYMM.json or
play_soak_DEVICE_YYYYMM.json.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from play_figures import HELD, growth, most_that_hold, per_session, timing, told, verdict
from play_visitors import Server, Visitor, served

from decmem.machine import code_commit, describe_machine
from decmem.storage import write_json


async def warmed(server: Server, settings: dict[str, Any]) -> dict[str, Any]:
    """One short visit, for what is compiled and loaded once is no world's memory; the idle
    server's memory after it."""
    first = Visitor(server, 0, settings)
    await first.enter()
    await asyncio.sleep(2)
    await first.leave()
    return await emptied(server)


async def emptied(server: Server) -> dict[str, Any]:
    """The server's memory once nobody is in it."""
    for _ in range(100):
        if not (await server.memory())["worlds"]:
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(3)  # freed memory is handed back after the last has left
    return await server.memory()


async def all_walk(visitors: Sequence[Visitor], seconds: float) -> dict[str, Any]:
    """These walk at once; their figures."""
    await asyncio.gather(*(visitor.walk(True) for visitor in visitors))
    await asyncio.sleep(2)
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
        crowd.extend(coming)
        await asyncio.gather(*(visitor.enter() for visitor in coming))
        await asyncio.gather(*(visitor.walk(False) for visitor in crowd[count:]))
        return await all_walk(crowd[:count], seconds)

    try:
        first = await walk(asked.clients, asked.seconds)
        memory = per_session(await server.memory(), idle)
        hello = crowd[0].hello
        found = {"idle": idle, "rows": [first | {"memory_per_session": memory}]}
        if asked.search:
            found["sessions_at_10_fps"] = await search(server, walk, asked, idle)
    finally:
        await asyncio.gather(*(visitor.leave() for visitor in crowd))
    return {"preset": hello["preset"], "weights": hello["weights"], **found}


async def search(
    server: Server,
    walk: Callable[[int, float], Awaitable[dict[str, Any]]],
    asked: argparse.Namespace,
    idle: dict[str, Any],
) -> dict[str, Any]:
    """The largest number of visitors that all keep the world's rate, and all that were tried."""
    until = time.monotonic() + asked.search
    tried: list[dict[str, Any]] = []

    async def holds(count: int) -> bool:
        row = await walk(count, asked.round)
        row["memory_per_session"] = per_session(await server.memory(), idle)
        tried.append(row)
        slowest = row["frames_per_second"]["slowest"]
        print(f"{count} visitors: the slowest sees {slowest:.2f} frames/s", file=sys.stderr)
        return slowest >= HELD

    most, complete = await most_that_hold(holds, asked.most, lambda: time.monotonic() > until)
    return {"most": most, "complete": complete, "at_least": HELD, "tried": tried}


async def soak(server: Server, asked: argparse.Namespace) -> dict[str, Any]:
    """All walk for long; memory before, while, and after."""
    idle = await warmed(server, asked.set)
    crowd = [Visitor(server, i, asked.set) for i in range(asked.clients)]
    samples: list[dict[str, Any]] = []
    peak = 0
    await asyncio.gather(*(visitor.enter() for visitor in crowd))
    print(f"{len(crowd)} visitors walk", file=sys.stderr, flush=True)
    for visitor in crowd:
        visitor.forget()
    begun = time.monotonic()

    async def sample() -> None:
        walked = round(time.monotonic() - begun, 1)
        samples.append({"seconds": walked, **await server.memory()})
        # Each as it is taken: of a run that is cut off, this is what is left.
        print(json.dumps(samples[-1]), file=sys.stderr, flush=True)

    while (walked := time.monotonic() - begun) < asked.seconds:
        if walked >= len(samples) * asked.seconds / 20:
            await sample()
        peak = max(peak, server.resident or 0)
        await asyncio.sleep(0.25)
    # How fast they walked tells what they wrote; how soon they were answered is another run's.
    counted = timing(crowd, asked.seconds)
    row = {name: counted[name] for name in ("clients", "seconds", "frames_per_second")}
    lost = [visitor.lost for visitor in crowd if visitor.lost]
    await asyncio.gather(*(visitor.walk(False) for visitor in crowd))
    await sample()
    stated = sum(visitor.told_bytes for visitor in crowd)
    await asyncio.gather(*(visitor.leave() for visitor in crowd))
    after = await emptied(server)
    return {
        "preset": crowd[0].hello["preset"],
        "weights": crowd[0].hello["weights"],
        "verdict": verdict(idle, samples, stated, after, lost),
        "dropped": lost,
        "told_bytes": stated,
        "resident_peak_bytes": peak,
        "growth_while_walking": growth(samples, idle),
        "memory": {"idle": idle, "samples": samples, "after": after},
        "rows": [row | {"memory_per_session": per_session(samples[-1], idle)}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=1, help="visitors at once")
    parser.add_argument("--seconds", type=float, default=30, help="of walking that are counted")
    parser.add_argument("--soak", action="store_true", help="watch memory instead of speed")
    parser.add_argument("--search", type=float, default=0, help="seconds for the largest number")
    parser.add_argument("--round", type=float, default=15, help="seconds a number is tried for")
    parser.add_argument("--most", type=int, default=64, help="visitors that are tried at most")
    parser.add_argument("--set", type=json.loads, default={}, help='settings, as {"chunk": 2}')
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for the JSON")
    parser.add_argument("flags", nargs="*", help="flags of decmem play, after --")
    asked = parser.parse_args()
    commit = code_commit()
    most = max(asked.clients, asked.most if asked.search else 0)
    with served(asked.flags, most) as server:
        found = asyncio.run((soak if asked.soak else speed)(server, asked))
    idle = found["memory"]["idle"] if asked.soak else found["idle"]
    device = "cpu" if idle["gpu_bytes"] is None else "cuda"
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
    if not all(found.get("verdict", {}).values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
