"""The march of a ray through the cells: which surface it meets first, and where."""

import numpy as np

from decmem.world.blocks import FIRST_PLANT
from decmem.world.compiled import compiled
from decmem.world.grid import BLOCK_MASK, CEILING, HEIGHT, HEIGHT_BITS, SIZE, SIZE_BITS
from decmem.world.pictures import face_texture, texel_at

_ZERO = np.float32(0)
_ONE = np.float32(1)
_BELOW_ONE = np.float32(0.99999)
_FAR = np.float32(1e30)
_OPAQUE = np.uint32(1 << 31)
_TEXTURE_SIDE = np.float32(16)
_FIRST_PLANT = np.uint8(FIRST_PLANT)
_BLOCK = np.uint8(BLOCK_MASK)
_Z_STEP = np.int32(1 << HEIGHT_BITS)
_X_STEP = np.int32(1 << (HEIGHT_BITS + SIZE_BITS))
_Z_MASK = np.int32((SIZE - 1) << HEIGHT_BITS)
_X_MASK = np.int32((SIZE - 1) << (HEIGHT_BITS + SIZE_BITS))
_HALF_WORLD = np.int32(SIZE // 2)

NOTHING = 7
"""Face of a ray that meets nothing. Others: 0 -x, 1 +x, 2 -y, 3 +y, 4 -z, 5 +z, 6 a plant."""
PLANT_FACE = 6


@compiled
def plant_level(footprint):
    """The mip level for a plant seen with samples that many texels wide: its log2 side."""
    return np.int32(4) if footprint < np.float32(1.5) else np.int32(3 if footprint < 3 else 2)


@compiled
def _leaf_hit(pictures, texture, footprint, u, v):
    """Whether the cut-out picture is there at u to the right and v up, both in cells."""
    if u < _ZERO or u >= _ONE or v < _ZERO or v >= _ONE:
        return False
    down = min(_ONE - v, _BELOW_ONE)
    return texel_at(pictures, texture, plant_level(footprint), u, down) >= _OPAQUE


@compiled
def _meet_plant(pictures, block, qx, qy, qz, dx, dy, dz, spread):
    """Where the ray meets the plant in a cell, or far away.

    (qx, qy, qz): the ray's origin in the cell's own coordinates.
    """
    texture = face_texture(pictures, block, 1)
    scale = _TEXTURE_SIDE * spread
    first = second = _FAR
    if dx != dz:
        t = (qz - qx) / (dx - dz)
        if t > _ZERO and _leaf_hit(pictures, texture, scale * t, qx + t * dx, qy + t * dy):
            first = t
    if dx != -dz:
        t = (_ONE - qx - qz) / (dx + dz)
        if t > _ZERO and _leaf_hit(pictures, texture, scale * t, qx + t * dx, qy + t * dy):
            second = t
    return min(first, second)


@compiled
def _from_start(cell, start):
    """Cells from `start` to `cell` along a periodic axis, the short way."""
    return np.int32(((cell - start + _HALF_WORLD) & (SIZE - 1)) - _HALF_WORLD)


@compiled
def march(buffer, base, pictures, x, y, z, fx, fy, fz, dx, dy, dz, reach, spread):
    """Follow a ray from the point (fx, fy, fz) of cell (x, y, z) for at most `reach` lengths.

    buffer[base:]: a world's buffer; spread: width of a sample at length one. Returns t (lengths of
    the direction), the cell met relative to the first one as three int32, and the face. The first
    cell itself is never met.
    """
    ix = _ONE / abs(dx) if dx != _ZERO else _FAR
    iy = _ONE / abs(dy) if dy != _ZERO else _FAR
    iz = _ONE / abs(dz) if dz != _ZERO else _FAR
    tx = (_ONE - fx if dx > _ZERO else fx) * ix
    ty = (_ONE - fy if dy > _ZERO else fy) * iy
    tz = (_ONE - fz if dz > _ZERO else fz) * iz
    # The cell as its three parts of the index into the buffer: no products in the loop.
    sx = _X_STEP if dx > _ZERO else np.int32(-_X_STEP)
    sy = np.int32(1) if dy > _ZERO else np.int32(-1)
    sz = _Z_STEP if dz > _ZERO else np.int32(-_Z_STEP)
    cx = np.int32((x & (SIZE - 1)) << (HEIGHT_BITS + SIZE_BITS))
    cy = np.int32(y)
    cz = np.int32((z & (SIZE - 1)) << HEIGHT_BITS)
    end = np.int32(buffer[base + CEILING]) if dy > _ZERO else np.int32(-1)
    if cy < 0 or (sy > 0 and cy >= end):
        return _FAR, np.int32(0), np.int32(0), np.int32(0), np.int32(NOTHING)
    face = np.int32(NOTHING)
    t = _ZERO
    while True:
        if ty < tx and ty < tz:
            t = ty
            ty += iy
            cy = np.int32(cy + sy)
            face = np.int32(2)
            if cy == end:
                break
        elif tx < tz:
            t = tx
            tx += ix
            cx = np.int32((cx + sx) & _X_MASK)
            face = np.int32(0)
        else:
            t = tz
            tz += iz
            cz = np.int32((cz + sz) & _Z_MASK)
            face = np.int32(4)
        if t > reach:
            break
        if cy >= HEIGHT:
            continue
        block = buffer[np.uint64(base + (cx | cy | cz))] & _BLOCK
        if block != 0:
            i = _from_start(cx >> (HEIGHT_BITS + SIZE_BITS), x)
            j = np.int32(cy - y)
            k = _from_start(cz >> HEIGHT_BITS, z)
            if block < _FIRST_PLANT:
                step = sx if face == 0 else sy if face == 2 else sz
                return t, i, j, k, np.int32(face + (step < 0))
            qx, qy, qz = fx - np.float32(i), fy - np.float32(j), fz - np.float32(k)
            t = _meet_plant(pictures, block, qx, qy, qz, dx, dy, dz, spread)
            if t <= reach:
                return t, i, j, k, np.int32(PLANT_FACE)
    return _FAR, np.int32(0), np.int32(0), np.int32(0), np.int32(NOTHING)
