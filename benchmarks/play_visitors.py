"""The live page's server as a process of its own, and visitors who walk but do not paint."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

START_SECONDS = 600
_KEPT = ("frames", "times", "action_to_frame", "memory_bytes", "latents")


@dataclass
class Server:
    """A running `decmem play`."""

    process: subprocess.Popen
    port: int

    @property
    def resident(self) -> int | None:
        """Bytes of memory its process holds, where the system tells."""
        try:
            told = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return None
        found = re.search(r"VmRSS:\s+(\d+) kB", told)
        return int(found[1]) * 1024 if found else None

    async def memory(self) -> dict[str, Any]:
        """What it says of its worlds, and what its process holds."""
        told = await asyncio.to_thread(self._fetch)
        return told | {"resident_bytes": self.resident}

    def _fetch(self) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.port}/memory"
        with urllib.request.urlopen(url, timeout=START_SECONDS) as answer:
            return json.load(answer)


@contextlib.contextmanager
def served(flags: list[str], sessions: int) -> Iterator[Server]:
    """The server with these flags of `decmem play`, from its open port to its end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "decmem", "play", "--no-browser", "--port", str(port)]
    command += ["--max-sessions", str(sessions), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the server did not start")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield Server(process, port)
    finally:
        process.terminate()
        process.wait(20)


@dataclass
class Visitor:
    """One connection with a world of its own. It turns and walks on without end, and says at once
    that it has seen a chunk.

    Attributes:
        hello: what the server said of itself. ready: seconds from the start to the first chunk.
        chunks: headers since the last `forget`, each with its time of arrival. told_bytes: what
            its newest chunk said of its bank. lost: why it is no longer served, None while it is.
    """

    server: Server
    seed: int
    settings: dict[str, Any]
    hello: dict[str, Any] = field(default_factory=dict)
    ready: float = 0.0
    chunks: list[dict[str, Any]] = field(default_factory=list)
    told_bytes: int = 0
    lost: str | None = None
    _state: str = ""
    _tasks: list[asyncio.Task] = field(default_factory=list)
    _line: ClientConnection | None = None

    async def enter(self) -> None:
        """Begins a world; back when it walks."""
        url = f"ws://127.0.0.1:{self.server.port}/ws"
        self._line = await connect(url, max_size=None, open_timeout=60)
        self._tasks = [asyncio.create_task(self._listen())]
        await self._say("hello", version=1, session=None)
        if self.settings:
            await self._say("set", **self.settings)
        await self._say("start", **{"from": "seed", "seed": self.seed})
        asked = time.monotonic()
        await self._until(lambda: bool(self.told_bytes))
        self.ready = time.monotonic() - asked
        self._tasks.append(asyncio.create_task(self._steer()))

    async def walk(self, on: bool) -> None:
        """Goes on, or stands still; back when the server says so."""
        wanted = "running" if on else "paused"
        if self._state != wanted and self.lost is None:
            await self._say("resume" if on else "pause")
            await self._until(lambda: self._state == wanted)

    async def leave(self) -> None:
        """Gives the world up."""
        for task in self._tasks:
            task.cancel()
        if self._line is not None:
            with contextlib.suppress(ConnectionClosed):
                await self._say("bye")
            await self._line.close()

    def forget(self) -> None:
        """Begins to count anew."""
        self.chunks = []

    async def _until(self, condition) -> None:
        until = time.monotonic() + START_SECONDS
        while not condition():
            if self.lost is not None or time.monotonic() > until:
                raise SystemExit(f"visitor {self.seed} was lost: {self.lost or 'no answer'}")
            await asyncio.sleep(0.02)

    async def _say(self, kind: str, **fields: Any) -> None:
        assert self._line is not None
        await self._line.send(json.dumps({"type": kind, **fields}))

    async def _listen(self) -> None:
        assert self._line is not None
        try:
            async for raw in self._line:
                await self._hear(raw)
            self.lost = self.lost or "the connection ended"
        except ConnectionClosed as error:
            self.lost = self.lost or f"the connection broke: {error}"

    async def _hear(self, raw: str | bytes) -> None:
        if isinstance(raw, str):
            told = json.loads(raw)
        else:
            told = json.loads(raw[4 : 4 + int.from_bytes(raw[:4], "little")])
        match told["type"]:
            case "hello":
                self.hello = told
            case "status":
                self._state = told["state"]
                if told["state"] == "stopped":
                    self.lost = told["reason"]
            case "error" | "bye":
                self.lost = str(told)
            case "chunk":
                self.told_bytes = told["memory_bytes"]
                kept = {name: told[name] for name in _KEPT}
                self.chunks.append({"at": time.monotonic(), **kept})
                await self._say("seen", chunk=told["chunk"])

    async def _steer(self) -> None:
        sequence = 0
        with contextlib.suppress(ConnectionClosed):
            while True:
                await asyncio.sleep(0.05)
                sequence += 1
                keys = ["forward"] if sequence % 20 else []
                look = [1.5 if sequence // 40 % 2 else -1.5, 0]
                await self._say("input", keys=keys, look=look, sequence=sequence)
