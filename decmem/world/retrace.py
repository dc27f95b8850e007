"""Retrace walks: an exploration, then a return that stays among places already seen.

Frames 1 to 221 are the *bank*: 157 frames of exploration, then the way back begins. Every frame
from 222 on is *scored*: at least 95 % of its pixels show surfaces that are visible in bank frames
lying at least 64 frames before it. (That they were not seen since cannot be asked: a camera moves
without breaks, so frame 222 necessarily shows what 221 saw.) At least half of the scored poses
differ from every pose of the bank by half a block or 5 degrees, so copying cannot answer.

The walk is planned chunk by chunk: of several ways to go on near the explored path, the first that
passes these tests, by depth alone, is taken. No model has a say in it.
"""

import numpy as np
from jaxtyping import Bool, Float64, Int64

from decmem.errors import UserError
from decmem.world.actions import A
from decmem.world.angles import EIGHTHS
from decmem.world.camera import DEFAULT_FOV, DEFAULT_SIZE, centres, intrinsics
from decmem.world.exploration import PLAN, explore
from decmem.world.grid import World
from decmem.world.hashing import draw, stream
from decmem.world.motion import STATE, UNIT, Track, state_cameras
from decmem.world.probe import PROBE_SIZE, probe_depth
from decmem.world.spawn import choose_spawn
from decmem.world.tracking import (
    ARRIVED,
    BOUNCE,
    MIND,
    PACE,
    PHASE,
    PLACE,
    TO_LATERAL,
    TO_TILT,
    TO_TURN,
    follow,
)
from decmem.world.visibility import seen_by

BANK = 221
"""Frames of the bank; the scored frames follow."""
GAP = 64
SEEN = 0.95
APART = 0.5
"""Blocks."""
TURNED = 5.0
"""Degrees."""
DISTINCT = 0.5

EXPLORED = BANK - GAP
_PLANNED_SEEN = 0.96
_PLANNING_PROBE = (48, 72)
_PLANNED_DISTINCT = 0.6
_IN_SIGHT = 0.4
_LOST = UNIT
"""A way on that leaves the player this far behind, stuck on something, is none."""
_CHUNK = 12
_OPTIONS = 11
_BOLD = 6
_PATIENCE = 8
"""Options tried per chunk, on average, before a try is given up."""
_ATTEMPTS = 100
_SALT = 900


