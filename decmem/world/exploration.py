"""Exploring: short segments of walking, strafing, looking around, kept clear of walls."""

import numpy as np

from decmem.world.actions import ACTION_FIELDS, FORWARD, JUMP, PITCH, RIGHT, SPRINT, YAW
from decmem.world.angles import EIGHTHS
from decmem.world.compiled import compiled
from decmem.world.hashing import draw
from decmem.world.motion import advance
from decmem.world.steering import free_path, freer_side

FULL = ACTION_FIELDS[FORWARD].steps
_RATES = np.array([0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5], np.int64) * EIGHTHS
_PAN_RATES = np.array([2, 3, 3, 4, 6], np.int64) * EIGHTHS
_YAW_CHANGE = 2 * EIGHTHS
_PITCH_CHANGE = EIGHTHS
_PITCH_RATE = 2 * EIGHTHS
_NEAR = 3
_CLOSE = 7

# The memory between frames of one explorer.
LEFT, AHEAD, ASIDE, TURN, TILT, RUN, HOP, TURNING, TILTING, DODGE = range(10)
PLAN = 10


@compiled
def _new_segment(plan, rng):
    """Draw what to do for the next 4 to 22 frames."""
    plan[LEFT] = 4 + draw(rng, 19)
    kind = draw(rng, 100)
    plan[AHEAD] = plan[ASIDE] = plan[RUN] = 0
    sign = 1 - 2 * draw(rng, 2)
    plan[TURN] = sign * _RATES[draw(rng, len(_RATES))]
    if kind < 62:
        plan[AHEAD] = FULL if draw(rng, 4) else FULL * 3 // 4
        plan[RUN] = draw(rng, 100) < 12
        if draw(rng, 6) == 0:
            plan[ASIDE] = (1 - 2 * draw(rng, 2)) * FULL // 2
    elif kind < 72:
        plan[ASIDE] = (1 - 2 * draw(rng, 2)) * FULL
        plan[TURN] //= 2
    elif kind < 76:
        plan[AHEAD] = -FULL * 3 // 4
    else:
        plan[TURN] = sign * _PAN_RATES[draw(rng, len(_PAN_RATES))]
    plan[TILT] = (draw(rng, 41) - 24) * EIGHTHS
    plan[HOP] = draw(rng, 100) < 4


@compiled
def _toward(value, target, change):
    return value + min(max(target - value, -change), change)


@compiled
def _decide(cells, state, plan, rng, action):
    """Write into `action` (6,), in whole steps, what an explorer in `state` (8,) does next."""
    if plan[LEFT] <= 0:
        _new_segment(plan, rng)
    plan[LEFT] -= 1
    x, y, z, yaw, pitch = state[0], state[1], state[2], state[3], state[4]
    ahead, aside, turn, run = plan[AHEAD], plan[ASIDE], plan[TURN], plan[RUN]

    view = free_path(cells, x, y, z, yaw, 10)
    if view >= _CLOSE:
        plan[DODGE] = 0
    elif plan[DODGE] == 0:
        plan[DODGE] = freer_side(cells, x, y, z, yaw)
    if plan[DODGE] != 0:
        turn = plan[DODGE] * (6 if view <= _NEAR else 4) * EIGHTHS
        run = 0
        if view <= _NEAR:
            ahead = min(ahead, FULL // 4 if view > 1 else -FULL // 4)
    if aside != 0 or ahead < 0:
        side = 90 * EIGHTHS if aside > 0 else -90 * EIGHTHS if aside < 0 else 180 * EIGHTHS
        if free_path(cells, x, y, z, yaw + side, 4) < 3:
            aside = 0
            ahead = max(ahead, 0)

    plan[TURNING] = _toward(plan[TURNING], turn, _YAW_CHANGE)
    wanted = min(max((plan[TILT] - pitch) // 4, -_PITCH_RATE), _PITCH_RATE)
    plan[TILTING] = _toward(plan[TILTING], wanted, _PITCH_CHANGE)
    action[FORWARD], action[RIGHT] = ahead, aside
    action[YAW], action[PITCH] = plan[TURNING], plan[TILTING]
    action[JUMP] = plan[HOP]
    action[SPRINT] = run
    plan[HOP] = 0


@compiled
def explore(cells, plan, rng, states, actions, begin, end):
    """Fill rows begin..end-1 of states (F, 8) and actions (F, 6) with exploration.

    plan (PLAN,) int64, zero at first, and rng (1,) uint64 are the explorer's memory.
    """
    for now in range(begin, end):
        _decide(cells, states[now - 1], plan, rng, actions[now])
        advance(cells, states[now - 1], actions[now], states[now])
