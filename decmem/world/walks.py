"""Walks by kind: sequences of actions, and where they lead."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float32, Int64

from decmem.errors import UserError
from decmem.world.actions import ACTION_SCHEMA, PITCH, YAW, A, action_values
from decmem.world.angles import CIRCLE, COSINE, EIGHTHS, SINE, SINE_BITS
from decmem.world.exploration import PLAN, explore
from decmem.world.grid import World
from decmem.world.hashing import draw, stream
from decmem.world.motion import STATE, UNIT, WALK, PlayerState, Track, advance, stand
from decmem.world.retrace import BANK, retrace_walk
from decmem.world.spawn import choose_spawn
from decmem.world.tracking import ANYWHERE, HOLD, MIND, PACE, PHASE, ROUND, follow
from decmem.world.training_walk import train_walk
from decmem.world.version import WORLD_VERSION

WalkKind = Literal["free", "there_and_back", "loop", "pan", "retrace", "train", "still"]
WALK_KINDS: tuple[WalkKind, ...] = get_args(WalkKind)
_TURN_BACK = 20
"""Frames of the about-turn of `there_and_back`: 9 degrees each."""
_SALT = 800


@dataclass(frozen=True)
class Walk:
    """A walk: actions (F, 6), the states and poses they lead to, and where it comes from."""

    actions: Float32[np.ndarray, "F A"]
    track: Track
    provenance: dict[str, Any] = field(default_factory=dict)


def _pan(world: World, seed: int, states: np.ndarray, actions: np.ndarray) -> None:
    """Stand and look left and right."""
    rng = np.array([stream(seed, _SALT)], np.uint64)
    reach = (50 + draw(rng, 70)) * EIGHTHS
    rate = (3 + draw(rng, 4)) * EIGHTHS
    sign = 1 - 2 * draw(rng, 2)
    speed = 0
    for now in range(1, len(states)):
        away = (states[now - 1, 3] - states[0, 3]) * sign
        braking = speed * abs(speed) // (2 * EIGHTHS) * sign
        if away + braking >= reach:
            sign = -sign
        speed += min(max(sign * rate - speed, -EIGHTHS), EIGHTHS)
        actions[now, YAW] = speed
        actions[now, PITCH] = 1 if now % 40 < 20 else -1
        advance(world.cells, states[now - 1], actions[now], states[now])


def _circle(start: PlayerState, period: int, side: int) -> Int64[np.ndarray, "P 8"]:
    """A closed round at walking speed that begins at `start`, its centre on one side."""
    radius = WALK * period * 113 // 710
    turns = start.yaw + side * np.arange(period) * CIRCLE // period
    path = np.tile(np.array(start, np.int64), (period, 1))
    heading, now = start.yaw % CIRCLE, turns % CIRCLE
    path[:, 0] += side * (radius * (COSINE[heading] - COSINE[now]) >> SINE_BITS)
    path[:, 2] += side * (radius * (SINE[heading] - SINE[now]) >> SINE_BITS)
    path[:, 3] = turns
    return path


def _keep_to(
    world: World, path: np.ndarray, ends: int, states: np.ndarray, actions: np.ndarray
) -> None:
    """Go along `path` (P, 8) from its beginning, a row a frame, after states[0]."""
    mind = np.zeros(MIND, np.int64)
    mind[PACE] = PHASE
    follow(world.cells, path, mind, ends, ANYWHERE, states, actions, 1, len(states))


def _round(world: World, start: PlayerState) -> Int64[np.ndarray, "P 8"]:
    """The widest circle from `start`, of up to 120 frames, that can be walked; else the one that
    comes closest.
    """
    best, least = _circle(start, 24, 1), 1 << 40
    for period in range(120, 23, -12):
        for turn in range(8):
            for side in (1, -1):
                aside = start._replace(yaw=start.yaw + turn * CIRCLE // 8)
                path = _circle(aside, period, side)
                states = np.zeros((period + 1, STATE), np.int64)
                states[0] = path[0]
                _keep_to(world, path, ROUND, states, np.zeros((period + 1, A), np.int64))
                missed = abs(states[:period, [0, 2]] - path[:, [0, 2]]).max()
                climbed = np.ptp(states[:, 1])
                if missed < UNIT // 8 and climbed <= 3 * UNIT:
                    return path
                if missed < least:
                    best, least = path, missed
    return best


def _whole_walk(
    world: World, kind: WalkKind, seed: int, frames: int
) -> tuple[Track, Int64[np.ndarray, "F A"]]:
    start = choose_spawn(world, seed)
    states = np.zeros((frames, STATE), np.int64)
    actions = np.zeros((frames, A), np.int64)
    states[0] = start
    plan = np.zeros(PLAN, np.int64)
    rng = np.array([stream(seed, _SALT)], np.uint64)
    if kind == "free":
        explore(world.cells, plan, rng, states, actions, 1, frames)
    elif kind == "still":
        known = min(frames, BANK)
        explore(world.cells, plan, rng, states, actions, 1, known)
        stand(world.cells, states, actions, known, frames)
    elif kind == "pan":
        _pan(world, seed, states, actions)
    elif kind == "loop":
        path = _round(world, start)
        states[0] = path[0]
        _keep_to(world, path, ROUND, states, actions)
    else:
        out = max((frames - _TURN_BACK + 1) // 2, 1)
        explore(world.cells, plan, rng, states, actions, 1, out)
        about = min(out + _TURN_BACK, frames)
        for now in range(out, about):
            actions[now, YAW] = CIRCLE // 2 // _TURN_BACK
            advance(world.cells, states[now - 1], actions[now], states[now])
        back = states[:out][::-1].copy()
        back[:, 3] += CIRCLE // 2
        _keep_to(world, back, HOLD, states[about - 1 :], actions[about - 1 :])
    return Track(states), actions


def make_walk(world: World, kind: WalkKind, seed: int, frames: int) -> Walk:
    """A walk of `frames` frames from a spawn that the seed chooses.

    free: exploration. there_and_back: out, about-turn, back along the same path. loop: rounds of
    at most 120 frames. pan: looking left and right from one spot. retrace: 221 frames of bank, then
    revisits (see `decmem.world.retrace`). train: the training law. still: 221 frames of the free
    walk, then nothing. Raises `UserError` for an unknown kind or too few frames.
    """
    if kind not in WALK_KINDS:
        raise UserError("walk", f"unknown walk '{kind}'", f"choose one of {', '.join(WALK_KINDS)}")
    if frames < 1:
        raise UserError("frames", f"got {frames}, expected at least 1", "ask for more frames")
    details: dict[str, Any] = {}
    if kind == "retrace":
        walked, actions, tries = retrace_walk(world, seed, frames)
        details = {"bank_frames": BANK, "tries": tries}
    elif kind == "train":
        walked, actions = train_walk(world, seed, frames)
    else:
        walked, actions = _whole_walk(world, kind, seed, frames)
    provenance = {
        "world_version": WORLD_VERSION,
        "world_seed": world.seed,
        "walk": kind,
        "walk_seed": seed,
        "action_schema": ACTION_SCHEMA,
        **details,
    }
    return Walk(action_values(actions), walked, provenance)
