"""From actions to motion: the one law of walking, in whole numbers.

Positions are in 1/1024 block, angles in 1/8 degree, speeds in 1/1024 block per frame, so a walk
is the same on every machine. The player is a box 0.6 wide and 1.8 high with eyes at 1.62.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64

from decmem.world.actions import FORWARD, JUMP, PITCH, RIGHT, SPRINT, YAW, quantise_actions
from decmem.world.angles import CIRCLE, COSINE, EIGHTHS, SINE, SINE_BITS
from decmem.world.blocks import SHAPES, Shape
from decmem.world.camera import rigid
from decmem.world.compiled import compiled
from decmem.world.grid import BLOCK_MASK, HEIGHT, SIZE, World

UNIT = 1024
"""Position units per block."""
WALK = 307
"""Walking speed: 0.30 block per frame."""
PITCH_LIMIT = 60 * EIGHTHS

_EYE = 1659
_TALL = 1843
_HALF_WIDE = 307
_STEP_UP = UNIT
_CLIMB_OUT = UNIT + 700
"""What a wading player can step up."""
_WATER_FLOOR = 410
"""A wading player stands this high in a water block: the eye stays above the surface."""
_JUMP = 492
_GRAVITY = 112
_FALL_LIMIT = 614
_EASE_SLOW = 200
_EASE_FAST = 307
"""The eye catches up with a step by 0.2 to 0.3 block a frame."""
_LIFT_LIMIT = 1126
_CUBE = int(Shape.CUBE)
_WATER = int(Shape.WATER)
_SINE_ONE = 1 << SINE_BITS


class PlayerState(NamedTuple):
    """A player: feet (x, y, z), yaw and pitch, upward speed, how far the eye lags behind a step
    (`lift`, added to its height), and whether the feet touch the ground. Integers, module units.
    """

    x: int
    y: int
    z: int
    yaw: int
    pitch: int
    rise: int = 0
    lift: int = 0
    grounded: int = 1


STATE = len(PlayerState._fields)


@dataclass(frozen=True)
class Track:
    """States (F, 8) int64 in the order of `PlayerState`, and the cameras they see through."""

    states: Int64[np.ndarray, "F 8"]

    @property
    def world_to_camera(self) -> Float64[np.ndarray, "F 4 4"]:
        """World-to-camera matrices in blocks."""
        return state_cameras(self.states)


def state_cameras(states: Int64[np.ndarray, "*batch 8"]) -> Float64[np.ndarray, "*batch 4 4"]:
    """World-to-camera matrices of player states."""
    eye = states[..., :3].astype(np.float64)
    eye[..., 1] += _EYE + states[..., 6]
    yaw, pitch = states[..., 3] % CIRCLE, states[..., 4] % CIRCLE
    tables = (SINE[yaw], COSINE[yaw], SINE[pitch], COSINE[pitch])
    return rigid(eye / UNIT, *(table / _SINE_ONE for table in tables))


@compiled
def _solid_height(cells, x, y, z):
    """How much of the block at (x, y, z) is solid, in position units from its floor."""
    if y < 0:
        return UNIT
    if y >= HEIGHT:
        return 0
    shape = SHAPES[cells[x & (SIZE - 1), z & (SIZE - 1), y] & BLOCK_MASK]
    if shape == _CUBE:
        return UNIT
    return _WATER_FLOOR if shape == _WATER else 0


@compiled
def support(cells, x, y, z, top):
    """The highest solid surface between heights `y` - and `top` under or in the player's box.

    Looks at the columns under the box at (x, z), from block height `top` downwards to `y`, and
    returns the height of the first surface found, or `y` if there is none.
    """
    best = y
    for bx in range((x - _HALF_WIDE) >> 10, ((x + _HALF_WIDE - 1) >> 10) + 1):
        for bz in range((z - _HALF_WIDE) >> 10, ((z + _HALF_WIDE - 1) >> 10) + 1):
            for by in range(top >> 10, (y >> 10) - 1, -1):
                height = _solid_height(cells, bx, by, bz)
                if height > 0 and by * UNIT + height <= top:
                    best = max(best, by * UNIT + height)
                    break
    return best


@compiled
def blocked(cells, x, y, z):
    """Whether the player's box with feet at (x, y, z) cuts into anything solid."""
    for bx in range((x - _HALF_WIDE) >> 10, ((x + _HALF_WIDE - 1) >> 10) + 1):
        for bz in range((z - _HALF_WIDE) >> 10, ((z + _HALF_WIDE - 1) >> 10) + 1):
            for by in range(y >> 10, ((y + _TALL - 1) >> 10) + 1):
                height = _solid_height(cells, bx, by, bz)
                if height > 0 and y < by * UNIT + height:
                    return True
    return False


@compiled
def displacement(yaw, forward, right, sprint):
    """Steps along x and z, in position units, of a frame's controls (whole action steps)."""
    sine = SINE[yaw % CIRCLE]
    cosine = COSINE[yaw % CIRCLE]
    speed = WALK * 3 // 2 if sprint else WALK
    half = 1 << (SINE_BITS + 5)
    dx = (speed * (forward * sine + right * cosine) + half) >> (SINE_BITS + 6)
    dz = (speed * (right * sine - forward * cosine) + half) >> (SINE_BITS + 6)
    return dx, dz


