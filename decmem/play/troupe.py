"""The troupe: worlds whose chunks are due at the same time, dreamt in one pass.

Nobody waits for company. Whoever asks while the worker is busy goes with the first of them, where
all want the same of the model; a world alone, or one that wants something of its own, goes alone.
Company changes no world's frames but for rounding, and neither does another's failure.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from decmem.codec import DecoderStream
from decmem.engine import serves
from decmem.errors import UserError
from decmem.memory import Bank
from decmem.memory.bank import bytes_per_latent
from decmem.memory.stable import Stable
from decmem.model import Conditions
from decmem.play.defaults import FRAMES_PER_LATENT, Bounds
from decmem.play.journey import Chunk, Journey, Outing, with_truth
from decmem.rollout import Session
from decmem.sampler import Chunk as Row
from decmem.sampler import Sampler

_log = logging.getLogger(__name__)
_MOST = 16
"""Worlds of one pass."""
_WAYS = 3
"""Settings that graphs are kept for."""
_FORGOTTEN = 10.0
"""Seconds after which a way that nobody went makes room for another: recording takes long, so ways
must not take turns."""
_LEAST = 128
"""Latents of a stall that are worth moving in for."""


@dataclass(frozen=True)
class Request:
    """A world that is due. answer: its chunk, once it is there."""

    journey: Journey
    actions: np.ndarray
    answer: "Future[Chunk]"


class _Player(NamedTuple):
    """A world on its way in company."""

    request: Request
    outing: Outing
    steering: Conditions

    @property
    def session(self) -> Session:
        return self.request.journey.session


class _Dream(NamedTuple):
    """What one of them dreamt. spent: seconds that all took together."""

    latents: torch.Tensor
    frames: np.ndarray
    spent: dict[str, float]


@dataclass
class _Way:
    """What a pass may be shared for, and the engines that go so."""

    sampler: Sampler
    latents: int
    engines: dict[int, object]
    gone_at: float


class Troupe:
    """Worlds of one model that may dream together.

    Args:
        bounds: of the server.

    `ask` is for any thread, all else for the worker. The stable is made when two first meet, and
    is given up by `rest` once nobody is in it.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.stable: Stable | None = None
        self._stall = 0
        self._closed_until = -math.inf  # where there was no room, it is not looked for all the time
        self._ways: list[_Way] = []
        self._waiting: deque[Request] = deque()
        self._closed = False

    def ask(self, journey: Journey, actions: np.ndarray, worker: Executor) -> "Future[Chunk]":
        """The next chunk of a world, as `Journey.go` gives it."""
        request = Request(journey, actions, Future())
        if self._closed:
            request.answer.cancel()
            return request.answer
        self._waiting.append(request)
        # As many turns as requests: there is one left for whoever is not taken along.
        worker.submit(self.perform)
        return request.answer

    @property
    def waiting(self) -> int:
        """Worlds that are due."""
        return len(self._waiting)

    def close(self) -> None:
        """Nobody who still waits will be served."""
        self._closed = True
        self._call_off()

    def _call_off(self) -> None:
        for request in list(self._waiting):
            request.answer.cancel()

    def perform(self) -> None:
        """Serves who has waited longest, and whoever may come along."""
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        waiting = [one for one in waiting if not one.answer.cancelled()]
        if not waiting:
            return
        company = waiting[:1]
        if len(waiting) > 1:
            try:
                company = self._company(waiting)
            except Exception:
                _log.exception("who could go together is not known")
        served = set(map(id, company))
        # Who came meanwhile stands behind them.
        self._waiting.extendleft(one for one in reversed(waiting) if id(one) not in served)
        if self._closed:  # meanwhile: then nobody comes for those who were put back
            self._call_off()
        company = [one for one in company if one.answer.set_running_or_notify_cancel()]
        if len(company) > 1:
            company = self._together(company)
        for request in company:
            _alone(request)

    def _company(self, waiting: Sequence[Request]) -> list[Request]:
        """The first, and those that may share its pass."""
        first = waiting[0]
        if not _sociable(first):
            return [first]
        sampler, latents = first.journey.session.sampler, _latents(first)
        company = [
            one
            for one in waiting
            if one is first
            or (
                _sociable(one)
                and _latents(one) == latents
                and one.journey.session.sampler == sampler
            )
        ][:_MOST]
        if len(company) > 1 and self._open(sampler) and self._goes(sampler, latents):
            housed = [one for one in company if self._house(one)]
            if len(housed) > 1 and housed[0] is first:
                return housed
        return [first]

    def _open(self, sampler: Sampler) -> bool:
        """Whether there is a stable, made now where there was none."""
        if self.stable is None:
            if time.monotonic() < self._closed_until:
                return False
            self._closed_until = time.monotonic() + _FORGOTTEN
            each, whole = stall_latents(sampler, self.bounds)
            if whole < 2 * each:
                return False
            try:
                self.stable = sampler.new_stable(whole)
            except UserError as error:
                _log.warning("worlds are dreamt one by one: %s", error)
                return False
            self._stall, self._closed_until = each - sampler.model.config.chunk, -math.inf
        return True

    def _goes(self, sampler: Sampler, latents: int) -> bool:
        """Whether this way may be gone; its engines are the stable's then."""
        assert self.stable is not None
        now = time.monotonic()
        way = next((w for w in self._ways if (w.sampler, w.latents) == (sampler, latents)), None)
        if way is None:
            if len(self._ways) == _WAYS:
                oldest = min(self._ways, key=lambda w: w.gone_at)
                if now - oldest.gone_at < _FORGOTTEN:
                    return False
                self._ways.remove(oldest)
            way = _Way(sampler, latents, {}, now)
            self._ways.append(way)
        way.gone_at = now
        self.stable.engines = way.engines
        return True

    def _house(self, request: Request) -> bool:
        """Whether the world has a stall with room for its chunk; it moves in where it can."""
        assert self.stable is not None
        session = request.journey.session
        history, sampler = session.history, session.sampler
        branches = 1 if sampler.guidance is None else 2
        end = history.length + branches * _latents(request)
        assert history.bank is not None
        if self.stable.stall(history.bank) is None:
            if end > self._stall:
                return False
            try:
                history.bank = self.stable.take_in(history.bank, self._stall)
            except UserError:
                return False  # all stalls are taken
        return end <= history.bank.layers[0].room

    @torch.no_grad()
    def _together(self, company: Sequence[Request]) -> list[Request]:
        """One pass for all of them; gives back those that have to go alone after all."""
        assert self.stable is not None
        players = [player for one in company if (player := _set_out(one)) is not None]
        if not players:
            return []
        # Once answered, a world may be set otherwise; the pass is what it was.
        sampler = players[0].session.sampler
        try:
            dreamt = self._dream(self.stable, sampler, players)
        except Exception:
            # Whoever it was: alone, each meets what is its own.
            _log.exception("worlds that went together go alone")
            for one in players:
                one.request.journey.turn_back()
            return [one.request for one in players]
        for player, dream in zip(players, dreamt, strict=True):
            _hand(player, dream)
        try:
            self._write(self.stable, sampler, [one.session for one in players])
        except Exception:
            _log.exception("write passes are left to the next chunks")
        return []

    def _dream(self, stable: Stable, sampler: Sampler, players: Sequence[_Player]) -> list[_Dream]:
        """One for each of them; no world has gone on yet."""
        sessions = [one.session for one in players]
        started = time.perf_counter()
        self._write(stable, sampler, sessions)
        rows = [
            Row(_bank(s), p.steering, sampler.noise(s.seeds, p.steering.time.tolist()))
            for s, p in zip(sessions, players, strict=True)
        ]
        latents = sampler.generate_together(stable, rows)
        before = torch.cat([_last(s) for s in sessions])
        finished = sessions[0].decoder.begin(torch.cat(latents), DecoderStream(before))
        if sampler.device.type == "cuda":
            torch.cuda.current_stream(sampler.device).synchronize()
        generated = time.perf_counter()
        frames = finished().cpu().numpy()
        decoded = time.perf_counter()
        spent = {"generate": generated - started, "decode": decoded - generated}
        return [_Dream(*made, spent) for made in zip(latents, frames, strict=True)]

    def _write(self, stable: Stable, sampler: Sampler, sessions: Sequence[Session]) -> None:
        """The write passes that these still owe their banks, in one pass where that can be."""
        rows = []
        for one in sessions:
            owed = one.history.pay(sampler)
            if owed is not None:
                rows.append(Row(_bank(one), owed[1], owed[0]))
        if not rows:
            return
        try:
            sampler.write_together(stable, rows)
        finally:
            for one in sessions:
                if _bank(one).length == one.length:
                    one.history.paid()

    def rest(self) -> None:
        """Gives up the stable once nobody is in it."""
        if self.stable is not None and self.stable.empty:
            self.stable = None
            self._ways.clear()


