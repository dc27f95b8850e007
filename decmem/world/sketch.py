"""Landmarks as lists of voxels around an anchor, with slots for what varies from place to place."""

from collections.abc import Iterable
from itertools import product

import numpy as np
from jaxtyping import Int64

from decmem.world.blocks import BLOCK_BITS, block_id

SLOT = 1 << BLOCK_BITS
"""Codes from here on are slots, filled in when a landmark is set down."""
SLOTS = {"paint": SLOT, "trim": SLOT + 1, "wall": SLOT + 2, "roof": SLOT + 3, "rock": SLOT + 4}
CLEAR = 127
"""A code that empties its cell."""


def code(name: str) -> int:
    """The number of a block, a slot, or "clear"."""
    if name == "clear":
        return CLEAR
    return SLOTS[name] if name in SLOTS else block_id(name)


class Sketch:
    """A landmark under construction. (0, 0, 0) is the first free cell above the ground."""

    def __init__(self) -> None:
        self.voxels: dict[tuple[int, int, int], int] = {}

    def put(self, x: int, y: int, z: int, name: str) -> None:
        """Set one cell, over what was there."""
        self.voxels[x, y, z] = code(name)

    def fill(self, xs: Iterable[int], ys: Iterable[int], zs: Iterable[int], name: str) -> None:
        """Set a box of cells."""
        for x, y, z in product(list(xs), list(ys), list(zs)):
            self.put(x, y, z, name)

    def column(self, x: int, z: int, height: int, name: str) -> None:
        """Set `height` cells upwards from the ground."""
        self.fill([x], range(height), [z], name)

    def disc(self, y: int, reach: int, name: str, centre: tuple[int, int] = (0, 0)) -> None:
        """A layer of cells whose squared distance from the axis is at most `reach`; air only."""
        side = range(-4, 5)
        for dx, dz in product(side, side):
            place = (centre[0] + dx, y, centre[1] + dz)
            if dx * dx + dz * dz <= reach and place not in self.voxels:
                self.put(*place, name)

    def ball(self, y: int, reach: int, name: str) -> None:
        """A ball of squared radius `reach` around (0, y, 0)."""
        for dy in range(-4, 5):
            self.disc(y + dy, reach - dy * dy, name)

    def rows(self) -> Int64[np.ndarray, "voxels 4"]:
        """The voxels as (x, y, z, code), from the ground up."""
        items = sorted(self.voxels.items(), key=lambda item: item[0][1])
        return np.array([(*place, value) for place, value in items], np.int64)
