"""A visitor and its world: requests in the order they came, and chunk after chunk between them.

A guest outlives its line: when that is lost the world waits for another.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from decmem.errors import UserError
from decmem.play.branches import Branches
from decmem.play.chunk_message import Parts, shown
from decmem.play.defaults import FRAMES_PER_LATENT
from decmem.play.journey import Journey, Progress
from decmem.play.jpeg import thumbnail
from decmem.play.line import Line
from decmem.play.opening import beginning
from decmem.play.parcels import Parcels
from decmem.play.protocol import VERSION
from decmem.play.settings import Settings
from decmem.play.steering import Steering
from decmem.play.studio import Stopped, Studio
from decmem.play.takeaway import film, pack_world
from decmem.world.version import FPS

_log = logging.getLogger(__name__)
_MOST_REQUESTS = 32
_RATE_SPAN = 3.0
"""Seconds that frames per second are counted over."""
_BEHIND = "the page is behind"


class Guest:
    """One session of docs/play.md."""

    def __init__(self, studio: Studio, parcels: Parcels) -> None:
        self.studio = studio
        self.parcels = parcels
        self.token = secrets.token_urlsafe(24)
        self.line: Line | None = None
        self.left_at = time.monotonic()
        self.journey: Journey | None = None
        self.branches = Branches(studio.bounds.branches)
        self.settings = Settings.of(studio)
        self.steering = Steering()
        self.chunks = 0
        self.seen = 0
        self.paused = False
        self.failed = ""
        self._requests: deque[dict[str, Any]] = deque()
        self._wake = asyncio.Event()
        self._status = ("", "")
        self._next_start = 0.0
        self._steered_at = time.monotonic()
        self._heard_at: float | None = None
        self._sent: deque[tuple[float, int]] = deque()
        self._task = asyncio.create_task(self._live())

    @property
    def begun(self) -> bool:
        """Whether there is a world."""
        return self.journey is not None and self.journey.session.length > 0

    async def attach(self, line: Line) -> None:
        """Takes up the world on this line; an older line is closed."""
        old, self.line = self.line, line
        if old is not None:
            await old.close()
        self.seen = self.chunks
        await line.tell(
            "hello",
            version=VERSION,
            session=self.token,
            settings=self.settings.told(),
            truth=self.journey is not None and self.journey.truth is not None,
            **self.studio.introduction(),
        )
        self._status = ("", "")
        if self.begun:
            self._requests.append({"type": "again"})
        elif self.studio.opening is not None and not self._requests and self.journey is None:
            self._requests.append({"type": "start"} | self.studio.opening)
        self._steered_at = time.monotonic()
        self._wake.set()

    def detach(self, line: Line) -> None:
        """The line is gone; the world stays."""
        if self.line is line:
            self.line = None
            self.left_at = time.monotonic()
            self.steering = Steering(sequence=self.steering.sequence)
            self._wake.set()

    def hear(self, message: dict[str, Any]) -> None:
        """Takes in a checked message. Raises `UserError` when too many requests wait."""
        kind = message["type"]
        if kind == "input":
            before = self.steering.keys
            self.steering.hear(message["keys"], message["look"], message["sequence"])
            if self.steering.active or self.steering.keys != before:
                self._steered_at = time.monotonic()
                self._heard_at = self._heard_at or self._steered_at
        elif kind == "seen":
            self.seen = max(self.seen, min(message["chunk"], self.chunks))
        elif kind in ("pause", "resume"):
            self.paused, self._steered_at = kind == "pause", time.monotonic()
        elif len(self._requests) >= _MOST_REQUESTS:
            raise UserError(kind, f"{_MOST_REQUESTS} requests wait already", "Wait for answers")
        else:
            self._requests.append(message)
        self._wake.set()

    async def close(self) -> None:
        """Ends the world and frees what it held."""
        self._task.cancel()
        await asyncio.wait({self._task})  # unlike its own await, it leaves our cancellation ours
        if self.journey is not None:
            self.journey.close()
        self.journey = None
        self.branches.clear()
        self.parcels.forget(self.token)

    async def tell(self, kind: str, **fields: Any) -> None:
        """Tells the client, if it is there."""
        if self.line is not None:
            await self.line.tell(kind, **fields)

    async def _live(self) -> None:
        while True:
            self._wake.clear()
            wait: float | None = None
            try:
                while self._requests:
                    await self._try(self._requests.popleft())
                state, reason = self._standing()
                await self._tell_status(state, reason)
                if state == "running":
                    wait = self._next_start - time.monotonic()
                    if wait <= 0:
                        await self._dream()
                        continue
                    wait = min(wait, 1.0)
            except UserError as error:
                await self._complain(error)
            except Stopped:
                return
            except Exception:
                _log.exception("a world could not go on")
                self.failed = "the server failed; it is told in its log"
                await self._complain(UserError("server", "this world failed", "Start it again"))
                continue  # how it stands now is told too
            # Not wait_for: in Python 3.11 it loses a cancellation that meets the awaited event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    def _standing(self) -> tuple[str, str]:
        """Whether the world goes on, and why not."""
        if self.journey is None or not self.begun:
            return "waiting", "choose a start"
        if self.failed:
            return "stopped", self.failed
        bank = self.journey.session.history.bank
        assert bank is not None
        most = min(
            self.studio.bounds.latents, self.studio.bounds.bank_bytes // bank.bytes_per_latent
        )
        if self.journey.session.length >= most:
            return "stopped", f"the memory is full ({most} latents): rewind, or save and start anew"
        if self.paused:
            return "paused", "paused"
        if self.line is None or not self.line.open:
            return "waiting", "nobody is connected"
        if self.chunks - self.seen >= self.studio.bounds.unseen:
            return "waiting", _BEHIND
        if time.monotonic() - self._steered_at > self.studio.bounds.idle_seconds:
            return "paused", "nobody has steered for a while: move to go on"
        return "running", ""

    async def _tell_status(self, state: str, reason: str) -> None:
        # Waiting for the page to paint is the rhythm of the thing, no news.
        if reason == _BEHIND:
            return
        if (state, reason) != self._status:
            self._status = (state, reason)
            await self.tell("status", state=state, reason=reason)

    async def _complain(self, error: UserError) -> None:
        if self.line is not None:
            await self.line.complain(error)

    async def _dream(self) -> None:
        journey = self.journey
        assert journey is not None
        self.settings.apply(journey.session)
        actions = self.steering.actions(FRAMES_PER_LATENT * journey.session.chunk)
        sequence = self.steering.sequence
        heard, self._heard_at = self._heard_at, None
        now = time.monotonic()
        span = len(actions) / FPS
        # Paced to the world's rate; a late chunk does not make the next ones hurry.
        behind = now - self._next_start
        self._next_start = (self._next_start if behind < span else now) + span
        made = await self.studio.go(journey, actions)
        self.chunks += 1
        header, parts = await asyncio.to_thread(
            shown, made, self.settings.layer, journey.session.config.layout.M
        )
        sent = time.monotonic()
        self._sent.append((sent, len(actions)))
        while self._sent[0][0] < sent - _RATE_SPAN:
            self._sent.popleft()
        fps = sum(frames for _, frames in self._sent) / _RATE_SPAN
        header |= {
            "type": "chunk",
            "chunk": self.chunks,
            "sequence": sequence,
            "fps": round(fps, 2),
            "action_to_frame": None if heard is None else round(sent - heard, 4),
            "realtime": made.times["total"] <= span and behind < span,
        }
        if self.line is not None:
            await self.line.hand(header, parts)
            await self._hand_thumbnails(
                made.latents - len(actions) // FRAMES_PER_LATENT, made.dream
            )

    async def _hand_thumbnails(self, first: int, frames: np.ndarray) -> None:
        if self.line is None:
            return
        middles = frames[FRAMES_PER_LATENT // 2 :: FRAMES_PER_LATENT]
        await self._hand_small(first, middles)

    async def _hand_small(self, first: int, pictures: np.ndarray) -> None:
        parts: Parts = [
            ({"kind": "thumbnail", "latent": first + i}, thumbnail(picture))
            for i, picture in enumerate(pictures)
        ]
        if self.line is not None:
            await self.line.hand({"type": "thumbnails", "first": first}, parts)

    async def _try(self, request: dict[str, Any]) -> None:
        """Does what is asked, or tells why not; the world goes on as it was."""
        try:
            await self._obey(request)
        except UserError as error:
            await self._complain(error)

    async def _obey(self, request: dict[str, Any]) -> None:
        kind = request["type"]
        if kind == "start":
            await self._start(request)
            return
        if kind == "set":
            self.settings = self.settings.changed(request, self.studio)
            await self.tell("settings", **self.settings.told())
            return
        journey = self.journey
        if journey is None or not self.begun:
            raise UserError(kind, "there is no world yet", "Start one first")
        if kind == "again":
            await self._show_start(0)
        elif kind == "rewind":
            await self.studio.work(journey.rewind, request["latent"])
            self._take_breath()
            await self.tell("rewound", latents=journey.session.length)
        elif kind == "fork":
            self.branches.fork(journey.snapshot())
            await self._tell_branches()
        elif kind == "branch":
            await self._change_branch(journey, request["id"])
        elif kind == "save":
            make = pack_world if request["what"] == "world" else film
            path = self.parcels.place(".world" if request["what"] == "world" else ".mp4")
            await self._pieces(make(journey, path))
            seed = journey.told.get("seed")
            place = "world" if seed is None else f"seed-{seed}"
            name = f"{place}-{journey.session.length}{path.suffix}"
            key = self.parcels.keep("file", name, path, self.token)
            await self.tell(
                "file",
                what=request["what"],
                url=f"/file/{key}",
                name=name,
                bytes=path.stat().st_size,
            )

    async def _start(self, request: dict[str, Any]) -> None:
        noise_seed = 0 if request["from"] == "seed" else secrets.randbelow(2**31)
        journey = self.studio.journey(noise_seed)
        self.settings.apply(journey.session)
        try:
            pieces = beginning(journey, request, self.parcels, self.token, self.studio.bounds)
            await self._pieces(pieces)
        except BaseException:
            journey.close()
            raise
        if self.journey is not None:
            self.journey.close()
        self.journey, self.failed, self.paused = journey, "", False
        self.branches.clear()
        if request["from"] != "seed":
            self.settings = self.settings.adopted(journey.session, self.studio)
            await self.tell("settings", **self.settings.told())
        self._take_breath()
        await self._show_start(0)

    async def _pieces(self, pieces: Iterator[Progress]) -> None:
        """Longer model work, told of as it goes on."""
        while (progress := await self.studio.advance(pieces)) is not None:
            await self.tell(
                "progress", stage=progress.stage, done=progress.done, total=progress.total
            )
            if progress.beside is not None:
                await self.studio.until(progress.beside)

    async def _show_start(self, first: int) -> None:
        """Tells of the whole world, with a picture of every latent from `first` on."""
        journey = self.journey
        assert journey is not None
        session = journey.session
        await self.tell(
            "started",
            latents=session.length,
            frames=session.frames,
            thumbnails=True,
            truth=journey.truth is not None,
            seed=journey.told.get("seed"),
            trail=journey.trail(),
        )
        self._status = ("", "")  # it counts for another world now, even where it is the same
        await self._tell_branches()
        pictures = journey.pictures(first)
        while (small := await self.studio.advance(pictures)) is not None:
            await self._hand_small(first, small)
            first += len(small)

    async def _change_branch(self, journey: Journey, number: int) -> None:
        saved = self.branches.go_to(number, journey.snapshot())
        await self._pieces(journey.begin_saved(saved))
        self.settings = self.settings.adopted(journey.session, self.studio)
        self._take_breath()
        await self._tell_branches()
        await self.tell("settings", **self.settings.told())

    async def _tell_branches(self) -> None:
        assert self.journey is not None
        told = self.branches.told(self.journey.session.length)
        await self.tell("branches", branches=told, current=self.branches.current)

    def _take_breath(self) -> None:
        """What was sent before no longer counts."""
        self.seen = self.chunks
        self._next_start = self._steered_at = time.monotonic()
