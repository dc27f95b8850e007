"""What the renderers need beside the blocks: light, and the ceiling."""

import numpy as np
from jaxtyping import UInt8

from decmem.world.blocks import SHAPES, Shape
from decmem.world.compiled import compiled
from decmem.world.grid import BLOCK_MASK, CEILING, CELLS, HEIGHT, LIGHT_SHIFT, SIZE

_EMPTY = int(Shape.EMPTY)
_PLANT = int(Shape.PLANT)
_SHADE = np.uint8(2 << LIGHT_SHIFT)
_DEEP = np.uint8(1 << LIGHT_SHIFT)
_SKY = np.uint8(3 << LIGHT_SHIFT)
_REACH = 3
"""Light reaches this many columns sideways under a roof."""


@compiled
def _roofs(cells):
    """The y of the uppermost cell of each column that casts a shadow."""
    size = cells.shape[0]
    roofs = np.empty((size, size), np.int64)
    for x in range(size):
        for z in range(size):
            y = HEIGHT - 1
            while y > 0:
                shape = SHAPES[cells[x, z, y]]
                if shape != _EMPTY and shape != _PLANT:
                    break
                y -= 1
            roofs[x, z] = y
    return roofs


@compiled
def _light(cells, roofs):
    """Write the light of every open cell into its upper bits."""
    last = cells.shape[0] - 1
    for x in range(last + 1):
        for z in range(last + 1):
            roof = roofs[x, z]
            for y in range(roof + 1, HEIGHT):
                cells[x, z, y] |= _SKY
            for y in range(roof - 1, 0, -1):
                shape = SHAPES[cells[x, z, y] & BLOCK_MASK]
                if shape != _EMPTY and shape != _PLANT:
                    continue
                lit = False
                for dx in range(-_REACH, _REACH + 1, _REACH):
                    for dz in range(-_REACH, _REACH + 1, _REACH):
                        lit = lit or roofs[(x + dx) & last, (z + dz) & last] < y
                cells[x, z, y] |= _SHADE if lit else _DEEP


@compiled
def _ceiling(cells):
    """The height from which on nothing but air is found."""
    ceiling = 0
    for x in range(cells.shape[0]):
        for z in range(cells.shape[1]):
            for y in range(HEIGHT - 1, ceiling - 1, -1):
                if cells[x, z, y] & BLOCK_MASK:
                    ceiling = y + 1
                    break
    return ceiling


def finish(buffer: UInt8[np.ndarray, " bytes"]) -> None:
    """Complete a world's buffer whose cells hold blocks only, in place."""
    cells = buffer[:CELLS].reshape(SIZE, SIZE, HEIGHT)
    _light(cells, _roofs(cells))
    buffer[CEILING] = _ceiling(cells)
