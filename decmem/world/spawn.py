"""Where a walk begins: open, natural, walkable ground."""

import numpy as np

from decmem.world.angles import CIRCLE
from decmem.world.biomes import BIOMES
from decmem.world.blocks import BLOCK_BITS, SHAPES, Shape, block_id
from decmem.world.compiled import compiled
from decmem.world.grid import BLOCK_MASK, HEIGHT, SIZE, World
from decmem.world.hashing import draw, stream
from decmem.world.motion import UNIT, PlayerState
from decmem.world.steering import free_path

_PLANT = int(Shape.PLANT)
_REACH = 10
"""Half the side of the neighbourhood that must be walkable."""
_ENOUGH = (2 * _REACH + 1) ** 2 * 6 // 10
_UNREACHABLE = -99
_SALT = 600


def _natural() -> np.ndarray:
    table = np.zeros(1 << BLOCK_BITS, np.bool_)
    for biome in BIOMES:
        for name in (biome.surface, biome.patch, biome.shore):
            table[block_id(name)] = True
    return table


_NATURAL = _natural()


@compiled
def _ground(cells, x, z):
    """The y of the first free cell over a column's uppermost solid block, and that block."""
    y = HEIGHT - 1
    block = 0
    while y > 0:
        block = cells[x & (SIZE - 1), z & (SIZE - 1), y] & BLOCK_MASK
        if block != 0 and SHAPES[block] != _PLANT:
            break
        y -= 1
    return y + 1, block


@compiled
def _walkable_around(cells, x, z):
    """Columns of a square neighbourhood that can be reached by steps of one block."""
    side = 2 * _REACH + 1
    # A rim that cannot be stepped on saves asking for the edges.
    width = side + 2
    height = np.empty(width * width, np.int64)
    for place in range(width * width):
        i, j = place // width, place % width
        height[place] = _UNREACHABLE
        if 0 < i <= side and 0 < j <= side:
            top, block = _ground(cells, x + i - 1 - _REACH, z + j - 1 - _REACH)
            if _NATURAL[block]:
                height[place] = top
    queue = np.empty(side * side, np.int64)
    queue[0] = (_REACH + 1) * width + _REACH + 1
    here = height[queue[0]]
    height[queue[0]] = _UNREACHABLE
    levels = np.empty(side * side, np.int64)
    levels[0] = here
    head, tail = 0, 1
    while head < tail:
        for step in range(4):
            ahead = 1 if step % 2 else width
            place = queue[head] + (ahead if step < 2 else -ahead)
            if abs(height[place] - levels[head]) <= 1:
                queue[tail] = place
                levels[tail] = height[place]
                height[place] = _UNREACHABLE
                tail += 1
        head += 1
    return tail


@compiled
def _spawn(cells, seed, state):
    rng = np.empty(1, np.uint64)
    rng[0] = stream(seed, _SALT)
    best = -1
    for _ in range(200):
        x = draw(rng, SIZE)
        z = draw(rng, SIZE)
        yaw = draw(rng, CIRCLE)
        y, block = _ground(cells, x, z)
        if not _NATURAL[block]:
            continue
        area = _walkable_around(cells, x, z)
        if area > best:
            best = area
            state[0] = x * UNIT + UNIT // 2
            state[1] = y * UNIT
            state[2] = z * UNIT + UNIT // 2
            longest = -1
            for turn in range(8):
                heading = (yaw + turn * (CIRCLE // 8)) % CIRCLE
                free = free_path(cells, state[0], state[1], state[2], heading, 16)
                if free > longest:
                    longest = free
                    state[3] = heading
        if best >= _ENOUGH:
            break


def choose_spawn(world: World, seed: int) -> PlayerState:
    """A standing player on open ground; the place depends on the world and the seed alone."""
    state = np.array(PlayerState(0, 0, 0, 0, 0), np.int64)
    _spawn(world.cells, seed, state)
    return PlayerState(*(int(value) for value in state))
