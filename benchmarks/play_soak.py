"""Visitors who walk for long: whether the server holds what it states, and gives it back."""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

from play_figures import growth, per_session, timing, verdict
from play_phases import Overdue, Phases, say
from play_visitors import END_SECONDS, Server, Visitor

STILL, LEAVE, SETTLE = 30.0, 20.0, 25.0
"""Seconds in which all have to stand still, to have left, and memory to have come to rest."""
SILENCE = 30.0
"""Seconds without a chunk, or an answer about memory, that end a soak: the server stalls."""
BEHIND = SILENCE + STILL + LEAVE + SETTLE + END_SECONDS
"""The most that a run takes beyond the walking and what comes before."""
_ANSWER = 20.0
"""Seconds in which a server that nobody walks in tells of its memory."""
_CALM = 3.0
"""Freed memory is handed back after the last has left."""


class Soak:
    """One soak, as far as it came.

    Args:
        clients: visitors. seconds: of walking. coming: seconds that the first visit and all
            entrances may take together. settings: of every visitor.
    """

    def __init__(
        self, server: Server, phases: Phases, clients: int, seconds: float, coming: float,
        settings: dict[str, Any],
    ) -> None:  # fmt: skip
        self.server = server
        self.phases = phases
        self.seconds = seconds
        self.coming = coming
        self.settings = settings
        self.crowd = [Visitor(server, i, settings) for i in range(clients)]
        self.hello: dict[str, Any] = {}
        self.idle: dict[str, Any] | None = None
        self.samples: list[dict[str, Any]] = []
        self.after: dict[str, Any] | None = None
        self.peak = 0
        self.told_bytes: int | None = None
        self.row: dict[str, Any] | None = None
        self.lost: list[str] = []
        self.overdue: str | None = None

    async def run(self) -> dict[str, Any]:
        """Its figures; those that there are where a limit was met, or who started it ended it."""
        try:
            until = time.monotonic() + self.coming
            async with self.phases.phase("first visits", self.coming):
                self.idle = await warmed(self.server, self.settings, len(self.crowd))
            left = max(until - time.monotonic(), 1.0)
            async with self.phases.phase("entering", left, lambda: outside(self.crowd)):
                await asyncio.gather(*(visitor.enter() for visitor in self.crowd))
            self.hello = self.crowd[0].hello
            async with self.phases.phase("walking", self.seconds + SILENCE, self._silent):
                await self._walk()
            async with self.phases.phase("standing still", STILL, lambda: moving(self.crowd)):
                await asyncio.gather(*(visitor.walk(False) for visitor in self.crowd))
                await self._sample()
            self.told_bytes = sum(visitor.told_bytes for visitor in self.crowd)
            async with self.phases.phase("leaving", LEAVE):
                await asyncio.gather(*(visitor.leave() for visitor in self.crowd))
            async with self.phases.phase("settling", SETTLE):
                self.after = await emptied(self.server)
        except Overdue as error:
            self.overdue = str(error)
        except asyncio.CancelledError:
            self.overdue = "it was ended from outside"
        if self.overdue is not None:
            say(f"the soak broke off: {self.overdue}")
            for visitor in self.crowd:
                visitor.vanish()
        return self.found()

    async def _walk(self) -> None:
        for visitor in self.crowd:
            visitor.forget()
        begun = time.monotonic()
        while (walked := time.monotonic() - begun) < self.seconds:
            if walked >= len(self.samples) * self.seconds / 20:
                try:
                    async with asyncio.timeout(SILENCE):
                        await self._sample(walked)
                except TimeoutError:
                    told = f"its worker answered nothing for {SILENCE:.0f} s"
                    raise Overdue(f"the server stalls: {told}") from None
            self.peak = max(self.peak, self.server.resident or 0)
            self.lost = [visitor.lost for visitor in self.crowd if visitor.lost]
            if len(self.lost) < len(self.crowd) and (silent := self._silent()):
                raise Overdue(f"the server stalls: {silent}")
            if len(self.lost) == len(self.crowd):
                raise Overdue(f"all visitors were lost: {self.lost[0]}")
            await asyncio.sleep(0.25)
        # How fast they walked tells what they wrote; how soon they were answered is another run's.
        counted = timing(self.crowd, self.seconds)
        self.row = {name: counted[name] for name in ("clients", "seconds", "frames_per_second")}

    def _silent(self) -> str:
        """Who had no chunk for long, empty where all had."""
        now = time.monotonic()
        silent = [v.seed for v in self.crowd if v.lost is None and now - v.heard_at > SILENCE]
        return (silent and f"no chunk for {SILENCE:.0f} s for visitors {silent}") or ""

    async def _sample(self, walked: float | None = None) -> None:
        walked = self.seconds if walked is None else walked
        self.samples.append({"seconds": round(walked, 1), **await self.server.memory(SILENCE)})
        say(json.dumps(self.samples[-1]))

    def found(self) -> dict[str, Any]:
        """All that was measured so far."""
        idle, samples, after = self.idle, self.samples, self.after
        judged = {}
        if idle and after and self.told_bytes is not None:
            judged = verdict(idle, samples, self.told_bytes, after, self.lost)
        walked = idle is not None and bool(samples) and samples[-1]["worlds"] > 0
        each = {"memory_per_session": per_session(samples[-1], idle)} if walked and idle else {}
        return {
            "preset": self.hello.get("preset"),
            "weights": self.hello.get("weights"),
            "verdict": judged | {"nothing_is_overdue": self.overdue is None},
            "overdue": self.overdue,
            "dropped": self.lost,
            "told_bytes": self.told_bytes,
            "resident_peak_bytes": self.peak,
            "growth_while_walking": growth(samples, idle) if walked and idle else None,
            "memory": {"idle": idle, "samples": samples, "after": after},
            "rows": [self.row | each] if self.row and each else [],
        }


async def warmed(server: Server, settings: dict[str, Any], clients: int = 1) -> dict[str, Any]:
    """A short visit of one, then of so many at once, for what is compiled, loaded and recorded once
    is no world's memory; the idle server's memory after it. Waits without a limit of its own."""
    for count in sorted({1, clients}):
        crowd = [Visitor(server, i, settings) for i in range(count)]
        await asyncio.gather(*(visitor.enter() for visitor in crowd))
        await asyncio.gather(*(visitor.walk(True) for visitor in crowd))
        await asyncio.sleep(2 if count == 1 else 5)
        await asyncio.gather(*(visitor.leave() for visitor in crowd))
    return await emptied(server)


async def emptied(server: Server) -> dict[str, Any]:
    """The server's memory once nobody is in it. Waits without a limit of its own."""
    while (await server.memory(_ANSWER))["worlds"]:
        await asyncio.sleep(0.1)
    await asyncio.sleep(_CALM)
    return await server.memory(_ANSWER)


def outside(crowd: Sequence[Visitor]) -> str:
    """Who has not entered, and how far each came."""
    stages = {visitor.seed: visitor.stage for visitor in crowd if not visitor.told_bytes}
    return f"{len(stages)} of {len(crowd)} are not in, by how far they came: {stages}"


def moving(crowd: Sequence[Visitor]) -> str:
    """Who was not told that it stands still."""
    walking = [v.seed for v in crowd if not v.stands and v.lost is None]
    return f"visitors {walking} walk on" if walking else "the server does not tell of its memory"
