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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from play_phases import Overdue, until
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

START_SECONDS = 600.0
"""Most that a server may take to open its port, and a visitor to enter, where nothing else is
said."""
END_SECONDS = 15.0
"""In which a server has to end."""
_KEPT = ("frames", "times", "action_to_frame", "memory_bytes", "latents")


@dataclass
class Server:
    """A running `decmem play`. ended: seconds it took to, None where it had to be killed."""

    process: subprocess.Popen
    port: int
    ended: float | None = None

    @property
    def resident(self) -> int | None:
        """Bytes of memory its process holds, where the system tells."""
        try:
            told = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return None
        found = re.search(r"VmRSS:\s+(\d+) kB", told)
        return int(found[1]) * 1024 if found else None

    async def memory(self, limit: float) -> dict[str, Any]:
        """What it says of its worlds, and what its process holds.

        Raises:
            Overdue: where it says nothing for `limit` seconds, or is gone.
        """
        told = await asyncio.to_thread(self._fetch, limit)
        return told | {"resident_bytes": self.resident}

    def _fetch(self, limit: float) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.port}/memory"
        try:
            with urllib.request.urlopen(url, timeout=limit) as answer:
                return json.load(answer)
        except OSError as error:
            raise Overdue(f"the server did not tell of its memory: {error}") from error


@contextlib.contextmanager
def served(flags: list[str], sessions: int, limit: float = START_SECONDS) -> Iterator[Server]:
    """The server with these flags of `decmem play`, from its open port to its end.

    Raises:
        Overdue: where its port is not open after `limit` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "decmem", "play", "--no-browser", "--port", str(port)]
    command += ["--max-sessions", str(sessions), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    server = Server(process, port)
    try:
        late = time.monotonic() + limit
        while True:
            if process.poll() is not None:
                raise Overdue(f"the server ended while it started, status {process.returncode}")
            if time.monotonic() > late:
                raise Overdue(f"the server did not open its port within {limit:.0f} s")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield server
    finally:
        asked = time.monotonic()
        process.terminate()
        try:
            process.wait(END_SECONDS)
            server.ended = round(time.monotonic() - asked, 2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class Visitor:
    """One connection with a world of its own. It turns and walks on without end, and says at once
    that it has seen a chunk.

    Attributes:
        hello: what the server said of itself. ready: seconds from the start to the first chunk.
        stage: how far its entrance came. chunks: headers since the last `forget`, each with its
            time of arrival. heard_at: that of the last. told_bytes: what its newest chunk said of
            its bank. lost: why it is no longer served, None while it is.
    """

    server: Server
    seed: int
    settings: dict[str, Any]
    hello: dict[str, Any] = field(default_factory=dict)
    ready: float = 0.0
    stage: str = "outside"
    heard_at: float = 0.0
    chunks: list[dict[str, Any]] = field(default_factory=list)
    told_bytes: int = 0
    lost: str | None = None
    _state: str = ""
    _tasks: list[asyncio.Task] = field(default_factory=list)
    _line: ClientConnection | None = None

    async def enter(self) -> None:
        """Begins a world; back when it walks. Waits without a limit of its own, as all here.

        Raises:
            Overdue: where it is lost.
        """
        url = f"ws://127.0.0.1:{self.server.port}/ws"
        self._line = await connect(url, max_size=None, open_timeout=60)
        self._tasks = [asyncio.create_task(self._listen())]
        await self._say("hello", version=1, session=None)
        if self.settings:
            await self._say("set", **self.settings)
        await self._say("start", **{"from": "seed", "seed": self.seed})
        asked = time.monotonic()
        await self._until(lambda: bool(self.told_bytes))
        self.stage = "in"
        self.ready = time.monotonic() - asked
        self._tasks.append(asyncio.create_task(self._steer()))

    async def walk(self, on: bool) -> None:
        """Goes on, or stands still; back when the server says so."""
        wanted = "running" if on else "paused"
        if self._state != wanted and self.lost is None:
            await self._say("resume" if on else "pause")
            await self._until(lambda: self._state == wanted)

    @property
    def stands(self) -> bool:
        """Whether the server said that its world stands still."""
        return self._state == "paused"

    async def leave(self) -> None:
        """Gives the world up."""
        self.vanish()
        if self._line is not None:
            with contextlib.suppress(ConnectionClosed):
                await self._say("bye")
            await self._line.close()

    def vanish(self) -> None:
        """Says and hears no more."""
        for task in self._tasks:
            task.cancel()

    def forget(self) -> None:
        """Begins to count anew."""
        self.chunks, self.heard_at = [], time.monotonic()

    async def _until(self, condition: Callable[[], bool]) -> None:
        await until(lambda: condition() or self.lost is not None)
        if self.lost is not None:
            raise Overdue(f"visitor {self.seed} was lost: {self.lost}")

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
            case "progress":
                self.stage = f"{told['stage']} {told['done']} of {told['total']}"
            case "error" | "bye":
                self.lost = str(told)
            case "chunk":
                self.told_bytes = told["memory_bytes"]
                kept = {name: told[name] for name in _KEPT}
                self.heard_at = time.monotonic()
                self.chunks.append({"at": self.heard_at, **kept})
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
