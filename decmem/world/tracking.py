"""Tracking: legal actions that keep a player near a moving target pose."""

import math

import numpy as np

from decmem.world.actions import ACTION_FIELDS, FORWARD, JUMP, PITCH, RIGHT, SPRINT, YAW
from decmem.world.angles import CIRCLE, COSINE, SINE, SINE_BITS
from decmem.world.compiled import compiled
from decmem.world.motion import WALK

_FULL = ACTION_FIELDS[FORWARD].steps
_TURN_LIMIT = int(ACTION_FIELDS[YAW].high * ACTION_FIELDS[YAW].steps)
PHASE = 256
"""Steps of the position along a recorded path per frame."""
_SPAN = 6
"""Frames before and after over which the direction of a path is taken."""


@compiled
def half_turn(angle):
    """An angle brought into [-180, 180) degrees."""
    return (angle + CIRCLE // 2) % CIRCLE - CIRCLE // 2


@compiled
def pose_on_path(states, first, last, phase, lateral, turn, tilt, target):
    """Write into `target` (x, z, yaw, pitch) the pose at `phase` (1/256 frame) of a path.

    states (F, 8): the path, of which rows first..last may be used; lateral: offset to the right of
    the path's direction; turn, tilt: added to yaw and pitch.
    """
    row = min(max(phase >> 8, first), last)
    rest = phase & 255
    following = min(row + 1, last)
    for axis in (0, 2):
        step = states[following, axis] - states[row, axis]
        target[axis >> 1] = states[row, axis] + ((step * rest) >> 8)
    target[2] = states[row, 3] + (((states[following, 3] - states[row, 3]) * rest) >> 8) + turn
    target[3] = states[row, 4] + (((states[following, 4] - states[row, 4]) * rest) >> 8) + tilt
    early, late = max(row - _SPAN, first), min(row + _SPAN, last)
    dx = states[late, 0] - states[early, 0]
    dz = states[late, 2] - states[early, 2]
    if dx * dx + dz * dz < 100 * 100:
        yaw = states[row, 3] % CIRCLE
        dx, dz = SINE[yaw] >> (SINE_BITS - 10), -COSINE[yaw] >> (SINE_BITS - 10)
    length = _root(dx * dx + dz * dz)
    target[0] -= dz * lateral // length
    target[1] += dx * lateral // length


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
def track(state, target, action):
    """Write into `action` (6,) the whole steps that bring `state` (8,) closest to `target` (4,).

    Returns the distance that was to be covered, in position units.
    """
    turn = min(max(half_turn(target[2] - state[3]), -_TURN_LIMIT), _TURN_LIMIT)
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
