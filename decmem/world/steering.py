"""Looking ahead: how far a player could walk in a direction."""

from decmem.world.angles import CIRCLE, COSINE, EIGHTHS, SINE, SINE_BITS
from decmem.world.compiled import compiled
from decmem.world.motion import UNIT, blocked, in_water, support

STRIDES = 2
"""Probing strides per block."""
_CLIMB = UNIT + 700


@compiled
def free_path(cells, x, y, z, yaw, strides):
    """How many half-block strides, at most `strides`, lead on from feet at (x, y, z) along `yaw`
    over steps of one block up or down: ground that can also be walked the other way.
    """
    dx = SINE[yaw % CIRCLE] >> (SINE_BITS - 9)
    dz = -COSINE[yaw % CIRCLE] >> (SINE_BITS - 9)
    wet = in_water(cells, x, y, z)
    for stride in range(strides):
        x += dx
        z += dz
        rise = _CLIMB if wet else UNIT
        floor = support(cells, x, y - _CLIMB - 1, z, y + rise)
        if floor < y - _CLIMB or blocked(cells, x, max(floor, y), z) or blocked(cells, x, floor, z):
            return stride
        wet = in_water(cells, x, floor, z)
        if floor < y - UNIT and not wet:
            return stride
        y = floor
    return strides


@compiled
def freer_side(cells, x, y, z, yaw):
    """1 if there is more room to the right of `yaw` than to the left, else -1."""
    left = right = 0
    for angle in (35, 70):
        right += free_path(cells, x, y, z, yaw + angle * EIGHTHS, 10)
        left += free_path(cells, x, y, z, yaw - angle * EIGHTHS, 10)
    return 1 if right >= left else -1