def _choose(mind: np.ndarray, option: int, rng: np.ndarray) -> None:
    """Draw an option for the next chunk: bold ones first, then timid ones, at last turning back."""
    bold = 4 if option < _BOLD else 2 if option < _BOLD + 3 else 0
    side = 1 - 2 * draw(rng, 2)
    mind[TO_LATERAL] = side * (UNIT // 2 + draw(rng, UNIT * 7 // 10)) * bold // 4
    side = 1 - 2 * draw(rng, 2)
    mind[TO_TURN] = side * (5 * EIGHTHS + draw(rng, 10 * EIGHTHS)) * bold // 4
    mind[TO_TILT] = (draw(rng, 12 * EIGHTHS) - 6 * EIGHTHS) * bold // 4
    direction = 1 if mind[PACE] > 0 else -1
    # The first way back leads all the way, far from what was seen last; then it may turn anywhere.
    if mind[ARRIVED] and (draw(rng, 100) < 8 or option == _OPTIONS - 1):
        direction = -direction
    mind[PACE] = direction * (PHASE * 7 // 10 + draw(rng, PHASE * 6 // 10))


def distinct_from(
    poses: Float64[np.ndarray, "F 4 4"], bank: Float64[np.ndarray, "N 4 4"]
) -> Bool[np.ndarray, " F"]:
    """For each pose whether it differs from every bank pose by half a block or 5 degrees."""
    distance = np.linalg.norm(centres(poses)[:, None] - centres(bank)[None], axis=-1)
    trace = np.einsum("fij,nij->fn", poses[:, :3, :3], bank[:, :3, :3])
    turned = (trace - 1) / 2 <= np.cos(np.radians(TURNED))
    return ((distance >= APART) | turned).all(1)


class _Seen:
    """What the exploration saw, as depth maps of one size, asked with probes of another."""

    def __init__(
        self,
        world: World,
        explored: Float64[np.ndarray, "N 4 4"],
        size: tuple[int, int],
        probe: tuple[int, int],
    ) -> None:
        self.world = world
        self.poses = explored
        self.depth = probe_depth(world, explored, size)
        self.intrinsics = intrinsics(size, DEFAULT_FOV)
        self.probe = probe
        self.probe_intrinsics = intrinsics(probe, DEFAULT_FOV)

    def share(self, pose: Float64[np.ndarray, "4 4"], rows: Int64[np.ndarray, " rows"]) -> float:
        """Share of a view that the explored frames `rows`, asked in turn, saw."""
        depth = probe_depth(self.world, pose[None], self.probe)[0]
        seen = seen_by(
            depth, pose, self.probe_intrinsics, self.depth, self.poses, self.intrinsics, rows
        )
        return float((seen >= 0).mean())


def _leads_away(seen: _Seen) -> bool:
    """Whether the path's beginning, where the return leads, is mostly out of sight from the stretch
    passed shortly before the scored frames.
    """
    recent = np.arange(EXPLORED - GAP - 5, EXPLORED - GAP // 2 + 5)
    shares = [seen.share(seen.poses[row], recent) for row in range(0, EXPLORED // 3, 8)]
    return bool(np.mean(shares) <= _IN_SIGHT)


def _stays_in_sight(seen: _Seen, poses: Float64[np.ndarray, "F 4 4"], row: int) -> bool:
    """Whether every view was seen; the search begins at the explored frame `row`."""
    rows = np.argsort(abs(np.arange(EXPLORED) - row), kind="stable")
    return all(seen.share(pose, rows) >= _PLANNED_SEEN for pose in poses[::-1])


def _attempt(
    world: World, seed: int, frames: int
) -> tuple[Int64[np.ndarray, "F 8"], Int64[np.ndarray, "F A"]] | None:
    """One try: explore, then plan the return chunk by chunk; None if it leads nowhere."""
    states = np.zeros((frames, STATE), np.int64)
    actions = np.zeros((frames, A), np.int64)
    states[0] = choose_spawn(world, seed)
    rng = np.array([stream(seed, _SALT)], np.uint64)
    explore(world.cells, np.zeros(PLAN, np.int64), rng, states, actions, 1, EXPLORED)
    path = states[:EXPLORED].copy()
    explored = state_cameras(path)
    if not _leads_away(_Seen(world, explored, PROBE_SIZE, PROBE_SIZE)):
        return None
    # Slivers seen at a grazing angle only count at the frames' own size.
    seen = _Seen(world, explored, DEFAULT_SIZE, _PLANNING_PROBE)

    def leads_on(mind: np.ndarray, option: int, begin: int, end: int) -> bool:
        _choose(mind, option, rng)
        reached = follow(world.cells, path, mind, BOUNCE, _LOST, states, actions, begin, end)
        if reached < end:
            return False
        poses = state_cameras(states[begin:end])
        bank = state_cameras(states[: min(BANK, begin)])
        if option < _BOLD and distinct_from(poses, bank).mean() < _PLANNED_DISTINCT:
            return False
        return _stays_in_sight(seen, poses, int(mind[PLACE]) // PHASE)

    mind = np.zeros(MIND, np.int64)
    mind[PLACE], mind[PACE] = (EXPLORED - 1) * PHASE, -PHASE
    begins = range(EXPLORED, frames, _CHUNK)
    plans = [(mind, iter(range(_OPTIONS)))]
    for _ in range(_PATIENCE * len(begins)):
        begin = begins[len(plans) - 1]
        before, options = plans[-1]
        option = next(options, None)
        if option is None:
            # A dead end: what led here was no good choice either.
            plans.pop()
            if not plans:
                return None
            continue
        mind = before.copy()
        if leads_on(mind, option, begin, min(begin + _CHUNK, frames)):
            if len(plans) == len(begins):
                break
            plans.append((mind, iter(range(_OPTIONS))))
    else:
        return None
    poses = state_cameras(states)
    if distinct_from(poses[BANK:], poses[:BANK]).mean() < DISTINCT:
        return None
    return states, actions


def retrace_walk(
    world: World, seed: int, frames: int
) -> tuple[Track, Int64[np.ndarray, "F A"], int]:
    """A retrace walk of `frames` frames in all, bank and scored; its actions in whole steps; the
    tries it took. Raises `UserError` if no frame would be scored.
    """
    if frames <= BANK:
        raise UserError("frames", f"got {frames}", f"a retrace walk has at least {BANK + 1} frames")
    for attempt in range(_ATTEMPTS):
        found = _attempt(world, seed + attempt * (1 << 40), frames)
        if found is not None:
            return Track(found[0]), found[1], attempt + 1
    raise AssertionError(f"no retrace walk for seed {seed} in {_ATTEMPTS} tries")
