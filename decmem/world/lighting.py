"""What the renderers need beside the blocks: light, empty bricks, the ceiling."""

import numpy as np
from jaxtyping import UInt8

from decmem.world.blocks import SHAPES, Shape
from decmem.world.compiled import compiled
from decmem.world.grid import BLOCK_MASK, BRICK_BITS, CEILING, CELLS, HEIGHT, LIGHT_SHIFT, SIZE

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
def _index_bricks(buffer, cells):
    """Flag the bricks that hold anything; return the height above which all are empty."""
    side = 1 << BRICK_BITS
    columns = cells.shape[0] >> BRICK_BITS
    layers = cells.shape[2] >> BRICK_BITS
    ceiling = 0
    number = CELLS
    for i in range(columns):
        for j in range(columns):
            for k in range(layers):
                full = False
                for x in range(i * side, (i + 1) * side):
                    for z in range(j * side, (j + 1) * side):
                        for y in range(k * side, (k + 1) * side):
                            full = full or (cells[x, z, y] & BLOCK_MASK) != 0
                buffer[number] = full
                number += 1
                if full:
                    ceiling = max(ceiling, (k + 1) * side)
    buffer[CEILING] = ceiling


def light_and_index(buffer: UInt8[np.ndarray, " bytes"]) -> None:
    """Complete a world's buffer whose cells hold blocks only, in place."""
    cells = buffer[:CELLS].reshape(SIZE, SIZE, HEIGHT)
    _light(cells, _roofs(cells))
    _index_bricks(buffer, cells)