@compiled
def _slide(cells, x, y, z, dx, dz, limit):
    """Move the box along one axis: freely, up a step of at most `limit`, or to the contact.

    Returns the new x, y, z.
    """
    if dx == 0 and dz == 0:
        return x, y, z
    if not blocked(cells, x + dx, y, z + dz):
        return x + dx, y, z + dz
    if limit > 0:
        top = support(cells, x + dx, y, z + dz, y + limit)
        clear = not blocked(cells, x, top, z) and not blocked(cells, x + dx, top, z + dz)
        if top > y and clear:
            return x + dx, top, z + dz
    if dx > 0:
        x = max(x, ((((x + _HALF_WIDE - 1) >> 10) + 1) << 10) - _HALF_WIDE)
    elif dx < 0:
        x = min(x, (((x - _HALF_WIDE) >> 10) << 10) + _HALF_WIDE)
    elif dz > 0:
        z = max(z, ((((z + _HALF_WIDE - 1) >> 10) + 1) << 10) - _HALF_WIDE)
    else:
        z = min(z, (((z - _HALF_WIDE) >> 10) << 10) + _HALF_WIDE)
    return x, y, z


@compiled
def in_water(cells, x, y, z):
    return SHAPES[cells[(x >> 10) & (SIZE - 1), (z >> 10) & (SIZE - 1), y >> 10] & BLOCK_MASK] == (
        _WATER
    )


@compiled
def advance(cells, before, action, after):
    """One frame: write into `after` the state (8,) that an action (6,) in whole steps leads to."""
    x, y, z = before[0], before[1], before[2]
    rise, lift, grounded = before[5], before[6], before[7]
    yaw = before[3] + action[YAW]
    pitch = min(max(before[4] + action[PITCH], -PITCH_LIMIT), PITCH_LIMIT)

    dx, dz = displacement(yaw, action[FORWARD], action[RIGHT], action[SPRINT])
    limit = 0
    if grounded:
        limit = _CLIMB_OUT if in_water(cells, x, y, z) else _STEP_UP
    old_y = y
    x, y, z = _slide(cells, x, y, z, dx, 0, limit)
    x, y, z = _slide(cells, x, y, z, 0, dz, limit)
    lift -= y - old_y

    if grounded and action[JUMP]:
        rise = _JUMP
        grounded = 0
    elif grounded:
        rise = 0
        ground = support(cells, x, y - UNIT - 1, z, y)
        if ground >= y - UNIT:
            lift += y - ground
            y = ground
        else:
            grounded = 0
    if not grounded:
        if rise > 0:
            if blocked(cells, x, y + rise, z):
                rise = 0
            y += rise
        else:
            ground = support(cells, x, y + rise, z, y)
            if rise < 0 and ground > y + rise:
                grounded = 1
                rise = 0
                y = ground
            else:
                y += rise
        if not grounded:
            rise = max(rise - _GRAVITY, -_FALL_LIMIT)

    ease = min(max(abs(lift) * 3 // 8, _EASE_SLOW), _EASE_FAST)
    lift = max(lift - ease, 0) if lift > 0 else min(lift + ease, 0)
    lift = min(max(lift, -_LIFT_LIMIT), _LIFT_LIMIT)
    after[0], after[1], after[2], after[3], after[4] = x, y, z, yaw, pitch
    after[5], after[6], after[7] = rise, lift, grounded


@compiled
def stand(cells, states, actions, begin, end):
    """Fill rows begin..end-1 of states (F, 8) and actions (F, 6) with doing nothing.

    One who is in the air falls first.
    """
    for now in range(begin, end):
        actions[now] = 0
        advance(cells, states[now - 1], actions[now], states[now])


@compiled
def run(cells, start, actions):
    """States (F, 8): the start, then one per later row of `actions` (F, 6)."""
    states = np.empty((len(actions), len(start)), np.int64)
    states[0] = start
    for frame in range(1, len(actions)):
        advance(cells, states[frame - 1], actions[frame], states[frame])
    return states


def step(world: World, state: PlayerState, action: Float32[np.ndarray, " A"]) -> PlayerState:
    """The state one frame later. `action` (6,) must be valid (`validate_actions`)."""
    after = np.empty(STATE, np.int64)
    whole = quantise_actions(np.asarray(action, np.float32))
    advance(world.cells, np.array(state, np.int64), whole, after)
    return PlayerState(*(int(value) for value in after))


def simulate(world: World, start: PlayerState, actions: Float32[np.ndarray, "F A"]) -> Track:
    """Walk: frame 0 is the start (actions[0] is not applied), frame t what actions[t] made of it.

    `actions` must be valid (`validate_actions`).
    """
    return Track(run(world.cells, np.array(start, np.int64), quantise_actions(actions)))
