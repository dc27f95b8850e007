"""From a seed to the bare ground: heights, water, soils."""

import numpy as np
from jaxtyping import Int64, UInt8

from decmem.world.biomes import BIOMES, biome_map, blended, block_column
from decmem.world.blocks import CLAYS, block_id
from decmem.world.compiled import compiled
from decmem.world.grid import HEIGHT, SEA, SIZE
from decmem.world.noise import fade, lattice_noise, octaves

_SNOW = [biome.name for biome in BIOMES].index("snow")
_BADLANDS = [biome.name for biome in BIOMES].index("badlands")
_HIGHLANDS = [biome.name for biome in BIOMES].index("highlands")
_WATER = block_id("water")
_ICE = block_id("ice")
_STONE = block_id("stone")
_SNOW_BLOCK = block_id("snow")
_FIRST_CLAY = block_id(CLAYS[0])
_CEILING = HEIGHT - 18
"""Ground stays below this, so that trees and towers fit."""


def _terraced(height: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Pull heights to flats five blocks apart, joined by ramps that can still be climbed."""
    step = 80
    rest = height % step
    ramp = np.clip((rest - 40) * step // 40, 0, step)
    return height + (ramp - rest) * strength // 16


def height_map(
    seed: int, biomes: Int64[np.ndarray, "x z"], ruggedness: Int64[np.ndarray, "x z"]
) -> Int64[np.ndarray, "x z"]:
    """Height of the ground in sixteenths of a block."""
    hills = octaves(SIZE, seed, 200, (6, 2048), (5, 1280), (4, 512), (3, 128))
    height = SEA * 16 + blended(biomes, "rise") + (blended(biomes, "relief") * hills >> 11)
    height = _terraced(height, blended(biomes, "terraces"))

    basin = -octaves(SIZE, seed, 210, (6, 3000), (5, 1096)) - 1350
    height -= np.clip(basin, 0, 1200) * 180 // 1200

    bend = abs(octaves(SIZE, seed, 220, (6, 3072), (5, 1024)))
    depth = fade(4096 - np.minimum(bend, 400) * 4096 // 400)
    bed = SEA * 16 - 30
    height -= np.maximum(height - bed, 0) * depth >> 12
    return np.clip(height, 7 * 16, (_CEILING - 4) * 16)


@compiled
def _overhang(lattice, x, y, z):
    """Lattice noise between cells of 8x4x8 blocks, trilinear, 4096 for one."""
    count = lattice.shape[0]
    i, j, k = x >> 3, z >> 3, y >> 2
    fx, fz, fy = 2 * (x & 7) + 1, 2 * (z & 7) + 1, 2 * (y & 3) + 1
    i1, j1 = (i + 1) & (count - 1), (j + 1) & (count - 1)
    low = (lattice[i, j, k] * (16 - fx) + lattice[i1, j, k] * fx) * (16 - fz)
    low += (lattice[i, j1, k] * (16 - fx) + lattice[i1, j1, k] * fx) * fz
    high = (lattice[i, j, k + 1] * (16 - fx) + lattice[i1, j, k + 1] * fx) * (16 - fz)
    high += (lattice[i, j1, k + 1] * (16 - fx) + lattice[i1, j1, k + 1] * fx) * fz
    return (low * (8 - fy) + high * fy) >> 11


@compiled
def _raise_ground(blocks, height, ruggedness, lattice):
    """Fill the cells below the ground with stone, water up to the sea; return the tops."""
    size = height.shape[0]
    tops = np.empty((size, size), np.int64)
    for x in range(size):
        for z in range(size):
            rough = ruggedness[x, z]
            top = height[x, z] >> 4
            if rough > 8:
                reach = (rough >> 4) + 1
                floor = top - reach
                top = floor
                for y in range(floor + 1, min(floor + 2 * reach + 1, _CEILING)):
                    swell = rough * _overhang(lattice, x, y, z) >> 12
                    if height[x, z] - y * 16 + swell > 0:
                        blocks[x, z, y] = _STONE
                        top = y
                blocks[x, z, : floor + 1] = _STONE
            else:
                blocks[x, z, : top + 1] = _STONE
            for y in range(1, SEA + 1):
                if blocks[x, z, y] == 0:
                    blocks[x, z, y] = _WATER
            tops[x, z] = top
    return tops


@compiled
def _paint_ground(blocks, tops, biomes, patches, bands, surface, soil, cliff, shore, patch):
    """Give every column its surface, soil and strata."""
    size = tops.shape[0]
    last = size - 1
    for x in range(size):
        for z in range(size):
            biome = biomes[x, z]
            top = tops[x, z]
            lowest = min(
                min(tops[(x + 1) & last, z], tops[(x - 1) & last, z]),
                min(tops[x, (z + 1) & last], tops[x, (z - 1) & last]),
            )
            steep = top - lowest > 2
            upper = surface[biome]
            under = soil[biome]
            if patches[x, z] > 0:
                upper = patch[biome]
            if top <= SEA:
                upper = shore[biome]
                under = shore[biome]
            elif steep:
                upper = cliff[biome]
                under = cliff[biome]
            if biome == _HIGHLANDS and top > 39 + (bands[x, z] >> 6):
                upper = _SNOW_BLOCK
            # Down from the sky: under every opening to the air lies a surface again.
            buried = 99
            for y in range(top, 0, -1):
                if blocks[x, z, y] != _STONE:
                    buried = -1
                    continue
                buried += 1
                if y == top or buried == 0:
                    buried = 0
                    blocks[x, z, y] = upper
                elif buried <= 3:
                    blocks[x, z, y] = under
                if biome == _BADLANDS and (steep or buried > 0) and y > SEA - 4:
                    stripe = ((y * 16 + bands[x, z]) >> 4) % 11
                    blocks[x, z, y] = _FIRST_CLAY + (0x31204103020 >> (4 * stripe)) % 16
            if biome == _SNOW and blocks[x, z, SEA] == _WATER:
                blocks[x, z, SEA] = _ICE


def build_ground(
    seed: int, blocks: UInt8[np.ndarray, "x z y"]
) -> tuple[Int64[np.ndarray, "x z"], Int64[np.ndarray, "x z"]]:
    """Fill empty `blocks` with ground and water.

    Returns the y of the uppermost ground block of every column and its biome.
    """
    biomes = biome_map(seed)
    ruggedness = blended(biomes, "ruggedness")
    height = height_map(seed, biomes, ruggedness)
    lattice = lattice_noise(seed, 230, SIZE >> 3, (HEIGHT >> 2) + 1)
    tops = _raise_ground(blocks, height, ruggedness, lattice)
    trails = abs(octaves(SIZE, seed, 240, (6, 3072), (4, 1024)))
    patches = np.maximum(octaves(SIZE, seed, 250, (4, 4096)) - 1150, 120 - trails)
    bands = octaves(SIZE, seed, 260, (5, 128))
    materials = [block_column(name) for name in ("surface", "soil", "cliff", "shore", "patch")]
    _paint_ground(blocks, tops, biomes, patches, bands, *materials)
    return tops, biomes
