"""The voxel grid of a world: a torus of columns, packed in one buffer for the renderers."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from decmem.world.blocks import BLOCK_BITS

SIZE_BITS = 8
SIZE = 1 << SIZE_BITS
"""Columns along x and along z; the world repeats beyond."""
HEIGHT_BITS = 6
HEIGHT = 1 << HEIGHT_BITS
SEA = 20
"""The y of the uppermost water block."""

CELLS = SIZE * SIZE * HEIGHT
CEILING = CELLS
"""Where the buffer keeps the height from which on a world is empty."""
BUFFER = CEILING + 64

BLOCK_MASK = (1 << BLOCK_BITS) - 1
LIGHT_SHIFT = BLOCK_BITS
"""A cell's byte is block | light << 6: light 0 in solids, 1 deep shade, 2 shade, 3 open sky."""


@dataclass(frozen=True, eq=False)
class World:
    """A block world.

    buffer: (BUFFER,) uint8: the cells in (x, z, y) order, y fastest; then the ceiling.
    """

    seed: int
    buffer: UInt8[np.ndarray, " bytes"]

    @property
    def cells(self) -> UInt8[np.ndarray, "x z y"]:
        """Block and light of every cell, a view."""
        return self.buffer[:CELLS].reshape(SIZE, SIZE, HEIGHT)

    @property
    def blocks(self) -> UInt8[np.ndarray, "x z y"]:
        """Block number of every cell (`decmem.world.blocks`), a copy."""
        return self.cells & np.uint8(BLOCK_MASK)
