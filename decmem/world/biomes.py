"""Biomes: what they are made of, and where they lie."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from decmem.world.blocks import block_id
from decmem.world.compiled import compiled
from decmem.world.grid import SIZE
from decmem.world.hashing import at, below, draws, stream
from decmem.world.noise import octaves


@dataclass(frozen=True)
class Biome:
    """A kind of country. Heights are in sixteenths of a block, above the sea where absolute.

    rise: mean height; relief: scale of the hills; ruggedness: strength of the 3-D noise that makes
    overhangs; terraces: 0 (smooth) to 16 (stepped mesas); surface, soil, cliff, shore: blocks;
    patch: an alternative surface in places; plants with their odds per 256 columns of a thicket.
    """

    name: str
    rise: int
    relief: int
    ruggedness: int
    terraces: int
    surface: str
    soil: str
    cliff: str
    shore: str
    patch: str
    plants: tuple[tuple[str, int], ...]


BIOMES: tuple[Biome, ...] = (
    Biome("meadow", 72, 95, 0, 0, "meadow grass", "dirt", "stone", "sand", "path",
          (("grass tuft", 8), ("poppy", 6), ("buttercup", 6), ("daisy", 4))),
    Biome("forest", 96, 135, 0, 0, "forest grass", "dirt", "stone", "gravel", "moss",
          (("fern", 9), ("grass tuft", 5), ("cornflower", 3))),
    Biome("desert", 80, 120, 0, 0, "sand", "sandstone", "sandstone", "sand", "sandstone",
          (("dead bush", 4),)),
    Biome("snow", 112, 160, 0, 0, "snow", "snow", "stone", "gravel", "snowy dirt",
          (("dead bush", 2),)),
    Biome("badlands", 150, 220, 60, 16, "red sand", "red sand", "rust clay", "red sand",
          "ochre clay", (("dead bush", 5),)),
    Biome("highlands", 165, 280, 110, 0, "dry grass", "dirt", "stone", "gravel", "stone",
          (("grass tuft", 6), ("cornflower", 4))),
    Biome("blossom", 84, 115, 0, 0, "blossom grass", "dirt", "stone", "sand", "path",
          (("daisy", 7), ("cornflower", 5), ("grass tuft", 5))),
)  # fmt: skip

_CELL_BITS = 6
_CELLS = SIZE >> _CELL_BITS


def block_column(field: str) -> Int64[np.ndarray, " biomes"]:
    """The block numbers that the biomes name in `field`."""
    return np.array([block_id(getattr(biome, field)) for biome in BIOMES], np.int64)


def _quarters(seed: int) -> np.ndarray:
    """A biome for each of the 4x4 quarters of a world: every biome at least twice."""
    deck = [number % len(BIOMES) for number in range(_CELLS * _CELLS)]
    order = draws(seed, 101, _CELLS * _CELLS, 1, 1 << 30)[:, 0]
    return np.array(deck)[np.argsort(order, kind="stable")].reshape(_CELLS, _CELLS)


@compiled
def _nearest_quarter(seed, quarters, warp_x, warp_z):
    """Jittered Voronoi cells over warped coordinates."""
    count = quarters.shape[0]
    size = warp_x.shape[0]
    cell = size // count
    key_x = stream(seed, 102)
    key_z = stream(seed, 103)
    biomes = np.empty((size, size), np.int64)
    for x in range(size):
        for z in range(size):
            px = x + warp_x[x, z]
            pz = z + warp_z[x, z]
            best = np.int64(1 << 40)
            for i in range(px // cell - 1, px // cell + 2):
                for j in range(pz // cell - 1, pz // cell + 2):
                    qx = i % count
                    qz = j % count
                    dx = px - i * cell - cell // 8 - below(at(key_x, qx, qz), cell * 3 // 4)
                    dz = pz - j * cell - cell // 8 - below(at(key_z, qx, qz), cell * 3 // 4)
                    distance = dx * dx + dz * dz
                    if distance < best:
                        best = distance
                        biomes[x, z] = quarters[qx, qz]
    return biomes


def biome_map(seed: int) -> Int64[np.ndarray, "x z"]:
    """The biome number of every column."""
    warp_x = octaves(SIZE, seed, 110, (5, 20), (3, 7))
    warp_z = octaves(SIZE, seed, 120, (5, 20), (3, 7))
    return _nearest_quarter(seed, _quarters(seed), warp_x, warp_z)


def _blurred(field: np.ndarray, radius: int) -> np.ndarray:
    """Mean over a square window of the torus, one axis after the other."""
    for axis in (0, 1):
        wrapped = np.concatenate([np.take(field, range(-radius - 1, 0), axis), field,
                                  np.take(field, range(radius), axis)], axis)  # fmt: skip
        sums = wrapped.cumsum(axis)
        width = 2 * radius + 1
        length = field.shape[axis]
        high = np.take(sums, range(width, width + length), axis)
        field = (high - np.take(sums, range(length), axis)) // width
    return field


def blended(biomes: Int64[np.ndarray, "x z"], field: str) -> Int64[np.ndarray, "x z"]:
    """A number of the biomes as a map, smooth across their borders."""
    values = np.array([getattr(biome, field) for biome in BIOMES], np.int64) * 16
    return _blurred(_blurred(values[biomes], 5), 5) // 16
