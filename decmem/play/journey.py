"""A world that is walked in: a session, the truth beside it where there is one, and what to show.

Everything here is model work: it runs in the worker thread, one piece at a time.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from decmem.memory import Lens
from decmem.model.conditioning import REFERENCE_FRAME, camera_centres
from decmem.play.defaults import FRAMES_PER_LATENT, Pace
from decmem.play.truth import Truth
from decmem.rollout import Session
from decmem.saved_world import SavedWorld
from decmem.world.camera import centres
from decmem.world.episode import Episode
from decmem.world.motion import STATE

MEMORY_FRAMES = 221
_PIECE = 32  # frames worked on between two looks at the other sessions


@dataclass(frozen=True)
class Progress:
    """How far a world is on its way: `done` of `total` in a stage of docs/play.md. The next piece
    of work waits for what is `beside`: until then the worker is better used."""

    stage: str
    done: int
    total: int
    beside: "Future[Any] | None" = None


@dataclass(frozen=True)
class Chunk:
    """What was made in one go. times: seconds of generate, decode, truth and total."""

    dream: UInt8[np.ndarray, "F H W 3"]
    truth: UInt8[np.ndarray, "F H W 3"] | None
    actions: Float32[np.ndarray, "F A"]
    world_to_camera: Float64[np.ndarray, "F 4 4"]
    first_frame: int
    latents: int
    lens: Lens | None
    times: dict[str, float]
    memory_bytes: int


@dataclass(frozen=True)
class Outing:
    """A chunk that was set out for: where the player went at that time, and its truth to come."""

    actions: Float32[np.ndarray, "F A"]
    started: float
    poses: Float64[np.ndarray, "F 4 4"] | None = None
    rendering: "Future[tuple[UInt8[np.ndarray, 'F H W 3'], float]] | None" = None


def with_truth(chunk: Chunk, outing: Outing) -> Chunk:
    """The chunk once its truth is rendered."""
    truth, spent = outing.rendering.result() if outing.rendering else (None, 0.0)
    times = chunk.times | {"truth": spent, "total": time.perf_counter() - outing.started}
    return replace(chunk, truth=truth, times=times)


class Journey:
    """One world. A `begin_...` gives its progress; then `go` and `rewind`.

    Args:
        session: an empty session of one world. pace: of the device.
        painters: threads that render known frames, which are rendered here where None.
    """

    def __init__(self, session: Session, pace: Pace, painters: Executor | None = None) -> None:
        self.session = session
        self.pace = pace
        self.painters = painters
        self.truth: Truth | None = None
        self.told: dict[str, Any] = {}
        self._beside = ThreadPoolExecutor(1, "truth")

    def begin_seed(self, seed: int, count: int = MEMORY_FRAMES) -> Iterator[Progress]:
        """A block world: the first `count` (1 + 4n) frames of its free walk are remembered."""
        yield Progress("render", 0, count)
        truth = Truth(seed, self.session.config.size, self.pace)
        actions = truth.explore(count)
        shown: list[np.ndarray] = []
        pieces, done = truth.remembered(_PIECE), 0
        while done < count:
            if self.painters is None:
                frames = next(pieces)
            else:
                painting = self.painters.submit(next, pieces)
                yield Progress("render", done, count, painting)
                frames = painting.result()
            shown.append(frames)
            done += len(frames)
            yield Progress("render", done, count)
        lens = np.tile(truth.intrinsics, (count, 1, 1))
        clip = Episode(np.concatenate(shown), truth.poses(), lens, actions)
        yield from self.begin_clip(clip)
        self.truth = truth
        self.told = {"seed": seed, "start": truth.start}

    def begin_clip(self, clip: Episode) -> Iterator[Progress]:
        """1 + 4n known frames."""
        total = 1 + (len(clip) - 1) // FRAMES_PER_LATENT
        first = 0
        while first < len(clip):
            last = first + _PIECE + (first == 0)
            part = slice(first, last)
            self.session.observe(
                clip.frames[part],
                clip.actions[part],
                clip.world_to_camera[part],
                clip.intrinsics[part],
            )
            yield Progress("remember", self.session.length, total)
            first = last

    def begin_picture(self, picture: UInt8[np.ndarray, "H W 3"]) -> Iterator[Progress]:
        """A single picture."""
        self.session.observe_picture(picture)
        yield Progress("remember", 1, 1)

    def begin_saved(self, saved: SavedWorld) -> Iterator[Progress]:
        """A saved world, or another branch of this one; what they share is not built again.

        Raises:
            UserError: where it does not fit the model.
        """
        for known in self.session.restore(saved):
            yield Progress("remember", known, saved.length)
        told = saved.provenance
        self.told = {key: told[key] for key in ("seed", "start") if key in told}
        self._take_up_truth()

    def _take_up_truth(self) -> None:
        """The player is led through all actions again: the walk is the same on every machine."""
        seed, start = self.told.get("seed"), self.told.get("start")
        conditions = self.session.conditions
        self.truth = None if self.truth and self.truth.seed != seed else self.truth
        if type(seed) is not int or not 0 <= seed < 2**63 or conditions is None:
            self.told, self.truth = {}, None
            return
        if not _is_state(start):
            self.told, self.truth = {}, None
            return
        truth = self.truth or Truth(seed, self.session.config.size, self.pace)
        skipped = FRAMES_PER_LATENT - 1  # a first latent repeats its one frame
        truth.follow(start, conditions.actions[0].flatten(0, 1)[skipped:].cpu().numpy())
        poses = conditions.world_to_camera[0].flatten(0, 1)[skipped:].cpu().numpy()
        same = np.allclose(truth.poses(), poses, atol=1e-6)
        self.truth = truth if same else None

    def go(self, actions: Float32[np.ndarray, "F A"], beside: bool = True) -> Chunk:
        """The next frames, with the truth `beside` where there is one.

        Raises:
            UserError: as `Session.step` does.
        """
        outing = self.set_out(actions, beside)
        before = dict(self.session.timings)
        try:
            dream = self.session.step(actions, outing.poses)
        except BaseException:
            self.turn_back()
            raise
        names = {"generate": "rollout", "decode": "decode"}
        spent = {name: self.session.timings[at] - before[at] for name, at in names.items()}
        return with_truth(self.come_home(outing, dream, spent), outing)

    def set_out(self, actions: Float32[np.ndarray, "F A"], beside: bool = True) -> Outing:
        """The player goes ahead, and its truth is rendered `beside` where there is one. Then
        somebody dreams: `come_home` with the frames, or `turn_back`."""
        outing = Outing(actions, time.perf_counter())
        if self.truth is None:
            return outing
        poses = self.truth.advance(actions)
        try:
            rendering = self._beside.submit(_timed, self.truth, poses) if beside else None
        except BaseException:
            self.turn_back()
            raise
        return replace(outing, poses=poses, rendering=rendering)

    def turn_back(self) -> None:
        """Nothing was dreamed of what was set out for."""
        if self.truth is not None:
            self.truth.rewind(self.session.frames)

    def come_home(
        self,
        outing: Outing,
        dream: UInt8[np.ndarray, "F H W 3"],
        spent: dict[str, float],
    ) -> Chunk:
        """What was dreamed, and the seconds of generate and decode. The truth is still to come
        (`with_truth`)."""
        session, T = self.session, len(outing.actions) // FRAMES_PER_LATENT
        bank = session.history.bank
        assert session.conditions is not None
        assert bank is not None
        return Chunk(
            dream,
            None,
            outing.actions,
            session.conditions.world_to_camera[0, -T:].flatten(0, 1).cpu().numpy(),
            session.frames - len(outing.actions) + 1,
            session.length,
            session.seen,
            spent,
            bank.allocated_bytes,
        )

    def rewind(self, latents: int) -> None:
        """Back to this many latents. Raises `UserError` where they never were."""
        self.session.rewind(latents)
        if self.truth is not None:
            self.truth.rewind(self.session.frames)

    def snapshot(self) -> SavedWorld:
        """The world as it is now."""
        return self.session.snapshot(self.told)

    def trail(self) -> list[list[float]]:
        """Where each latent was seen from: [x, z] in metres."""
        conditions = self.session.conditions
        if conditions is None:
            return []
        at = camera_centres(conditions.cameras[0]).cpu().numpy()
        return [[round(float(x), 3), round(float(z), 3)] for x, _, z in at]

    def pictures(self, first: int, piece: int = 8) -> Iterator[UInt8[np.ndarray, "T H W 3"]]:
        """One decoded frame for every latent from `first` on, some at a time."""
        latents = self.session.latents
        assert latents is not None
        for start in range(first, latents.shape[1], piece):
            stop = min(start + piece, latents.shape[1])
            before = max(start - 1, 0)
            frames = self.session.codec.decode(latents[:, before:stop])[0].cpu().numpy()
            # Without a stream the first latent of a piece gives one frame, every other four.
            grouped = frames[1:].reshape(-1, FRAMES_PER_LATENT, *frames.shape[1:])
            middle = grouped[:, REFERENCE_FRAME]
            yield np.concatenate((frames[:1], middle)) if start == 0 else middle

    def close(self) -> None:
        """Lets go of the renderer's thread."""
        self._beside.shutdown(wait=False)


def _is_state(start: Any) -> TypeGuard[list[int]]:
    """Whether this is a player's state; what a file says is not taken on trust."""
    listed = type(start) is list and len(start) == STATE
    return listed and all(type(x) is int and abs(x) < 2**40 for x in start)


def _timed(truth: Truth, poses: np.ndarray) -> tuple[np.ndarray, float]:
    started = time.perf_counter()
    return truth.frames(poses), time.perf_counter() - started


def view_of(world_to_camera: Float64[np.ndarray, "F 4 4"]) -> list[list[float]]:
    """Each camera as [x, y, z, yaw, pitch], metres and degrees."""
    ahead = world_to_camera[:, 2, :3]
    yaw = np.degrees(np.arctan2(ahead[:, 0], -ahead[:, 2]))
    pitch = np.degrees(np.arcsin(ahead[:, 1].clip(-1, 1)))
    rows = np.column_stack((centres(world_to_camera), yaw, pitch))
    return np.round(rows, 3).tolist()
