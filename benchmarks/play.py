"""How fast and how soon the live page answers: `decmem play`, and clients that do not paint.

python benchmarks/play.py --clients 1 --seconds 30 [--out FILE.json] [-- flags of decmem play]

Clients run in this process, the server in its own. Each client walks a seed of its own, turns and
walks on, and says at once that it has seen a chunk. Memory is the server's resident set and what
it states for its banks.
"""

import argparse
import asyncio
import contextlib
import json
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from websockets.asyncio.client import connect

from decmem.machine import code_commit, describe_machine

START_SECONDS = 600


def resident(process: int) -> int | None:
    """Bytes of memory a process holds, where the system tells."""
    try:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


async def walk(url: str, seed: int, seconds: float, begun: asyncio.Barrier, settings: dict) -> dict:
    """One client: what it saw after all had begun."""
    chunks: list[dict] = []
    async with connect(url, max_size=None, open_timeout=60) as line:

        async def say(kind: str, **fields) -> None:
            await line.send(json.dumps({"type": kind, **fields}))

        async def hear() -> dict:
            raw = await asyncio.wait_for(line.recv(), START_SECONDS)
            if isinstance(raw, str):
                return json.loads(raw)
            length = int.from_bytes(raw[:4], "little")
            return json.loads(raw[4 : 4 + length])

        await say("hello", version=1, session=None)
        if settings:
            await say("set", **settings)
        await say("start", **{"from": "seed", "seed": seed})
        asked = time.monotonic()
        until, ready, sequence = None, 0.0, 0
        async with contextlib.AsyncExitStack() as stack:
            while until is None or time.monotonic() < until:
                told = await hear()
                if told["type"] in ("error", "bye"):
                    raise SystemExit(f"the server said {told}")
                if told["type"] != "chunk":
                    continue
                if until is None:
                    ready = time.monotonic() - asked
                    await begun.wait()
                    until = time.monotonic() + seconds

                    async def steer() -> None:
                        nonlocal sequence
                        while True:
                            sequence += 1
                            keys = ["forward"] if sequence % 20 else []
                            look = [1.5 if sequence // 40 % 2 else -1.5, 0]
                            await say("input", keys=keys, look=look, sequence=sequence)
                            await asyncio.sleep(0.05)

                    task = asyncio.create_task(steer())
                    stack.callback(task.cancel)
                else:
                    chunks.append({k: v for k, v in told.items() if k not in ("parts", "poses")})
                await say("seen", chunk=told["chunk"])
        await say("bye")
    return {"ready": ready, "chunks": chunks}


def summary(told: list[dict], seconds: float) -> dict:
    """Figures over all clients."""
    chunks = [c for one in told for c in one["chunks"]]
    waits = sorted(c["action_to_frame"] for c in chunks if c["action_to_frame"] is not None)
    rates = [sum(c["frames"] for c in one["chunks"]) / seconds for one in told]
    return {
        "clients": len(told),
        "seconds": seconds,
        "frames_per_second": {"slowest": min(rates), "median": statistics.median(rates)},
        "action_to_frame": {
            "median": statistics.median(waits),
            "p95": waits[int(0.95 * (len(waits) - 1))],
        },
        "seconds_per_chunk": {
            name: statistics.median(c["times"][name] for c in chunks) for name in chunks[0]["times"]
        },
        "frames_per_chunk": chunks[0]["frames"],
        "seconds_to_first_chunk": max(one["ready"] for one in told),
        "bank_bytes": sum(one["chunks"][-1]["memory_bytes"] for one in told),
    }


async def measure(url: str, process: int, clients: int, seconds: float, settings: dict) -> dict:
    """All clients at once; memory before, at the end, and after they left."""
    begun = asyncio.Barrier(clients)
    before = resident(process)
    peak = 0

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, resident(process) or 0)
            await asyncio.sleep(0.25)

    watcher = asyncio.create_task(watch())
    walks = [walk(url, i, seconds, begun, settings) for i in range(clients)]
    told = await asyncio.gather(*walks)
    watcher.cancel()
    await asyncio.sleep(3)
    memory = {"before": before, "peak": peak, "after": resident(process)}
    return summary(told, seconds) | {"resident_bytes": memory}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--set", type=json.loads, default={}, help='settings, as {"chunk": 2}')
    parser.add_argument("--out", type=Path)
    parser.add_argument("flags", nargs="*", help="flags of decmem play, after --")
    asked = parser.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "decmem", "play", "--no-browser", "--port", str(port)]
    command += ["--max-sessions", str(asked.clients), *asked.flags]
    server = subprocess.Popen(command)
    try:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and server.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        url = f"ws://127.0.0.1:{port}/ws"
        # Once before: what is compiled and loaded once is no session's memory.
        asyncio.run(measure(url, server.pid, 1, 2, asked.set))
        figures = asyncio.run(measure(url, server.pid, asked.clients, asked.seconds, asked.set))
    finally:
        server.terminate()
        server.wait(20)
    device = "cuda" if torch.cuda.is_available() and "cpu" not in asked.flags else "cpu"
    row = {
        "flags": [f for f in asked.flags if "/" not in f],
        "settings": asked.set,
        **figures,
        "machine": describe_machine(torch.device(device)),
        "commit": code_commit(),
    }
    text = json.dumps(row, indent=2)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
