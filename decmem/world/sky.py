"""The sky: a gradient, a sun with its glow, and soft clouds, by direction alone."""

import math

import numpy as np

from decmem.world.compiled import compiled
from decmem.world.pictures import CLOUD_BITS, CLOUD_SIDE, CLOUDS

_ZERO = np.float32(0)
_ONE = np.float32(1)
_HORIZON = (np.float32(200), np.float32(221), np.float32(236))
_ZENITH = (np.float32(78), np.float32(134), np.float32(214))
_GLOW = (np.float32(52), np.float32(20), np.float32(-34))
_SUN = (np.float32(0.64), np.float32(0.48), np.float32(-0.6))
"""A unit vector towards the sun."""
_DISC = np.float32(0.9965)
_DISC_EDGE = np.float32(1 / 0.0012)
_CLOUD_FLOOR = np.float32(0.16)
_CLOUD_SCALE = np.float32(11)
_CLOUD_WHITE = np.float32(250)
_BYTE = np.float32(1 / 255)


@compiled
def haze(dx, dy, dz, length):
    """Colour of the air in a direction of that length: the sky without sun and clouds."""
    up = max(dy / length, _ZERO)
    rest = _ONE - min(up * np.float32(1.6), _ONE)
    blue = _ONE - rest * rest
    toward = max((dx * _SUN[0] + dy * _SUN[1] + dz * _SUN[2]) / length, _ZERO)
    toward *= toward
    glow = toward * toward
    red = _HORIZON[0] + (_ZENITH[0] - _HORIZON[0]) * blue + glow * _GLOW[0]
    green = _HORIZON[1] + (_ZENITH[1] - _HORIZON[1]) * blue + glow * _GLOW[1]
    azure = _HORIZON[2] + (_ZENITH[2] - _HORIZON[2]) * blue + glow * _GLOW[2]
    return red, green, azure


@compiled
def _cloud(pictures, row, column):
    mask = np.int32(CLOUD_SIDE - 1)
    return np.float32(pictures[CLOUDS + (((row & mask) << CLOUD_BITS) | (column & mask))])


@compiled
def sky(pictures, dx, dy, dz, length):
    """Colour of the open sky in a direction of that length: three float32, 0 to 255.

    pictures: `decmem.world.pictures.pictures()`.
    """
    red, green, blue = haze(dx, dy, dz, length)
    up = dy / length
    if up > _ZERO:
        scale = _CLOUD_SCALE / (dy + _CLOUD_FLOOR * length)
        u, v = dx * scale, dz * scale
        fu, fv = np.float32(math.floor(u)), np.float32(math.floor(v))
        row, column = np.int32(fu), np.int32(fv)
        u -= fu
        v -= fv
        near = _cloud(pictures, row, column) * (_ONE - v) + _cloud(pictures, row, column + 1) * v
        far = (
            _cloud(pictures, row + 1, column) * (_ONE - v)
            + _cloud(pictures, row + 1, column + 1) * v
        )
        cover = (near * (_ONE - u) + far * u) * _BYTE * min(up * np.float32(5), _ONE)
        red += (_CLOUD_WHITE - red) * cover
        green += (_CLOUD_WHITE - green) * cover
        blue += (_CLOUD_WHITE - blue) * cover
    toward = (dx * _SUN[0] + dy * _SUN[1] + dz * _SUN[2]) / length
    disc = min(max((toward - _DISC) * _DISC_EDGE, _ZERO), _ONE)
    red += (np.float32(255) - red) * disc
    green += (np.float32(250) - green) * disc
    blue += (np.float32(226) - blue) * disc
    return red, green, blue
