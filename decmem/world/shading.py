"""From a met surface to its colour: texture by mip level, light, haze."""

import math

import numpy as np

from decmem.world.blocks import block_id
from decmem.world.compiled import compiled
from decmem.world.grid import BLOCK_MASK, HEIGHT, HEIGHT_BITS, LIGHT_SHIFT, SIZE, SIZE_BITS
from decmem.world.marching import PLANT_FACE, plant_level
from decmem.world.pictures import face_texture, texel_at
from decmem.world.sky import haze

_ZERO = np.float32(0)
_HALF = np.float32(0.5)
_ONE = np.float32(1)
_TWO = np.float32(2)
_FOUR = np.float32(4)
_EIGHT = np.float32(8)
_SIXTEEN = np.float32(16)
_BELOW_ONE = np.float32(0.99999)
_WRAP = np.int32(SIZE - 1)
_WATER = np.uint8(block_id("water"))

_SIDE_X = np.float32(0.68)
_SIDE_Z = np.float32(0.82)
_BOTTOM = np.float32(0.5)
_LEAF = np.float32(0.96)
_LIGHT_FLOOR = np.float32(0.34)
_LIGHT_STEP = np.float32(0.22)
_GLOSS = np.float32(0.7)
"""How much of the sky water mirrors at a grazing view."""
_HAZE_START = np.float32(4)
_HAZE_SCALE = np.float32(1 / 30)
REACH = np.float32(34)
"""Blocks at which everything has dissolved into the haze."""


@compiled
def _light(buffer, base, x, y, z):
    """Light of a cell, 0 to 3."""
    if y < 0 or y >= HEIGHT:
        return np.float32(3)
    column = ((x & _WRAP) << (SIZE_BITS + HEIGHT_BITS)) | ((z & _WRAP) << HEIGHT_BITS)
    return np.float32(buffer[np.uint64(base + (column | y))] >> LIGHT_SHIFT)


@compiled
def _smooth_light(buffer, base, x, y, z, face, u, v, w):
    """Light on the point (u, v, w) of a face of cell (x, y, z), smooth over the cells before it."""
    ax = ay = az = bx = by = bz = np.int32(0)
    if face < 2:
        x += 2 * face - 1
        a, b = v, w
        ay = np.int32(-1 if a < _HALF else 1)
        bz = np.int32(-1 if b < _HALF else 1)
    elif face < 4:
        y += 2 * face - 5
        a, b = u, w
        ax = np.int32(-1 if a < _HALF else 1)
        bz = np.int32(-1 if b < _HALF else 1)
    else:
        z += 2 * face - 9
        a, b = u, v
        ax = np.int32(-1 if a < _HALF else 1)
        by = np.int32(-1 if b < _HALF else 1)
    own = _light(buffer, base, x, y, z)
    first = _light(buffer, base, x + ax, y + ay, z + az)
    second = _light(buffer, base, x + bx, y + by, z + bz)
    both = _light(buffer, base, x + ax + bx, y + ay + by, z + az + bz)
    near = own + (first - own) * abs(a - _HALF)
    far = second + (both - second) * abs(a - _HALF)
    return near + (far - near) * abs(b - _HALF)


@compiled
def _mip(footprint):
    """The finer of two mip levels (log2 of its side) and the share of the coarser one, for samples
    `footprint` texels wide.
    """
    if footprint < _ONE:
        return np.int32(4), _ZERO
    if footprint < _TWO:
        return np.int32(4), footprint - _ONE
    if footprint < _FOUR:
        return np.int32(3), footprint / _TWO - _ONE
    if footprint < _EIGHT:
        return np.int32(2), footprint / _FOUR - _ONE
    return np.int32(1), min(footprint / _EIGHT, _TWO) - _ONE


@compiled
def _texture_colour(pictures, texture, bits, blend, u, v):
    """A texture's colour at u to the right and v down, between two mip levels."""
    u = min(max(u, _ZERO), _BELOW_ONE)
    v = min(max(v, _ZERO), _BELOW_ONE)
    sharp = texel_at(pictures, texture, bits, u, v)
    soft = texel_at(pictures, texture, np.int32(bits - 1), u, v)
    red = np.float32(sharp & 255)
    green = np.float32((sharp >> 8) & 255)
    blue = np.float32((sharp >> 16) & 255)
    red += (np.float32(soft & 255) - red) * blend
    green += (np.float32((soft >> 8) & 255) - green) * blend
    blue += (np.float32((soft >> 16) & 255) - blue) * blend
    return red, green, blue


@compiled
def shade(buffer, base, pictures, x, y, z, face, u, v, w, t, dx, dy, dz, length, spread):
    """Colour of the point (u, v, w) of the face of cell (x, y, z) seen from t directions away.

    (x, z) lie in the world, (u, v, w) in the cell; spread: width of a sample at t = 1. Returns
    three float32, 0 to 255.
    """
    place = (x << (SIZE_BITS + HEIGHT_BITS)) | (z << HEIGHT_BITS) | y
    block = buffer[np.uint64(base + place)] & np.uint8(BLOCK_MASK)
    part = np.int32(1)
    across, down = u, _ONE - v
    if face < 2:
        across = w
        tint, slant = _SIDE_X, abs(dx)
    elif face < 4:
        down = w
        part = np.int32(0 if face == 3 else 2)
        tint, slant = (_ONE if face == 3 else _BOTTOM), abs(dy)
    else:
        tint, slant = _SIDE_Z, abs(dz)
    texture = face_texture(pictures, block, part)
    if face == PLANT_FACE:
        bits = plant_level(_SIXTEEN * t * spread)
        red, green, blue = _texture_colour(pictures, texture, bits, _ZERO, across, down)
        light = _light(buffer, base, x, y, z)
        tint = _LEAF
    else:
        # Between the sample's width and its length on the slanting surface: no shimmer, no mud.
        footprint = _SIXTEEN * t * spread * np.float32(math.sqrt(length / slant))
        bits, blend = _mip(footprint)
        red, green, blue = _texture_colour(pictures, texture, bits, blend, across, down)
        light = _smooth_light(buffer, base, x, y, z, face, u, v, w)
    tint *= _LIGHT_FLOOR + _LIGHT_STEP * light
    red *= tint
    green *= tint
    blue *= tint
    if block == _WATER and face == 3:
        rest = _ONE - slant / length
        mirror = rest * rest * rest * _GLOSS * tint
        sky_red, sky_green, sky_blue = haze(dx, -dy, dz, length)
        red += (sky_red - red) * mirror
        green += (sky_green - green) * mirror
        blue += (sky_blue - blue) * mirror
    fog = (t * length - _HAZE_START) * _HAZE_SCALE
    if fog > _ZERO:
        fog = min(fog * fog, _ONE)
        far_red, far_green, far_blue = haze(dx, dy, dz, length)
        red += (far_red - red) * fog
        green += (far_green - green) * fog
        blue += (far_blue - blue) * fog
    return red, green, blue
