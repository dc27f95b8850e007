"""The training law: exploration mixed with going back, so that revisits are everywhere.

What a model learns of memory comes from the walks (a finding of the feasibility study), so this
law undoes and redoes older stretches often, at all gaps from 12 to 230 frames; mostly *near* the
old path, not on it, since an exact retrace can be answered by copying.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from decmem.world.actions import A
from decmem.world.angles import EIGHTHS
from decmem.world.compiled import compiled
from decmem.world.exploration import PLAN, explore
from decmem.world.grid import World
from decmem.world.hashing import draw, stream
from decmem.world.motion import STATE, UNIT, Track, advance
from decmem.world.spawn import choose_spawn
from decmem.world.tracking import PHASE, pose_on_path, track

_SALT = 700
_LOST = 3 * UNIT // 2
"""A player this far from the path tracked gives it up."""
_LATERAL = 6 * UNIT // 5
_ASIDE = 20 * EIGHTHS
_JOIN = 3 * UNIT // 2
_EASE_LATERAL = 70
_EASE_TURN = 3 * EIGHTHS // 2


@compiled
def _eased(value, target, change):
    return value + min(max(target - value, -change), change)


@compiled
def _older_visit(states, now, rng):
    """A random earlier row, at least 24 frames old, whose place is close to the present; or -1."""
    found = -1
    count = 0
    for row in range(now - 24):
        near = (
            abs(states[row, 0] - states[now, 0]) < _JOIN
            and abs(states[row, 2] - states[now, 2]) < _JOIN
            and abs(states[row, 1] - states[now, 1]) < _JOIN
        )
        if near:
            count += 1
            if draw(rng, count) == 0:
                found = row
    return found


@compiled
def _walk(cells, start, seed, states, actions):
    """Fill states (F, 8) and actions (F, 6), in whole steps, of one training walk."""
    frames = len(states)
    rng = np.array([stream(seed, _SALT)], np.uint64)
    plan = np.zeros(PLAN, np.int64)
    target = np.zeros(4, np.int64)
    lateral = turn = tilt = 0
    left = 20 + draw(rng, 30)
    tracking = False
    first = last = phase = pace = 0
    to_lateral = to_turn = to_tilt = 0
    states[0] = start
    actions[0] = 0
    for now in range(frames - 1):
        if left <= 0:
            choice = draw(rng, 100)
            tracking = choice < 62 and now > 24
            left = 16 + draw(rng, 34)
            if tracking:
                first, last = 0, now
                stretch = 12 + draw(rng, 99)
                direction = -1
                begin = now
                if choice >= 40:
                    visit = _older_visit(states, now, rng)
                    if visit >= 0:
                        begin = visit
                        direction = 1 - 2 * draw(rng, 2)
                if direction < 0:
                    first = max(begin - stretch, 0)
                else:
                    last = min(begin + stretch, now)
                exact = draw(rng, 4) == 0
                pace = direction * (
                    PHASE if exact else PHASE * 7 // 10 + draw(rng, PHASE * 7 // 10)
                )
                phase = begin * PHASE
                left = max((stretch * PHASE) // abs(pace), 1)
                to_lateral = 0 if exact else draw(rng, 2 * _LATERAL + 1) - _LATERAL
                to_turn = 0 if exact else draw(rng, 2 * _ASIDE + 1) - _ASIDE
                to_tilt = 0 if exact else (draw(rng, 2 * _ASIDE + 1) - _ASIDE) // 2
                lateral = 0
                turn = 0
                tilt = 0
            else:
                plan[:] = 0
        left -= 1
        state, action = states[now], actions[now + 1]
        if tracking:
            phase += pace
            if phase < first * PHASE or phase > last * PHASE:
                left = 0
            lateral = _eased(lateral, to_lateral, _EASE_LATERAL)
            turn = _eased(turn, to_turn, _EASE_TURN)
            tilt = _eased(tilt, to_tilt, _EASE_TURN)
            pose_on_path(states, first, last, phase, lateral, turn, tilt, target)
            if track(state, target, action) > _LOST:
                left = 0
        else:
            explore(cells, state, plan, rng, action)
        advance(cells, state, action, states[now + 1])


def train_walks(
    worlds: World | Sequence[World], seeds: Sequence[int], frames: int
) -> tuple[Int64[np.ndarray, "walks F 8"], Int64[np.ndarray, "walks F A"]]:
    """Training walks, one per seed: player states and actions in whole steps (`Track`,
    `action_values` give poses and float actions).

    worlds: one for all, or one per seed. A walk depends on its world and seed alone.
    """
    several = [worlds] * len(seeds) if isinstance(worlds, World) else worlds
    states = np.empty((len(seeds), frames, STATE), np.int64)
    actions = np.empty((len(seeds), frames, A), np.int64)
    for number, (world, seed) in enumerate(zip(several, seeds, strict=True)):
        start = np.array(choose_spawn(world, seed), np.int64)
        _walk(world.cells, start, seed, states[number], actions[number])
    return states, actions


def train_walk(world: World, seed: int, frames: int) -> tuple[Track, Int64[np.ndarray, "F A"]]:
    """One training walk."""
    states, actions = train_walks(world, [seed], frames)
    return Track(states[0]), actions[0]
