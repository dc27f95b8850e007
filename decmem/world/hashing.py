"""Integer hashes: the only source of randomness in worlds and walks.

Everything is unsigned 64-bit arithmetic, so every machine draws the same numbers.
"""

import numpy as np

from decmem.world.compiled import compiled

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_X = np.uint64(0xD6E8FEB86659FD93)
_Z = np.uint64(0xA0761D6478BD642F)
_S27 = np.uint64(27)
_S30 = np.uint64(30)
_S31 = np.uint64(31)
_S33 = np.uint64(33)


@compiled
def mix(value):
    """Scramble a uint64 (the finaliser of SplitMix64)."""
    value = (value ^ (value >> _S30)) * _MIX_1
    value = (value ^ (value >> _S27)) * _MIX_2
    return value ^ (value >> _S31)


@compiled
def stream(seed, salt):
    """The uint64 that stands for purpose `salt` under `seed`."""
    return mix(mix(np.uint64(seed) + _GOLDEN) + np.uint64(salt) * _GOLDEN)


@compiled
def at(key, x, z):
    """The uint64 of lattice point (x, z) under a `stream`."""
    return mix(key + np.uint64(x) * _X + np.uint64(z) * _Z)


@compiled
def successor(state):
    """The next state of a random sequence; pass it to `below`."""
    return mix(state + _GOLDEN)


@compiled
def below(value, bound):
    """An int64 in [0, bound) from a uint64; bias under 1e-6 for bounds below a thousand."""
    return np.int64(((value >> _S33) * np.uint64(bound)) >> _S31)


@compiled
def draw(state, bound):
    """The next int64 in [0, bound) of a random sequence; `state` (1,) uint64 moves on."""
    state[0] = mix(state[0] + _GOLDEN)
    return below(state[0], bound)


@compiled
def draws(seed, salt, rows, columns, bound):
    """A table (rows, columns) of int64 draws from [0, bound)."""
    key = stream(seed, salt)
    table = np.empty((rows, columns), np.int64)
    for row in range(rows):
        for column in range(columns):
            table[row, column] = below(at(key, row, column), bound)
    return table
