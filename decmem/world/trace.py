"""One ray to one colour: the function that every backend compiles, in float32."""

import math

import numpy as np

from decmem.world.compiled import compiled
from decmem.world.grid import BLOCK_MASK, SIZE
from decmem.world.marching import NOTHING, march
from decmem.world.shading import REACH, shade
from decmem.world.sky import sky

_WRAP = np.int32(SIZE - 1)


@compiled
def trace(buffer, base, pictures, x, y, z, fx, fy, fz, dx, dy, dz, spread):
    """Look from the point (fx, fy, fz) of cell (x, y, z) in a direction whose depth is one.

    buffer[base:]: a world's buffer; spread: width of a sample at depth one, in blocks. Returns
    red, green, blue (float32, 0 to 255), depth (infinite for sky) and block number (0 for sky).
    """
    length = np.float32(math.sqrt(dx * dx + dy * dy + dz * dz))
    t, i, j, k, face = march(
        buffer, base, pictures, x, y, z, fx, fy, fz, dx, dy, dz, REACH / length, spread
    )
    if face == NOTHING:
        red, green, blue = sky(pictures, dx, dy, dz, length)
        return red, green, blue, np.float32(math.inf), np.int32(0)
    u = fx + t * dx - np.float32(i)
    v = fy + t * dy - np.float32(j)
    w = fz + t * dz - np.float32(k)
    x = np.int32((x + i) & _WRAP)
    y = np.int32(y + j)
    z = np.int32((z + k) & _WRAP)
    red, green, blue = shade(
        buffer, base, pictures, x, y, z, face, u, v, w, t, dx, dy, dz, length, spread
    )
    block = np.int32(buffer[np.uint64(base + (((x << 8 | z) << 6) | y))] & BLOCK_MASK)
    return red, green, blue, t, block
