"""From a met surface to its colour: texture by mip level, light, haze."""

import math

import numpy as np

from decmem.world.blocks import FACE_TEXTURES
from decmem.world.compiled import compiled
from decmem.world.grid import BLOCK_MASK, HEIGHT, LIGHT_SHIFT, SIZE
from decmem.world.marching import level_start, plant_level
from decmem.world.sky import haze
from decmem.world.textures import TEXELS

_ZERO = np.float32(0)
_HALF = np.float32(0.5)
_ONE = np.float32(1)
_TWO = np.float32(2)
_FOUR = np.float32(4)
_EIGHT = np.float32(8)
_SIXTEEN = np.float32(16)
_WRAP = np.int32(SIZE - 1)
_SIDE_X = np.float32(0.68)
_SIDE_Z = np.float32(0.82)
_BOTTOM = np.float32(0.5)
_LEAF = np.float32(0.96)
_LIGHT_FLOOR = np.float32(0.34)
_LIGHT_STEP = np.float32(0.22)
HAZE_START = np.float32(20)
REACH = np.float32(52)
"""Blocks at which everything has dissolved into the haze."""
_HAZE_SCALE = np.float32(1 / 32)


@compiled
def _light(buffer, base, x, y, z):
    """Light of a cell, 0 to 3."""
    if y < 0 or y >= HEIGHT:
        return np.float32(3)
    cell = buffer[np.uint64(base + (((((x & _WRAP) << 8) | (z & _WRAP)) << 6) | y))]
    return np.float32(cell >> LIGHT_SHIFT)


@compiled
def _smooth_light(buffer, base, x, y, z, face, u, v, w):
    """Light on the point (u, v, w) of a face of cell (x, y, z), smooth over the cells before it."""
    if face < 2:
        x += 2 * face - 1
        a, b = v, w
    elif face < 4:
        y += 2 * (face - 2) - 1
        a, b = u, w
    else:
        z += 2 * (face - 4) - 1
        a, b = u, v
    da = -1 if a < _HALF else 1
    db = -1 if b < _HALF else 1
    wa = abs(a - _HALF)
    wb = abs(b - _HALF)
    if face < 2:
        first = _light(buffer, base, x, y + da, z)
        second = _light(buffer, base, x, y, z + db)
        both = _light(buffer, base, x, y + da, z + db)
    elif face < 4:
        first = _light(buffer, base, x + da, y, z)
        second = _light(buffer, base, x, y, z + db)
        both = _light(buffer, base, x + da, y, z + db)
    else:
        first = _light(buffer, base, x + da, y, z)
        second = _light(buffer, base, x, y + db, z)
        both = _light(buffer, base, x + da, y + db, z)
    own = _light(buffer, base, x, y, z)
    near = own + (first - own) * wa
    far = second + (both - second) * wa
    return near + (far - near) * wb


@compiled
def _texel(pictures, texture, bits, u, v):
    """The texel of a texture's level of side 2**bits at u to the right and v down."""
    side = np.float32(np.int32(1) << bits)
    place = (np.int32(v * side) << bits) + np.int32(u * side)
    return pictures[np.uint64(texture * TEXELS + level_start(bits) + place)]


@compiled
def shade(buffer, base, pictures, x, y, z, face, u, v, w, t, dx, dy, dz, length, spread):
    """Colour of the point (u, v, w) of the face of cell (x, y, z) seen from t directions away.

    spread: width of a sample at t = 1. Returns three float32, 0 to 255.
    """
    block = buffer[np.uint64(base + (((((x & _WRAP) << 8) | (z & _WRAP)) << 6) | y))] & BLOCK_MASK
    if face < 2:
        texture, tint, slant = np.int32(FACE_TEXTURES[block, 1]), _SIDE_X, abs(dx)
        across, down = w, _ONE - v
    elif face < 4:
        texture = np.int32(FACE_TEXTURES[block, 0 if face == 3 else 2])
        tint, slant = (_ONE if face == 3 else _BOTTOM), abs(dy)
        across, down = u, w
    elif face < 6:
        texture, tint, slant = np.int32(FACE_TEXTURES[block, 1]), _SIDE_Z, abs(dz)
        across, down = u, _ONE - v
    else:
        texture, tint, slant = np.int32(FACE_TEXTURES[block, 1]), _LEAF, length
        across, down = u, _ONE - v
    across = min(max(across, _ZERO), np.float32(0.99999))
    down = min(max(down, _ZERO), np.float32(0.99999))
    footprint = _SIXTEEN * t * spread * np.float32(math.sqrt(length / slant))
    bits, blend = np.int32(4), _ZERO
    if face > 5:
        bits = plant_level(_SIXTEEN * t * spread)
    elif footprint >= _EIGHT:
        bits, blend = np.int32(1), min(footprint / _EIGHT, _TWO) - _ONE
    elif footprint >= _FOUR:
        bits, blend = np.int32(2), footprint / _FOUR - _ONE
    elif footprint >= _TWO:
        bits, blend = np.int32(3), footprint / _TWO - _ONE
    elif footprint >= _ONE:
        blend = footprint - _ONE
    sharp = _texel(pictures, texture, bits, across, down)
    soft = _texel(pictures, texture, np.int32(bits - 1), across, down)
    red = np.float32(sharp & 255)
    green = np.float32((sharp >> 8) & 255)
    blue = np.float32((sharp >> 16) & 255)
    red += (np.float32(soft & 255) - red) * blend
    green += (np.float32((soft >> 8) & 255) - green) * blend
    blue += (np.float32((soft >> 16) & 255) - blue) * blend

    if face < 6:
        light = _smooth_light(buffer, base, x, y, z, face, u, v, w)
    else:
        light = _light(buffer, base, x, y, z)
    tint *= _LIGHT_FLOOR + _LIGHT_STEP * light
    fog = min(max((t * length - HAZE_START) * _HAZE_SCALE, _ZERO), _ONE)
    fog *= fog
    hr, hg, hb = haze(dx, dy, dz, length)
    red *= tint
    green *= tint
    blue *= tint
    return red + (hr - red) * fog, green + (hg - green) * fog, blue + (hb - blue) * fog
