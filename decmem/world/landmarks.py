"""Which landmark stands where: about one for every nine columns square, in a jittered grid."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Int64, UInt8

from decmem.world import buildings as b
from decmem.world import plants as p
from decmem.world.biomes import BIOMES
from decmem.world.blocks import PAINTS, SHAPES, Shape, block_id
from decmem.world.compiled import compiled
from decmem.world.grid import HEIGHT, SEA
from decmem.world.hashing import at, below, stream, successor
from decmem.world.sketch import CLEAR, SLOT, Sketch

_CELL_BITS = 3
"""Landmark cells are 8x8 columns; a landmark stays in its cell, so none run into each other."""

_AIR, _CUBE, _PLANT, _WATER = (int(shape) for shape in
                               (Shape.EMPTY, Shape.CUBE, Shape.PLANT, Shape.WATER))  # fmt: skip
_FIRST_LEAVES = block_id("oak leaves")
_LAST_LEAVES = block_id("amber leaves")


def _kinds() -> dict[str, list[Sketch]]:
    return {
        "oak": [p.oak(h) for h in (4, 5, 6)] + [p.great_oak(6, "oak leaves", "oak log")],
        "amber": [p.oak(h, "amber leaves") for h in (4, 5, 6)],
        "birch": [p.birch(h) for h in (6, 7, 8)],
        "pine": [p.pine(h) for h in (6, 7, 8, 9)],
        "pink": [p.oak(5, "pink leaves"), p.great_oak(5, "pink leaves", "pine log"),
                 p.great_oak(6, "pink leaves", "pine log")],
        "palm": [p.palm(h, lean) for h in (5, 6, 7) for lean in (0, 1)],
        "cactus": [p.cactus(3, 0), p.cactus(4, 1), p.cactus(5, 1), p.cactus(5, 2)],
        "dead tree": [p.dead_tree(h) for h in (4, 5, 6)],
        "toadstool": [p.toadstool(h) for h in (4, 5)],
        "pillar": [b.pillar(h, 1, s, cap) for h in (4, 6, 7) for s in (0, 2, 3)
                   for cap in ("", "lamp")]
                  + [b.pillar(h, 2, s, "") for h in (4, 6, 8) for s in (0, 2, 3, 4)]
                  + [b.cross_pillar(h) for h in (5, 7)] + [b.pillar(3, 3, 2, "")],
        "cubes": [b.cubes((3, 2, 1)), b.cubes((3, 1)), b.cubes((2, 2)), b.cubes((1, 3))],
        "wall": [b.wall(n, h, broken) for n in (5, 7) for h in (2, 3) for broken in (False, True)],
        "arch": [b.arch(5, 4, 1), b.arch(7, 5, 2), b.arch(7, 4, 1), b.arch(5, 5, 2)],
        "gate": [b.gate()],
        "ruin": [b.ruin((4, 3, 3, 1, 2, 0, 3, 2, 4, 1, 1, 0)),
                 b.ruin((5, 5, 2, 2, 1, 4, 1, 3, 3, 1)),
                 b.ruin((3, 1, 3, 1, 3, 3, 1, 3, 1, 3))],
        "hut": [b.hut()],
        "well": [b.well()],
        "lamp": [b.lamp_post(3), b.lamp_post(4)],
        "hay": [b.hay_stack()],
        "boulder": [b.boulder(r) for r in (2, 3, 5, 6)],
        "cairn": [b.cairn(2), b.cairn(3)],
        "pyramid": [b.pyramid()],
        "igloo": [b.igloo()],
        "spire": [b.spire(h) for h in (5, 7, 8)],
    }  # fmt: skip


# Per biome: odds of each kind in 100 (the rest stays open), odds of a second tree in the cell's
# corner, and what that tree is.
_ODDS: dict[str, tuple[dict[str, int], int, str]] = {
    "meadow": ({"oak": 15, "birch": 6, "pillar": 14, "cubes": 4, "wall": 4, "arch": 4, "ruin": 3,
                "boulder": 3, "hut": 4, "well": 3, "lamp": 2, "hay": 4}, 5, "oak"),
    "forest": ({"oak": 24, "birch": 11, "amber": 10, "toadstool": 5, "pillar": 9, "cubes": 2,
                "ruin": 3, "boulder": 3, "lamp": 2, "arch": 2, "hut": 2}, 36, "oak"),
    "desert": ({"cactus": 16, "palm": 8, "pillar": 14, "cubes": 4, "wall": 4, "arch": 4, "ruin": 4,
                "pyramid": 4, "dead tree": 2, "boulder": 2}, 5, "cactus"),
    "snow": ({"pine": 26, "pillar": 14, "cubes": 4, "igloo": 4, "boulder": 4, "lamp": 3, "hut": 3,
              "cairn": 3, "arch": 2, "ruin": 2}, 18, "pine"),
    "badlands": ({"spire": 11, "dead tree": 7, "cactus": 7, "pillar": 14, "cubes": 3, "arch": 6,
                  "boulder": 4, "ruin": 4, "wall": 3, "cairn": 3}, 5, "dead tree"),
    "highlands": ({"boulder": 10, "pine": 13, "cairn": 5, "pillar": 14, "cubes": 3, "arch": 4,
                   "ruin": 6, "wall": 3, "hut": 3, "amber": 4, "lamp": 2}, 9, "pine"),
    "blossom": ({"pink": 24, "birch": 4, "gate": 6, "lamp": 4, "pillar": 13, "cubes": 3, "well": 3,
                 "hut": 3, "wall": 3, "arch": 3, "boulder": 2}, 15, "pink"),
}  # fmt: skip

_WALLS = ("stone bricks", "bricks", "mossy cobble", "cobble", "planks")
_ROOFS = ("red tiles", "blue tiles", "planks", "hay")
_ROCKS = {
    "desert": "sandstone",
    "badlands": "brown clay",
    "snow": "cobble",
    "forest": "mossy cobble",
}


@dataclass(frozen=True)
class Catalogue:
    """All sketches packed for the stamping loop.

    voxels (V, 4): x, y, z, code; spans (S, 4): first and end row in `voxels`, reach around the
    anchor, and whether it may stand in water; deal (biomes, 100): for each hundredth the first
    sketch and their number (0: nothing), (biomes, 100, 2); thicket (biomes, 3): odds, first sketch,
    number; rocks (biomes,); walls, roofs, paints: block numbers to choose from.
    """

    voxels: Int64[np.ndarray, "voxels 4"]
    spans: Int64[np.ndarray, "sketches 4"]
    deal: Int64[np.ndarray, "biomes 100 2"]
    thicket: Int64[np.ndarray, "biomes 3"]
    rocks: Int64[np.ndarray, " biomes"]
    walls: Int64[np.ndarray, " walls"]
    roofs: Int64[np.ndarray, " roofs"]
    paints: Int64[np.ndarray, " paints"]


@cache
def catalogue() -> Catalogue:
    """The catalogue of this world version."""
    rows, spans, where = [], [], {}
    total = 0
    for kind, sketches in _kinds().items():
        where[kind] = (len(spans), len(sketches))
        for sketch in sketches:
            voxels = sketch.rows()
            reach = int(abs(voxels[:, [0, 2]]).max())
            spans.append((total, total + len(voxels), reach, kind in ("pillar", "cubes", "arch")))
            total += len(voxels)
            rows.append(voxels)
    deal = np.zeros((len(BIOMES), 100, 2), np.int64)
    thicket = np.zeros((len(BIOMES), 3), np.int64)
    for number, biome in enumerate(BIOMES):
        odds, extra, tree = _ODDS[biome.name]
        hundredths = [where[kind] for kind, share in odds.items() for _ in range(share)]
        assert len(hundredths) <= 100, biome.name
        deal[number, : len(hundredths)] = hundredths
        thicket[number] = (extra, *where[tree])

    def numbers(names: tuple[str, ...]) -> np.ndarray:
        return np.array([block_id(name) for name in names], np.int64)

    rocks = numbers(tuple(_ROCKS.get(biome.name, "stone") for biome in BIOMES))
    return Catalogue(
        np.concatenate(rows), np.array(spans, np.int64), deal, thicket, rocks,
        numbers(_WALLS), numbers(_ROOFS), numbers(PAINTS),
    )  # fmt: skip


@compiled
def _stamp(blocks, voxels, first, end, x, y, z, turn, slots):
    """Set a sketch down, turned by quarter circles; its lowest layer reaches down to the ground."""
    last = blocks.shape[0] - 1
    for row in range(first, end):
        dx, dz = voxels[row, 0], voxels[row, 2]
        if turn & 1:
            dx, dz = -dz, dx
        if turn & 2:
            dx, dz = -dx, -dz
        cx, cz, cy = (x + dx) & last, (z + dz) & last, y + voxels[row, 1]
        if cy < 1 or cy >= HEIGHT:
            continue
        value = voxels[row, 3]
        if value == CLEAR:
            value = 0
        elif value >= SLOT:
            value = slots[value - SLOT]
        if _FIRST_LEAVES <= value <= _LAST_LEAVES and SHAPES[blocks[cx, cz, cy]] != _AIR:
            continue
        blocks[cx, cz, cy] = value
        if voxels[row, 1] == 0 and value != 0:
            below_it = cy - 1
            while below_it > 0 and SHAPES[blocks[cx, cz, below_it]] != _CUBE:
                blocks[cx, cz, below_it] = value
                below_it -= 1


@compiled
def _unevenness(tops, x, z, reach):
    last = tops.shape[0] - 1
    low = high = tops[x & last, z & last]
    for dx in range(-reach, reach + 1, max(reach, 1)):
        for dz in range(-reach, reach + 1, max(reach, 1)):
            top = tops[(x + dx) & last, (z + dz) & last]
            low = min(low, top)
            high = max(high, top)
    return high - low


@compiled
def _place(blocks, tops, voxels, spans, sketch, x0, z0, corner, slots, state):
    """Find even ground for a sketch near its cell's corner and stamp it there."""
    last = tops.shape[0] - 1
    reach = spans[sketch, 2]
    room = corner - 2 * reach
    best_x, best_z, best = 0, 0, 1 << 20
    for _ in range(3):
        state = successor(state)
        x = x0 + reach + below(state, max(room, 1))
        state = successor(state)
        z = z0 + reach + below(state, max(room, 1))
        cost = _unevenness(tops, x, z, reach)
        if cost < best:
            best_x, best_z, best = x & last, z & last, cost
    top = tops[best_x, best_z]
    above = blocks[best_x, best_z, top + 1]
    wet = above != 0 and SHAPES[above] == _WATER
    if best > 4 or (wet and spans[sketch, 3] == 0) or (above != 0 and not wet):
        return state
    base = SEA + 1 if wet else top + 1
    turn = below(successor(state), 4)
    _stamp(blocks, voxels, spans[sketch, 0], spans[sketch, 1], best_x, base, best_z, turn, slots)
    return successor(successor(state))


