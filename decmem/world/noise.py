"""Periodic gradient noise in fixed point: 4096 stands for one."""

import numpy as np

from decmem.world.compiled import compiled
from decmem.world.hashing import at, below, stream

ONE = 4096

# Sixteen directions of equal length 4096; hand-rounded so that no library sine is involved.
_GRADIENTS = np.array(
    [
        (4096, 0), (3784, 1567), (2896, 2896), (1567, 3784),
        (0, 4096), (-1567, 3784), (-2896, 2896), (-3784, 1567),
        (-4096, 0), (-3784, -1567), (-2896, -2896), (-1567, -3784),
        (0, -4096), (1567, -3784), (2896, -2896), (3784, -1567),
    ],
    dtype=np.int64,
)  # fmt: skip


@compiled
def fade(t):
    """3t^2 - 2t^3."""
    return (t * t * (3 * ONE - 2 * t)) >> 24


@compiled
def _corner(key, i, j, mask, fx, fz):
    direction = below(at(key, i & mask, j & mask), 16)
    return (_GRADIENTS[direction, 0] * fx + _GRADIENTS[direction, 1] * fz) >> 12


@compiled
def add_octave(total, seed, salt, cell_bits, weight):
    """Add weight x noise with lattice cells of 2**cell_bits columns to `total` (X, Z) int64.

    The noise lies within about +-0.75 (in units of `weight`) and repeats with the map, whose sides
    must be powers of two.
    """
    size = total.shape[0]
    key = stream(seed, salt)
    mask = (size >> cell_bits) - 1
    half = (1 << cell_bits) >> 1
    cell = (1 << cell_bits) - 1
    for x in range(size):
        i = (x + half) >> cell_bits
        fx = ((((x + half) & cell) << 1) + 1) << (11 - cell_bits)
        wx = fade(fx)
        for z in range(size):
            j = (z + half) >> cell_bits
            fz = ((((z + half) & cell) << 1) + 1) << (11 - cell_bits)
            wz = fade(fz)
            a = _corner(key, i, j, mask, fx, fz)
            b = _corner(key, i, j + 1, mask, fx, fz - ONE)
            c = _corner(key, i + 1, j, mask, fx - ONE, fz)
            d = _corner(key, i + 1, j + 1, mask, fx - ONE, fz - ONE)
            near = a * (ONE - wz) + b * wz
            far = c * (ONE - wz) + d * wz
            total[x, z] += (((near * (ONE - wx) + far * wx) >> 24) * weight) >> 12


def octaves(size: int, seed: int, salt: int, *layers: tuple[int, int]) -> np.ndarray:
    """A sum of noise octaves (size, size) int64, one per (cell_bits, weight) in `layers`."""
    total = np.zeros((size, size), np.int64)
    for number, (cell_bits, weight) in enumerate(layers):
        add_octave(total, seed, salt + number, cell_bits, weight)
    return total


@compiled
def lattice_noise(seed, salt, columns, layers):
    """White noise in (-1, 1) on a coarse lattice (columns, columns, layers) int64."""
    key = stream(seed, salt)
    values = np.empty((columns, columns, layers), np.int64)
    for x in range(columns):
        for z in range(columns):
            for y in range(layers):
                values[x, z, y] = below(at(key, x * 4096 + y, z), 2 * ONE) - ONE
    return values
