"""Procedural 16x16 pictures, in integers: the raw material of the block textures.

Contrast is kept soft (structures of 2-4 texels, a few per cent of brightness): the world is
seen through a strongly compressing autoencoder, and texel noise would be all it spends bits on.
"""

import numpy as np

from decmem.world.hashing import draws

SIDE = 16
Colour = tuple[int, int, int]

_ROW, _COLUMN = np.mgrid[0:SIDE, 0:SIDE]


def _white(salt: int, rows: int, columns: int) -> np.ndarray:
    return draws(77, salt, rows, columns, 2001) - 1000


def _spread(values: np.ndarray, axis: int) -> np.ndarray:
    """Stretch one axis to 16 texels by periodic linear interpolation."""
    count = values.shape[axis]
    cell = SIDE // count
    positions = 2 * np.arange(SIDE) + 1 - cell
    left, rest = positions // (2 * cell), positions % (2 * cell)
    shape = [1, 1]
    shape[axis] = SIDE
    rest = rest.reshape(shape)
    low = np.take(values, left % count, axis)
    high = np.take(values, (left + 1) % count, axis)
    return (low * (2 * cell - rest) + high * rest) // (2 * cell)


def smooth(salt: int, rows: int, columns: int) -> np.ndarray:
    """Periodic noise (16, 16) in [-1000, 1000] with rows x columns independent values."""
    return _spread(_spread(_white(salt, rows, columns), 0), 1)


def clumps(salt: int) -> np.ndarray:
    """Noise of 4-texel structures with finer ones on top, in [-1000, 1000]."""
    return (2 * smooth(salt, 4, 4) + smooth(salt + 1, 8, 8)) // 2


