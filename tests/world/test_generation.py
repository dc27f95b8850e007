"""Worlds: the same bytes everywhere, and what is promised about them."""

import hashlib

import numpy as np
import pytest

from decmem.world.biomes import BIOMES, biome_map
from decmem.world.blocks import BLOCK_TYPES, SHAPES, Shape, block_id
from decmem.world.generation import build_world
from decmem.world.grid import CEILING, HEIGHT, SEA, SIZE, World
from decmem.world.noise import octaves

# If these change, worlds have changed: raise WORLD_VERSION, and retrain what was trained on them.
HASHES = {
    0: "8f951cc4f6936c37966249e01016e0cb3af2c70f97da49568679fd0846818ddc",
    1: "4d70139e1402b75ffcf6717a75dfbbad1e25920e8d156bfddea6697822146c31",
    10_000_000: "5f0a5626a056613df1abe5ea956522aebf997e6c29e127d85f6f1c12d30f253b",
}


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(7)


@pytest.mark.parametrize("seed", HASHES)
def test_a_seed_gives_the_same_bytes_on_every_machine(seed: int) -> None:
    digest = hashlib.sha256(build_world(seed).buffer.tobytes()).hexdigest()
    assert digest == HASHES[seed]


def test_cells_hold_known_blocks(world: World) -> None:
    assert world.cells.shape == (SIZE, SIZE, HEIGHT)
    assert world.blocks.max() < len(BLOCK_TYPES)
    assert len(np.unique(world.blocks)) >= 30


def test_ground_is_closed_below(world: World) -> None:
    assert (SHAPES[world.blocks[:, :, :4]] == Shape.CUBE).all()


def test_water_lies_at_the_sea_or_in_wells(world: World) -> None:
    _, _, heights = np.nonzero(world.blocks == block_id("water"))
    assert (heights <= SEA).mean() > 0.99
    assert 0.02 < (world.blocks[:, :, SEA] == block_id("water")).mean() < 0.35


def test_every_biome_lies_in_every_world() -> None:
    for seed in range(4):
        shares = np.bincount(biome_map(seed).ravel(), minlength=len(BIOMES)) / SIZE**2
        assert (shares > 0.03).all()


def test_slopes_can_mostly_be_walked() -> None:
    from decmem.world.terrain import build_ground

    tops, _ = build_ground(3, np.zeros((SIZE, SIZE, HEIGHT), np.uint8))
    steps = abs(tops - np.roll(tops, 1, 0))
    assert (steps <= 1).mean() > 0.9


def test_no_seam_where_the_world_repeats() -> None:
    noise = octaves(SIZE, 5, 1, (6, 4096), (5, 2048))
    inside = abs(np.diff(noise, axis=0)).max()
    assert abs(noise[0] - noise[-1]).max() <= inside


def test_landmarks_stand_about_every_ten_columns(world: World) -> None:
    made = [block_id(f"{name} log") for name in ("oak", "birch", "pine", "palm")]
    made += [block_id(name) for name in ("red", "blue", "yellow", "cactus", "cobble", "bricks")]
    columns = np.isin(world.blocks, made).any(2)
    parts = columns.reshape(16, 16, 16, 16).any((1, 3))
    assert parts.mean() > 0.6


def test_ceiling_is_tight(world: World) -> None:
    ceiling = int(world.buffer[CEILING])
    assert not world.blocks[:, :, ceiling:].any()
    assert world.blocks[:, :, ceiling - 1].any()


def test_light_by_definition(world: World) -> None:
    """0 in solids; 3 under open sky; 2 within three columns of an open one, else 1."""
    shapes = SHAPES[world.blocks]
    solid = (shapes == Shape.CUBE) | (shapes == Shape.WATER)
    roofs = HEIGHT - 1 - np.argmax(solid[:, :, ::-1], 2)
    light = world.cells >> 6
    rng = np.random.default_rng(0)
    for x, z in rng.integers(0, SIZE, (400, 2)):
        for y in range(1, HEIGHT):
            if solid[x, z, y]:
                expected = 0
            elif y > roofs[x, z]:
                expected = 3
            else:
                around = [(x + dx, z + dz) for dx in (-3, 0, 3) for dz in (-3, 0, 3)]
                open_near = any(roofs[a % SIZE, b % SIZE] < y for a, b in around)
                expected = 2 if open_near else 1
            assert light[x, z, y] == expected
