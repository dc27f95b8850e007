"""Tracking: legal actions that keep a player near a recorded path, or aside of it."""

import math

import numpy as np

from decmem.world.actions import ACTION_FIELDS, FORWARD, JUMP, PITCH, RIGHT, SPRINT, YAW
from decmem.world.angles import CIRCLE, COSINE, EIGHTHS, SINE, SINE_BITS
from decmem.world.compiled import compiled
from decmem.world.motion import WALK, advance

_FULL = ACTION_FIELDS[FORWARD].steps
_TURN_LIMIT = int(ACTION_FIELDS[YAW].high * ACTION_FIELDS[YAW].steps)
PHASE = 256
"""Steps of the position along a recorded path per frame."""
# The memory between frames of one who follows a path: the place on it (in PHASE steps) and its
# change per frame; how far aside, turned and tilted, and where these are heading; whether an end of
# the path has been reached.
PLACE, PACE, LATERAL, TURN, TILT, TO_LATERAL, TO_TURN, TO_TILT, ARRIVED = range(9)
MIND = 9

HOLD, STOP, BOUNCE, ROUND = range(4)
"""What to do at a path's ends: stay there, end the walk, turn back, go on at the other end."""
ANYWHERE = 1 << 60

_EASE_LATERAL = 70
_EASE_TURN = 3 * EIGHTHS // 2
_SPAN = 6
"""Frames before and after over which the direction of a path is taken."""


@compiled
def _half_turn(angle):
    """An angle brought into [-180, 180) degrees."""
    return (angle + CIRCLE // 2) % CIRCLE - CIRCLE // 2


@compiled
def _pose_on_path(states, mind, target):
    """Write into `target` (x, z, yaw, pitch) the pose at a place of the path `states` (P, 8)."""
    last = len(states) - 1
    row = min(max(mind[PLACE] >> 8, 0), last)
    rest = mind[PLACE] & 255 if mind[PLACE] > 0 else 0
    following = min(row + 1, last)
    for axis in (0, 2):
        step = states[following, axis] - states[row, axis]
        target[axis >> 1] = states[row, axis] + ((step * rest) >> 8)
    target[2] = (
        states[row, 3] + (((states[following, 3] - states[row, 3]) * rest) >> 8) + mind[TURN]
    )
    target[3] = (
        states[row, 4] + (((states[following, 4] - states[row, 4]) * rest) >> 8) + mind[TILT]
    )
    early, late = max(row - _SPAN, 0), min(row + _SPAN, last)
    dx = states[late, 0] - states[early, 0]
    dz = states[late, 2] - states[early, 2]
    if dx * dx + dz * dz < 100 * 100:
        yaw = states[row, 3] % CIRCLE
        dx, dz = SINE[yaw] >> (SINE_BITS - 10), -COSINE[yaw] >> (SINE_BITS - 10)
    length = _root(dx * dx + dz * dz)
    target[0] -= dz * mind[LATERAL] // length
    target[1] += dx * mind[LATERAL] // length


@compiled
def _root(value):
    """The whole square root, rounded down."""
    root = np.int64(math.sqrt(np.float64(value)))
    while root * root > value:
        root -= 1
    while (root + 1) * (root + 1) <= value:
        root += 1
    return max(root, 1)


@compiled
def _track(state, target, action):
    """Write into `action` (6,) the whole steps that bring `state` (8,) closest to `target` (4,).

    Returns the distance that was to be covered, in position units.
    """
    turn = min(max(_half_turn(target[2] - state[3]), -_TURN_LIMIT), _TURN_LIMIT)
    tilt = min(max(target[3] - state[4], -_TURN_LIMIT), _TURN_LIMIT)
    yaw = (state[3] + turn) % CIRCLE
    dx, dz = target[0] - state[0], target[1] - state[2]
    sine, cosine = SINE[yaw] >> (SINE_BITS - 20), COSINE[yaw] >> (SINE_BITS - 20)
    forward = (dx * sine - dz * cosine) >> 14
    right = (dx * cosine + dz * sine) >> 14
    reach = max(abs(forward), abs(right))
    sprint = reach > WALK * 64
    speed = WALK * 3 // 2 if sprint else WALK
    action[FORWARD] = min(max((forward + speed // 2) // speed, -_FULL), _FULL)
    action[RIGHT] = min(max((right + speed // 2) // speed, -_FULL), _FULL)
    action[YAW], action[PITCH] = turn, tilt
    action[JUMP] = 0
    action[SPRINT] = sprint
    return _root(dx * dx + dz * dz)


@compiled
def _eased(value, target, change):
    return value + min(max(target - value, -change), change)


@compiled
def follow(cells, path, mind, ends, lost, states, actions, begin, end):
    """Fill rows begin..end-1 of states (F, 8) and actions (F, 6) with a walk along `path` (P, 8).

    mind (MIND,): the follower's memory; ends: HOLD, STOP, BOUNCE or ROUND. Returns the first row
    not filled: `end`, or earlier at the path's end (STOP) or once farther than `lost` from it.
    """
    target = np.zeros(4, np.int64)
    reach = (len(path) - 1) * PHASE
    for now in range(begin, end):
        mind[PLACE] += mind[PACE]
        outside = mind[PLACE] < 0 or mind[PLACE] > reach
        if outside:
            mind[ARRIVED] = 1
            if ends == BOUNCE:
                mind[PACE] = -mind[PACE]
                mind[PLACE] += 2 * mind[PACE]
            elif ends == ROUND:
                mind[PLACE] %= len(path) * PHASE
        mind[LATERAL] = _eased(mind[LATERAL], mind[TO_LATERAL], _EASE_LATERAL)
        mind[TURN] = _eased(mind[TURN], mind[TO_TURN], _EASE_TURN)
        mind[TILT] = _eased(mind[TILT], mind[TO_TILT], _EASE_TURN)
        _pose_on_path(path, mind, target)
        missed = _track(states[now - 1], target, actions[now])
        advance(cells, states[now - 1], actions[now], states[now])
        if missed > lost or (outside and ends == STOP):
            return now + 1
    return end