@compiled
def _place_all(
    blocks, tops, biomes, seed, voxels, spans, deal, thicket, rocks, walls, roofs, paints
):
    size = tops.shape[0]
    cell = 1 << _CELL_BITS
    key = stream(seed, 300)
    slots = np.zeros(8, np.int64)
    for i in range(size >> _CELL_BITS):
        for j in range(size >> _CELL_BITS):
            state = at(key, i, j)
            x0, z0 = i << _CELL_BITS, j << _CELL_BITS
            biome = biomes[x0 + cell // 2, z0 + cell // 2]
            state = successor(state)
            first_paint = below(state, len(paints))
            state = successor(state)
            slots[0] = paints[first_paint]
            slots[1] = paints[(first_paint + 1 + below(state, len(paints) - 1)) % len(paints)]
            state = successor(state)
            slots[2] = walls[below(state, len(walls))]
            state = successor(state)
            slots[3] = roofs[below(state, len(roofs))]
            slots[4] = rocks[biome]
            state = successor(state)
            hundredth = below(state, 100)
            state = successor(state)
            if deal[biome, hundredth, 1] > 0:
                sketch = deal[biome, hundredth, 0] + below(state, deal[biome, hundredth, 1])
                state = _place(blocks, tops, voxels, spans, sketch, x0, z0, cell, slots, state)
            state = successor(state)
            if below(state, 100) < thicket[biome, 0]:
                state = successor(state)
                sketch = thicket[biome, 1] + below(state, thicket[biome, 2])
                _place(blocks, tops, voxels, spans, sketch, x0, z0, cell, slots, state)


def place_landmarks(
    seed: int,
    blocks: UInt8[np.ndarray, "x z y"],
    tops: Int64[np.ndarray, "x z"],
    biomes: Int64[np.ndarray, "x z"],
) -> None:
    """Set trees and buildings on the ground, in place."""
    c = catalogue()
    _place_all(
        blocks, tops, biomes, seed, c.voxels, c.spans, c.deal, c.thicket, c.rocks,
        c.walls, c.roofs, c.paints,
    )  # fmt: skip
