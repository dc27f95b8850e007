"""Sketches of what grows: trees, cacti, toadstools."""

from decmem.world.sketch import Sketch


def oak(height: int, leaves: str = "oak leaves", log: str = "oak log") -> Sketch:
    """A round crown on a short trunk."""
    tree = Sketch()
    tree.column(0, 0, height, log)
    tree.disc(height - 2, 5, leaves)
    tree.disc(height - 1, 6, leaves)
    tree.disc(height, 5, leaves)
    tree.disc(height + 1, 2, leaves)
    return tree


def great_oak(height: int, leaves: str, log: str) -> Sketch:
    """A spreading crown, three blocks in radius."""
    tree = Sketch()
    tree.column(0, 0, height, log)
    for x, z in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        tree.put(x, height - 1, z, log)
    tree.disc(height - 1, 8, leaves)
    tree.disc(height, 10, leaves)
    tree.disc(height + 1, 8, leaves)
    tree.disc(height + 2, 4, leaves)
    return tree


def birch(height: int) -> Sketch:
    """A slender crown high on a pale trunk."""
    tree = Sketch()
    tree.column(0, 0, height, "birch log")
    for y, reach in ((-3, 2), (-2, 4), (-1, 4), (0, 2), (1, 1)):
        tree.disc(height + y, reach, "birch leaves")
    return tree


def pine(height: int, leaves: str = "pine leaves") -> Sketch:
    """A cone of tiers."""
    tree = Sketch()
    tree.column(0, 0, height, "pine log")
    tree.disc(height + 1, 0, leaves)
    tree.disc(height, 1, leaves)
    for tier, y in enumerate(range(height - 1, 2, -1)):
        tree.disc(y, (2, 5, 2, 6, 4, 8, 5)[min(tier, 6)], leaves)
    return tree


def palm(height: int, lean: int) -> Sketch:
    """A leaning trunk under a star of fronds."""
    tree = Sketch()
    top = 0
    for y in range(height):
        top = lean * y // (height - 1)
        tree.put(top, y, 0, "palm log")
    tree.put(top, height, 0, "palm leaves")
    for x, z in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        tree.put(top + x, height, z, "palm leaves")
        tree.put(top + 2 * x, height, 2 * z, "palm leaves")
        tree.put(top + 3 * x, height - 1, 3 * z, "palm leaves")
        tree.put(top + x + z, height, z - x, "palm leaves")
        tree.put(top + 2 * (x + z), height - 1, 2 * (z - x), "palm leaves")
    return tree


def cactus(height: int, arms: int) -> Sketch:
    """A column with up to two arms."""
    plant = Sketch()
    plant.column(0, 0, height, "cactus")
    for side in (1, -1)[:arms]:
        plant.put(side, height - 3 + (side < 0), 0, "cactus")
        plant.fill([2 * side], range(height - 3 + (side < 0), height), [0], "cactus")
    return plant


def dead_tree(height: int) -> Sketch:
    """A bare trunk with two branches."""
    tree = Sketch()
    tree.column(0, 0, height, "oak log")
    tree.put(1, height - 2, 0, "oak log")
    tree.put(2, height - 1, 0, "oak log")
    tree.put(0, height - 3, -1, "oak log")
    tree.put(0, height - 2, -2, "oak log")
    return tree


def toadstool(height: int) -> Sketch:
    """A giant red cap on a white stem."""
    plant = Sketch()
    plant.column(0, 0, height, "birch log")
    plant.disc(height - 1, 8, "toadstool")
    plant.fill(range(-1, 2), [height - 1], range(-1, 2), "clear")
    plant.put(0, height - 1, 0, "birch log")
    plant.disc(height, 4, "toadstool")
    return plant
