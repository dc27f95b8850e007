"""The table of block types."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class Shape(IntEnum):
    """How a block fills its cell."""

    EMPTY = 0
    CUBE = 1
    WATER = 2
    PLANT = 3  # two crossed upright cut-out pictures


@dataclass(frozen=True)
class BlockType:
    """A block: its name, its textures for top, sides and bottom, and its shape."""

    name: str
    top: str
    side: str
    bottom: str
    shape: Shape = Shape.CUBE


def _cube(name: str, top: str = "", side: str = "", bottom: str = "") -> BlockType:
    top = top or name
    return BlockType(name, top, side or top, bottom or top)


def _log(name: str) -> BlockType:
    return BlockType(f"{name} log", "log rings", f"{name} bark", "log rings")


def _plant(name: str) -> BlockType:
    return BlockType(name, name, name, name, Shape.PLANT)


PAINTS = (
    "red", "orange", "yellow", "lime", "cyan", "blue", "purple", "pink", "white", "black",
)  # fmt: skip
CLAYS = ("rust clay", "ochre clay", "cream clay", "brown clay", "plum clay")

BLOCK_TYPES: tuple[BlockType, ...] = (
    BlockType("air", "air", "air", "air", Shape.EMPTY),
    _cube("meadow grass", "meadow grass", "meadow side", "dirt"),
    _cube("forest grass", "forest grass", "forest side", "dirt"),
    _cube("dry grass", "dry grass", "dry side", "dirt"),
    _cube("blossom grass", "blossom grass", "blossom side", "dirt"),
    _cube("snowy dirt", "snow", "snow side", "dirt"),
    _cube("dirt"),
    _cube("path"),
    _cube("stone"),
    _cube("gravel"),
    _cube("moss"),
    _cube("sand"),
    _cube("sandstone", "sandstone top", "sandstone", "sandstone top"),
    _cube("red sand"),
    *(_cube(name) for name in CLAYS),
    _cube("snow"),
    _cube("ice"),
    BlockType("water", "water", "water", "water", Shape.WATER),
    _log("oak"),
    _log("birch"),
    _log("pine"),
    _log("palm"),
    _cube("oak leaves"),
    _cube("birch leaves"),
    _cube("pine leaves"),
    _cube("palm leaves"),
    _cube("pink leaves"),
    _cube("amber leaves"),
    _cube("cactus", "cactus top", "cactus", "cactus top"),
    _cube("planks"),
    _cube("bricks"),
    _cube("stone bricks"),
    _cube("cobble"),
    _cube("mossy cobble"),
    _cube("red tiles"),
    _cube("blue tiles"),
    *(_cube(name) for name in PAINTS),
    _cube("lamp"),
    _cube("hay", "hay top", "hay", "hay top"),
    _cube("toadstool"),
    _plant("grass tuft"),
    _plant("fern"),
    _plant("poppy"),
    _plant("buttercup"),
    _plant("cornflower"),
    _plant("daisy"),
    _plant("dead bush"),
)

_ID = {block.name: number for number, block in enumerate(BLOCK_TYPES)}

AIR = 0
BLOCK_BITS = 6
assert len(BLOCK_TYPES) <= 1 << BLOCK_BITS


def block_id(name: str) -> int:
    """The number of the block type called `name`."""
    return _ID[name]


def _per_block(values: list[int]) -> np.ndarray:
    table = np.zeros(1 << BLOCK_BITS, np.uint8)
    table[: len(values)] = values
    return table


SHAPES = _per_block([int(block.shape) for block in BLOCK_TYPES])
"""Shape of each block number, (64,) uint8."""

FIRST_PLANT = min(n for n, block in enumerate(BLOCK_TYPES) if block.shape == Shape.PLANT)
"""Plants are the last blocks of the table."""
assert (SHAPES[FIRST_PLANT : len(BLOCK_TYPES)] == Shape.PLANT).all()

TEXTURE_NAMES: tuple[str, ...] = tuple(
    dict.fromkeys(
        name
        for block in BLOCK_TYPES
        if block.shape != Shape.EMPTY
        for name in (block.top, block.side, block.bottom)
    )
)


def _faces() -> np.ndarray:
    faces = np.zeros((1 << BLOCK_BITS, 3), np.uint8)
    for number, block in enumerate(BLOCK_TYPES):
        if block.shape != Shape.EMPTY:
            names = (block.top, block.side, block.bottom)
            faces[number] = [TEXTURE_NAMES.index(name) for name in names]
    return faces


FACE_TEXTURES = _faces()
"""Texture number of top, side and bottom of each block, (64, 3) uint8."""