def shaded(colour: Colour, permille: np.ndarray) -> np.ndarray:
    """A picture (16, 16, 3) of one colour, brightened by `permille` thousandths."""
    return np.clip(np.array(colour) * (1000 + permille[..., None]) // 1000, 0, 255)


def mixed(low: np.ndarray | Colour, high: np.ndarray | Colour, weight: np.ndarray) -> np.ndarray:
    """Blend two colours or pictures; weight 0 takes `low`, 1000 takes `high`."""
    share = np.clip(weight, 0, 1000)[..., None]
    return (np.array(low) * (1000 - share) + np.array(high) * share) // 1000


def ground(salt: int, colour: Colour, spot: Colour, permille: int = 45) -> np.ndarray:
    """Soil: two tones in soft clumps."""
    noise = clumps(salt)
    return mixed(shaded(colour, noise * permille // 1000), spot, smooth(salt + 5, 8, 8) * 2 - 900)


def turf_side(salt: int, turf: np.ndarray, soil: np.ndarray) -> np.ndarray:
    """Soil with a ragged fringe of turf hanging over its upper edge."""
    fringe = 6 + (smooth(salt, 1, 8)[0] + 600) // 500
    return np.where((fringe[None, :] > _ROW)[..., None], turf, soil)


def layers(salt: int, colours: list[Colour], permille: int = 30) -> np.ndarray:
    """Horizontal bands, a colour each, with soft streaks."""
    band = np.array(colours)[_ROW * len(colours) // SIDE]
    streak = smooth(salt, 16, 2) * permille // 1000
    return np.clip(band * (1000 + streak[..., None]) // 1000, 0, 255)


def masonry(
    salt: int, colour: Colour, joint: Colour, height: int, width: int, permille: int = 70
) -> np.ndarray:
    """Courses of bricks, `height` x `width` texels each, one-texel joints, a tone per brick."""
    course = _ROW // height
    shifted = (_COLUMN + (course % 2) * (width // 2)) % SIDE
    tone = _white(salt, SIDE, SIDE)[course, shifted // width] * permille // 1000
    brick = shaded(colour, tone + smooth(salt + 1, 8, 8) * 25 // 1000)
    is_joint = (_ROW % height == height - 1) | (shifted % width == width - 1)
    return np.where(is_joint[..., None], np.array(joint), brick)


def pebbles(salt: int, colour: Colour, joint: Colour, count: int, permille: int = 90) -> np.ndarray:
    """Rounded stones: the cells of scattered points, darker towards their rims."""
    points = draws(78, salt, count, 2, SIDE)
    dr = (_ROW[..., None] - points[:, 0] + SIDE // 2) % SIDE - SIDE // 2
    dc = (_COLUMN[..., None] - points[:, 1] + SIDE // 2) % SIDE - SIDE // 2
    distance = dr * dr + dc * dc
    nearest = np.argsort(distance, -1, kind="stable")
    ranked = np.take_along_axis(distance, nearest, -1)
    tone = _white(salt + 1, 1, count)[0][nearest[..., 0]] * permille // 1000
    stone = shaded(colour, tone)
    return mixed(joint, stone, 350 + (ranked[..., 1] - ranked[..., 0]) * 90)


def boards(salt: int, colour: Colour, joint: Colour) -> np.ndarray:
    """Four horizontal planks."""
    tone = _white(salt, 4, 1)[_ROW // 4, 0] * 60 // 1000
    grain = smooth(salt + 1, 16, 2) * 30 // 1000
    return np.where((_ROW % 4 == 3)[..., None], np.array(joint), shaded(colour, tone + grain))


def bark(salt: int, colour: Colour, groove: Colour) -> np.ndarray:
    """Upright streaks."""
    return mixed(shaded(colour, smooth(salt, 4, 8) * 50 // 1000), groove, smooth(salt + 1, 2, 8))


def birch_bark(salt: int, colour: Colour, scar: Colour) -> np.ndarray:
    """Pale bark with short dark scars lying across."""
    scars = (smooth(salt + 1, 8, 4) > 420) & (_ROW % 2 == 0)
    return np.where(
        scars[..., None], np.array(scar), shaded(colour, smooth(salt, 4, 8) * 40 // 1000)
    )


def rings(colour: Colour, line: Colour) -> np.ndarray:
    """The cut end of a log."""
    reach = np.maximum(abs(2 * _ROW - 15), abs(2 * _COLUMN - 15)) // 2
    return mixed(colour, line, np.where(reach == 7, 1000, (reach % 3 == 1) * 380))


def foliage(salt: int, colour: Colour, dark: Colour, light: Colour) -> np.ndarray:
    """Clumps of leaves with shadow between and light upon them."""
    noise = clumps(salt)
    return mixed(mixed(colour, dark, -noise - 100), light, noise - 200)


def painted(salt: int, colour: Colour) -> np.ndarray:
    """A plain painted block with a faint bevel."""
    edge = (_ROW == 0) | (_ROW == 15) | (_COLUMN == 0) | (_COLUMN == 15)
    return shaded(colour, smooth(salt, 4, 4) * 30 // 1000 - np.where(edge, 60, 0))


def ribs(salt: int, colour: Colour, groove: Colour) -> np.ndarray:
    """Upright ribs, four texels apart."""
    weight = np.array([1000, 250, 0, 250])[_COLUMN % 4]
    return mixed(shaded(colour, smooth(salt, 4, 4) * 40 // 1000), groove, weight)


def waves(salt: int, colour: Colour, crest: Colour) -> np.ndarray:
    """Water: broad soft crests."""
    return mixed(
        shaded(colour, smooth(salt, 8, 4) * 40 // 1000), crest, smooth(salt + 1, 4, 2) - 150
    )


def shingles(salt: int, colour: Colour, shadow: Colour) -> np.ndarray:
    """Roof tiles in staggered rows, shaded towards their lower edge."""
    row = _ROW // 4
    shifted = (_COLUMN + (row % 2) * 2) % SIDE
    tone = _white(salt, 4, 4)[row, shifted // 4] * 50 // 1000
    weight = np.array([0, 0, 150, 800])[_ROW % 4] + (shifted % 4 == 3) * 300
    return mixed(shaded(colour, tone), shadow, weight)


def dots(salt: int, colour: Colour, dot: Colour) -> np.ndarray:
    """Round dots on a plain ground."""
    inside = np.zeros((SIDE, SIDE), bool)
    for r, c, size in ((4, 4, 7), (11, 12, 7), (13, 5, 3), (5, 12, 3)):
        inside |= (_ROW - r) ** 2 + (_COLUMN - c) ** 2 <= size
    return np.where(
        inside[..., None], np.array(dot), shaded(colour, smooth(salt, 4, 4) * 40 // 1000)
    )


def glow(colour: Colour, frame: Colour) -> np.ndarray:
    """A bright pane in a dark frame."""
    reach = np.maximum(abs(2 * _ROW - 15), abs(2 * _COLUMN - 15)) // 2
    return mixed(colour, frame, np.where(reach >= 7, 1000, (reach - 3) * 60))


def drawn(art: str, colours: dict[str, Colour]) -> np.ndarray:
    """A cut-out picture (16, 16, 4) from eight lines of eight letters; '.' is transparent."""
    picture = np.zeros((8, 8, 4), np.int64)
    for r, line in enumerate(art.split()):
        for c, letter in enumerate(line):
            if letter != ".":
                picture[r, c] = (*colours[letter], 255)
    return picture.repeat(2, 0).repeat(2, 1)
