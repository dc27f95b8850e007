"""The march of a ray through the cells: which surface it meets first, and where."""

import numpy as np

from decmem.world.blocks import SHAPES, Shape
from decmem.world.compiled import compiled
from decmem.world.grid import BLOCK_MASK, CEILING, HEIGHT, SIZE

_ZERO = np.float32(0)
_HALF = np.float32(0.5)
_ONE = np.float32(1)
_FAR = np.float32(1e30)
_PLANT = np.uint8(Shape.PLANT)
_WRAP = np.int32(SIZE - 1)

NOTHING = 7
"""Face of a ray that meets nothing. Others: 0 -x, 1 +x, 2 -y, 3 +y, 4 -z, 5 +z, 6 a plant."""


@compiled
def _plant_crossing(alpha, block, px, py, pz, dx, dy, dz):
    return _FAR


@compiled
def march(buffer, base, pictures, x, y, z, fx, fy, fz, dx, dy, dz, reach):
    """Follow a ray from the point (fx, fy, fz) of cell (x, y, z) for at most `reach` lengths.

    buffer[base:]: a world's buffer. Returns t (lengths of the direction), the cell met relative to
    the first one as three int32, and the face. The first cell itself is never met.
    """
    ceiling = np.int32(buffer[base + CEILING])
    ix = _ONE / abs(dx) if dx != _ZERO else _FAR
    iy = _ONE / abs(dy) if dy != _ZERO else _FAR
    iz = _ONE / abs(dz) if dz != _ZERO else _FAR
    sx = np.int32(1) if dx > _ZERO else np.int32(-1)
    sy = np.int32(1) if dy > _ZERO else np.int32(-1)
    sz = np.int32(1) if dz > _ZERO else np.int32(-1)
    tx = (_ONE - fx if dx > _ZERO else fx) * ix
    ty = (_ONE - fy if dy > _ZERO else fy) * iy
    tz = (_ONE - fz if dz > _ZERO else fz) * iz
    i = np.int32(0)
    j = np.int32(0)
    k = np.int32(0)
    face = np.int32(NOTHING)
    while True:
        if tx < tz and tx < ty:
            t = tx
            tx += ix
            i += sx
            face = np.int32(0) if sx > 0 else np.int32(1)
        elif tz < ty:
            t = tz
            tz += iz
            k += sz
            face = np.int32(4) if sz > 0 else np.int32(5)
        else:
            t = ty
            ty += iy
            j += sy
            face = np.int32(2) if sy > 0 else np.int32(3)
        if t > reach:
            break
        h = y + j
        if h < 0 or (h >= ceiling and sy > 0):
            break
        if h >= HEIGHT:
            continue
        cell = buffer[base + ((((((x + i) & _WRAP) << 8) | ((z + k) & _WRAP)) << 6) | h)]
        block = cell & np.uint8(BLOCK_MASK)
        if block != 0 and SHAPES[block] != _PLANT:
            return t, i, j, k, face
    return _FAR, i, j, k, np.int32(NOTHING)