def stall_latents(sampler: Sampler, bounds: Bounds) -> tuple[int, int]:
    """Latents of a stall, what passes through it included, and of the whole stable: `together` for
    every world, as far as half of the device's free memory goes."""
    config, device = sampler.model.config, sampler.device
    position, dtype = config.position, sampler.running.bank_dtype or sampler.dtype
    heads = config.width // position.head_dim
    latent = bytes_per_latent(config.layers, heads, position.head_dim, config.layout, dtype)
    each = bounds.together + config.chunk
    most = bounds.sessions * each
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        most = min(most, (free + spare) // 2 // latent)
    each = min(each, max(most // bounds.sessions, _LEAST))
    return each, most


def _latents(request: Request) -> int:
    return len(request.actions) // FRAMES_PER_LATENT


def _sociable(request: Request) -> bool:
    """Whether a world could share a pass at all."""
    session, T = request.journey.session, _latents(request)
    return (
        not session.lens
        and session.batch == 1
        and T in session.config.chunk_sizes
        and session.chunk >= T
        and session.history.bank is not None
        and serves(session.model, session.length, T)
    )


def _set_out(request: Request) -> _Player | None:
    """The world on its way; None for one that was told why it cannot go."""
    journey = request.journey
    try:
        outing = journey.set_out(request.actions)
        try:
            return _Player(request, outing, journey.session.prepare(request.actions, outing.poses))
        except BaseException:
            journey.turn_back()
            raise
    except Exception as error:
        request.answer.set_exception(error)
        return None


def _hand(player: _Player, dream: _Dream) -> None:
    """Its world goes on, and is answered once its own truth is rendered: nobody else waits."""
    request, outing, session = player.request, player.outing, player.session
    try:
        session.seen = None
        session.history.write(session.sampler, dream.latents, player.steering, later=True)
        chunk = request.journey.come_home(outing, dream.frames, dream.spent)
    except Exception as error:
        request.journey.turn_back()
        request.answer.set_exception(error)
        return

    def answer(_: object = None) -> None:
        try:
            request.answer.set_result(with_truth(chunk, outing))
        except Exception as error:
            request.answer.set_exception(error)

    if outing.rendering is None:
        answer()
    else:
        outing.rendering.add_done_callback(answer)


def _alone(request: Request) -> None:
    try:
        request.answer.set_result(request.journey.go(request.actions))
    except BaseException as error:
        request.answer.set_exception(error)


def _bank(session: Session) -> Bank:
    assert session.history.bank is not None
    return session.history.bank


def _last(session: Session) -> torch.Tensor:
    assert session.history.last is not None
    return session.history.last
