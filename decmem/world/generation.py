"""From a seed to a world."""

import numpy as np
from jaxtyping import Int64, UInt8

from decmem.world.biomes import BIOMES
from decmem.world.blocks import block_id
from decmem.world.compiled import compiled
from decmem.world.grid import BUFFER, CELLS, HEIGHT, SIZE, World
from decmem.world.hashing import at, below, stream
from decmem.world.landmarks import place_landmarks
from decmem.world.lighting import finish
from decmem.world.noise import octaves
from decmem.world.terrain import build_ground


def _plant_tables() -> tuple[np.ndarray, np.ndarray]:
    """Per biome up to four plants and their odds."""
    plants = np.zeros((len(BIOMES), 4), np.int64)
    odds = np.zeros((len(BIOMES), 4), np.int64)
    for number, biome in enumerate(BIOMES):
        for slot, (name, share) in enumerate(biome.plants):
            plants[number, slot] = block_id(name)
            odds[number, slot] = share
    return plants, odds


@compiled
def _scatter_plants(blocks, tops, biomes, seed, thickets, plants, odds, surface):
    """Plants on untouched turf: each kind gathers in thickets of its own."""
    size = tops.shape[0]
    key = stream(seed, 400)
    for x in range(size):
        for z in range(size):
            biome = biomes[x, z]
            top = tops[x, z]
            if blocks[x, z, top] != surface[biome] or blocks[x, z, top + 1] != 0:
                continue
            chance = at(key, x, z)
            draw = below(chance, 256)
            for slot in range(4):
                # The same noise, read with another shift, stands for each kind's thickets.
                dense = thickets[(x + 64 * slot) & (size - 1), (z + 96 * slot) & (size - 1)] > 500
                share = odds[biome, slot] * (3 if dense else 1) // (1 if dense else 3)
                draw -= share
                if draw < 0:
                    blocks[x, z, top + 1] = plants[biome, slot]
                    break


def scatter_plants(
    seed: int,
    blocks: UInt8[np.ndarray, "x z y"],
    tops: Int64[np.ndarray, "x z"],
    biomes: Int64[np.ndarray, "x z"],
) -> None:
    """Set flowers and tufts on the turf, in place."""
    surface = np.array([block_id(biome.surface) for biome in BIOMES], np.int64)
    thickets = octaves(SIZE, seed, 410, (4, 4096))
    _scatter_plants(blocks, tops, biomes, seed, thickets, *_plant_tables(), surface)


def build_world(seed: int) -> World:
    """The world of a seed (any integer from 0 below 2**63): the same bytes on every machine."""
    buffer = np.zeros(BUFFER, np.uint8)
    blocks = buffer[:CELLS].reshape(SIZE, SIZE, HEIGHT)
    tops, biomes = build_ground(seed, blocks)
    place_landmarks(seed, blocks, tops, biomes)
    scatter_plants(seed, blocks, tops, biomes)
    finish(buffer)
    return World(seed, buffer)
