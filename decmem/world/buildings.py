"""Sketches of what was built: pillars, walls, arches, ruins, huts, wells."""

from itertools import product

from decmem.world.sketch import Sketch


def pillar(height: int, thick: int, stripe: int, cap: str) -> Sketch:
    """A painted pillar, every `stripe`-th course in the second colour (0: plain)."""
    work = Sketch()
    for y in range(height):
        name = "trim" if stripe and y % stripe == stripe - 1 else "paint"
        work.fill(range(thick), [y], range(thick), name)
    if cap:
        work.fill(range(thick), [height], range(thick), cap)
    return work


def cross_pillar(height: int) -> Sketch:
    """A pillar with a plus-shaped plan and a lamp on top."""
    work = Sketch()
    for x, z in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
        work.column(x, z, height - (x != 0 or z != 0), "paint")
    work.put(0, height, 0, "lamp")
    for x, z in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        work.put(x, height - 1, z, "trim")
    return work


def cubes(sizes: tuple[int, ...]) -> Sketch:
    """Cubes of falling size on top of each other, in turn in both colours."""
    work = Sketch()
    y = 0
    for number, size in enumerate(sizes):
        start = -(size // 2)
        side = range(start, start + size)
        work.fill(side, range(y, y + size), side, ("paint", "trim")[number % 2])
        y += size
    return work


def wall(length: int, height: int, broken: bool) -> Sketch:
    """A crenellated or broken wall along x."""
    work = Sketch()
    half = length // 2
    for x in range(-half, length - half):
        drop = (2 * abs(x) // 2) % 3 if broken else (x % 2)
        work.column(x, 0, max(height - drop, 1), "wall")
    if not broken:
        work.column(-half, 0, height + 1, "paint")
        work.column(length - half - 1, 0, height + 1, "paint")
    return work


def arch(span: int, height: int, thick: int) -> Sketch:
    """Two posts and a beam to walk under."""
    work = Sketch()
    half = span // 2
    for z in range(thick):
        work.column(-half, z, height, "wall")
        work.column(half, z, height, "wall")
        work.fill(range(-half, half + 1), [height], [z], "paint")
        work.fill(range(-half + 1, half), [height - 1], [z], "clear")
    work.fill(range(-half + 1, half), range(height), range(thick), "clear")
    return work


def gate() -> Sketch:
    """A red gate with two beams."""
    work = Sketch()
    for x in (-2, 2):
        work.column(x, 0, 6, "red")
    work.fill(range(-2, 3), [4], [0], "red")
    work.fill(range(-3, 4), [6], [0], "black")
    return work


def ruin(heights: tuple[int, ...]) -> Sketch:
    """A corner of a fallen house: two walls of uneven height, a floor, a lost block."""
    work = Sketch()
    count = len(heights) // 2
    for step in range(count):
        work.column(step - 3, -3, heights[step], "wall")
        work.column(-3, step - 3, heights[count + step], "wall")
    for x, z in product(range(-2, 2), range(-2, 2)):
        if (x + 2 * z) % 3:
            work.put(x, -1, z, "wall")
    work.put(1, 0, 1, "wall")
    work.put(-3, heights[0], -3, "trim")
    return work


def hut() -> Sketch:
    """A small house with a door, windows and a stepped roof."""
    work = Sketch()
    side = range(-2, 3)
    work.fill(side, [-1], side, "cobble")
    for x, z in product(side, side):
        if max(abs(x), abs(z)) == 2:
            work.column(x, z, 3, "oak log" if abs(x) == abs(z) else "planks")
    work.fill(range(-1, 2), range(3), range(-1, 2), "clear")
    work.fill([0], range(2), [2], "clear")
    for x, z in ((2, 0), (-2, 0), (0, -2)):
        work.put(x, 1, z, "clear")
    work.fill(range(-3, 4), [3], range(-3, 4), "roof")
    work.fill(side, [4], side, "roof")
    work.fill(range(-1, 2), [5], range(-1, 2), "roof")
    work.put(0, 6, 0, "paint")
    return work


def well() -> Sketch:
    """A ring of stones around water, with a roof on posts."""
    work = Sketch()
    side = range(-1, 2)
    work.fill(side, [0], side, "cobble")
    work.put(0, 0, 0, "water")
    work.put(0, -1, 0, "cobble")
    for x, z in ((1, 1), (-1, -1)):
        work.fill([x], [1, 2], [z], "oak log")
    work.fill(side, [3], side, "roof")
    return work


def lamp_post(height: int) -> Sketch:
    """A lamp on a post."""
    work = Sketch()
    work.column(0, 0, height, "oak log")
    work.put(0, height, 0, "lamp")
    return work


def hay_stack() -> Sketch:
    """A few bales."""
    work = Sketch()
    work.fill([0, 1], [0, 1], [0, 1], "hay")
    work.put(2, 0, 0, "hay")
    work.put(0, 2, 0, "hay")
    return work


def boulder(reach: int) -> Sketch:
    """A half-sunk ball of rock."""
    work = Sketch()
    work.ball(0, reach, "rock")
    work.put(1, 1, 0, "rock")
    return work


def cairn(height: int) -> Sketch:
    """Stones piled to a point."""
    work = Sketch()
    work.disc(0, 2, "rock")
    work.disc(1, 1, "rock")
    work.column(0, 0, height, "rock")
    work.put(0, height, 0, "paint")
    return work


def pyramid() -> Sketch:
    """A stepped pyramid with a coloured top."""
    work = Sketch()
    for y in range(3):
        side = range(-3 + y, 4 - y)
        work.fill(side, [y], side, "sandstone")
    work.put(0, 3, 0, "paint")
    return work


def igloo() -> Sketch:
    """A snow dome with a door."""
    work = Sketch()
    work.ball(0, 8, "snow")
    work.fill(range(-1, 2), range(2), range(-1, 2), "clear")
    work.fill([0], range(2), [2, 3], "clear")
    work.put(0, 2, 0, "lamp")
    return work


def spire(height: int) -> Sketch:
    """A needle of banded clay."""
    work = Sketch()
    bands = ("rust clay", "ochre clay", "rust clay", "cream clay", "plum clay")
    for y in range(height):
        work.disc(y, 4 if y < 2 else 2 if y < height - 2 else 1, bands[y % 5])
    return work
