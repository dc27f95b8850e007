"""The training law: exploration mixed with going back, so that revisits are everywhere.

What a model learns of memory comes from the walks (a finding of the feasibility study), so this
law undoes and redoes older stretches often, at all gaps from 12 to 230 frames; mostly *near* the
old path, not on it, since an exact retrace can be answered by copying. Its walks hardly ever stop,
so what stands still is mixed in where asked (`stills`).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from decmem.errors import UserError
from decmem.world.actions import A
from decmem.world.angles import EIGHTHS
from decmem.world.exploration import PLAN, explore
from decmem.world.grid import World
from decmem.world.hashing import draw, stream
from decmem.world.motion import STATE, UNIT, Track, stand
from decmem.world.spawn import choose_spawn
from decmem.world.tracking import (
    MIND,
    PACE,
    PHASE,
    PLACE,
    STOP,
    TO_LATERAL,
    TO_TILT,
    TO_TURN,
    follow,
)

_SALT = 700
_LOST = 3 * UNIT // 2
"""A player this far from the path tracked gives it up."""
_LATERAL = 6 * UNIT // 5
_TURNED = 20 * EIGHTHS
_JOIN = 3 * UNIT // 2
"""An older stretch is taken up from this close, along each axis."""
_UNDO, _REDO = 40, 22
"""How often, in 100, a stretch of the walk is one of these; else it is exploration."""
MOST_STILLS = 100 - _UNDO - _REDO
"""How often, in 100, a stretch may stand still at most: stills take the place of exploration."""
_LEAST_STILL, _STILL_SPAN = 12, 169
"""Stills last 12 to 180 frames: the long ones fill every local window several times over."""


def _older_visit(states: np.ndarray, now: int, rng: np.ndarray) -> int | None:
    """A random earlier row, at least 24 frames old, whose place is close to the present."""
    near = (abs(states[: now - 24, :3] - states[now, :3]) < _JOIN).all(1)
    rows = np.flatnonzero(near)
    return int(rows[draw(rng, len(rows))]) if len(rows) else None


def _return(
    states: np.ndarray, now: int, redo: bool, rng: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Choose an older stretch to walk again: its path, the follower's memory, and for how long.

    Undoing goes back from the present; redoing takes up an older stretch that passes here.
    """
    begin, direction = now, -1
    stretch = 12 + draw(rng, 99)
    visit = _older_visit(states, now, rng) if redo else None
    if visit is not None:
        begin, direction = visit, 1 - 2 * draw(rng, 2)
    first = max(begin - stretch, 0) if direction < 0 else begin
    last = begin if direction < 0 else min(begin + stretch, now)
    mind = np.zeros(MIND, np.int64)
    mind[PLACE] = (begin - first) * PHASE
    mind[PACE] = direction * PHASE
    if draw(rng, 4) > 0:
        mind[PACE] = direction * (PHASE * 7 // 10 + draw(rng, PHASE * 7 // 10))
        mind[TO_LATERAL] = draw(rng, 2 * _LATERAL + 1) - _LATERAL
        mind[TO_TURN] = draw(rng, 2 * _TURNED + 1) - _TURNED
        mind[TO_TILT] = (draw(rng, 2 * _TURNED + 1) - _TURNED) // 2
    frames = max(stretch * PHASE // abs(int(mind[PACE])), 1)
    return states[first : last + 1].copy(), mind, frames


def _walk(
    cells: np.ndarray, seed: int, stills: int, states: np.ndarray, actions: np.ndarray
) -> None:
    """Fill states (F, 8) after the first and actions (F, 6), in whole steps, of one walk."""
    rng = np.array([stream(seed, _SALT)], np.uint64)
    row = 1
    end = min(21 + draw(rng, 30), len(states))
    explore(cells, np.zeros(PLAN, np.int64), rng, states, actions, row, end)
    row = end
    while row < len(states):
        choice = draw(rng, 100)
        if choice < _UNDO + _REDO and row > 24:
            path, mind, frames = _return(states, row - 1, choice >= _UNDO, rng)
            end = min(row + frames, len(states))
            row = follow(cells, path, mind, STOP, _LOST, states, actions, row, end)
        elif choice >= 100 - stills:
            end = min(row + _LEAST_STILL + draw(rng, _STILL_SPAN), len(states))
            stand(cells, states, actions, row, end)
            row = end
        else:
            end = min(row + 16 + draw(rng, 34), len(states))
            explore(cells, np.zeros(PLAN, np.int64), rng, states, actions, row, end)
            row = end


def train_walks(
    worlds: World | Sequence[World], seeds: Sequence[int], frames: int, stills: int = 0
) -> tuple[Int64[np.ndarray, "walks F 8"], Int64[np.ndarray, "walks F A"]]:
    """Training walks, one per seed: player states and actions in whole steps (`Track`,
    `action_values` give poses and float actions).

    worlds: one for all, or one per seed. A walk depends on its world, its seed and `stills` alone.
    stills: how often, in 100, a stretch of a walk stands still, up to `MOST_STILLS`; without them
    walks are those of kind ``train``. Raises `UserError` for a share out of reach.
    """
    if not 0 <= stills <= MOST_STILLS:
        raise UserError(
            "stills", f"{stills} of 100 stretches", f"give 0 to {MOST_STILLS}: others are returns"
        )
    several = [worlds] * len(seeds) if isinstance(worlds, World) else worlds
    states = np.zeros((len(seeds), frames, STATE), np.int64)
    actions = np.zeros((len(seeds), frames, A), np.int64)
    for number, (world, seed) in enumerate(zip(several, seeds, strict=True)):
        states[number, 0] = choose_spawn(world, seed)
        _walk(world.cells, seed, stills, states[number], actions[number])
    return states, actions


def train_walk(world: World, seed: int, frames: int) -> tuple[Track, Int64[np.ndarray, "F A"]]:
    """One training walk."""
    states, actions = train_walks(world, [seed], frames)
    return Track(states[0]), actions[0]
