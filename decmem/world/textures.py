"""The texture atlas: every texture with its mip levels, packed for the renderers."""

from functools import cache

import numpy as np
from jaxtyping import UInt8, UInt32

from decmem.world import patterns as p
from decmem.world.blocks import CLAYS, PAINTS, TEXTURE_NAMES

LEVELS = 5
TEXELS = 16 * 16 + 8 * 8 + 4 * 4 + 2 * 2 + 1
"""Texels of one texture over its levels: 16x16, 8x8, 4x4, 2x2, 1x1."""

_SOIL = (126, 92, 64)
_PAINT = (
    (196, 48, 44), (232, 126, 38), (242, 204, 58), (124, 190, 48), (48, 178, 186),
    (52, 84, 186), (126, 62, 168), (236, 140, 174), (234, 234, 230), (44, 46, 54),
)  # fmt: skip
_CLAY = ((168, 84, 48), (206, 138, 64), (222, 190, 150), (118, 74, 54), (142, 82, 96))
_CLAY_DARK = ((154, 77, 44), (189, 126, 58), (204, 174, 138), (108, 68, 49), (130, 75, 88))
_STEM = (74, 128, 52)


def _turfs() -> dict[str, np.ndarray]:
    dirt = p.ground(10, _SOIL, (106, 76, 54))
    turf = {
        "meadow": p.ground(20, (112, 172, 64), (96, 152, 54)),
        "forest": p.ground(30, (66, 118, 52), (54, 98, 46)),
        "dry": p.ground(40, (158, 158, 88), (138, 134, 76)),
        "blossom": p.ground(50, (132, 190, 104), (152, 204, 122)),
        "snow": p.ground(60, (236, 241, 247), (222, 230, 242), 15),
    }
    pictures = {"dirt": dirt}
    for number, (name, picture) in enumerate(turf.items()):
        pictures["snow" if name == "snow" else f"{name} grass"] = picture
        pictures[f"{name} side"] = p.turf_side(400 + number, picture, dirt)
    return pictures


def _earths() -> dict[str, np.ndarray]:
    return {
        "path": p.ground(70, (176, 146, 104), (158, 128, 90)),
        "stone": p.ground(80, (132, 134, 138), (116, 118, 124)),
        "gravel": p.pebbles(90, (146, 140, 136), (112, 106, 104), 14),
        "moss": p.ground(100, (92, 118, 58), (112, 136, 68)),
        "sand": p.ground(110, (226, 208, 154), (216, 196, 140), 25),
        "sandstone top": p.ground(120, (222, 202, 150), (212, 190, 138), 25),
        "sandstone": p.layers(
            130, [(226, 206, 152), (214, 190, 134), (222, 202, 148), (200, 172, 118)]
        ),
        "red sand": p.ground(140, (206, 118, 58), (194, 106, 50), 30),
        "ice": p.ground(150, (164, 200, 236), (186, 216, 244), 25),
        "water": p.waves(160, (46, 104, 172), (74, 138, 200)),
        **{
            name: p.layers(170 + n, [_CLAY[n]] * 3 + [_CLAY_DARK[n]], 35)
            for n, name in enumerate(CLAYS)
        },
    }  # fmt: skip


def _growths() -> dict[str, np.ndarray]:
    return {
        "log rings": p.rings((196, 160, 104), (120, 90, 54)),
        "oak bark": p.bark(200, (112, 84, 52), (88, 64, 40)),
        "birch bark": p.birch_bark(205, (222, 220, 212), (84, 80, 76)),
        "pine bark": p.bark(210, (84, 60, 44), (64, 46, 34)),
        "palm bark": p.layers(215, [(168, 136, 88), (148, 116, 72)] * 2, 30),
        "oak leaves": p.foliage(220, (74, 130, 46), (50, 98, 34), (100, 156, 62)),
        "birch leaves": p.foliage(225, (140, 178, 72), (112, 150, 54), (168, 200, 92)),
        "pine leaves": p.foliage(230, (44, 92, 68), (30, 70, 54), (62, 114, 82)),
        "palm leaves": p.foliage(235, (92, 160, 52), (66, 126, 40), (128, 188, 70)),
        "pink leaves": p.foliage(240, (238, 158, 190), (220, 126, 166), (250, 192, 214)),
        "amber leaves": p.foliage(245, (222, 138, 40), (192, 104, 32), (240, 172, 64)),
        "cactus": p.ribs(250, (72, 136, 62), (50, 104, 50)),
        "cactus top": p.ground(255, (100, 158, 80), (84, 142, 70)),
        "hay": p.layers(260, [(214, 176, 62)] * 3 + [(172, 84, 50)] + [(206, 166, 56)] * 4, 50),
        "hay top": p.ground(265, (218, 182, 72), (196, 158, 54)),
        "toadstool": p.dots(270, (204, 44, 40), (246, 240, 232)),
    }


def _works() -> dict[str, np.ndarray]:
    return {
        "planks": p.boards(300, (180, 140, 88), (146, 108, 66)),
        "bricks": p.masonry(305, (166, 84, 66), (190, 176, 162), 4, 8),
        "stone bricks": p.masonry(310, (150, 150, 152), (112, 112, 116), 8, 8, 40),
        "cobble": p.pebbles(315, (142, 142, 144), (98, 98, 102), 9),
        "mossy cobble": p.pebbles(320, (120, 142, 104), (82, 98, 72), 9),
        "red tiles": p.shingles(325, (182, 70, 52), (128, 44, 36)),
        "blue tiles": p.shingles(330, (70, 98, 152), (44, 64, 108)),
        "lamp": p.glow((255, 232, 150), (126, 92, 50)),
        **{name: p.painted(340 + n, _PAINT[n]) for n, name in enumerate(PAINTS)},
    }


def _plants() -> dict[str, np.ndarray]:
    stem = {"s": _STEM, "d": (54, 100, 42), "l": (112, 162, 66)}
    flower = "........ ..aaa... ..aba... ..aaa... ...s.... .d.s.d.. ..dsd... ...s...."
    tuft = "........ ........ .l....l. .l..l.d. ..s.l.d. ..s.sds. .ds.sds. .dssdss."
    fern = "........ ..l..l.. .ls..sl. l.s.ls.l .lsls.l. ..sssl.. ..dss... ...sd..."
    bush = "........ .b....b. ..b..b.b b.bb.bb. .b.bbb.. ..bbb... ...bb... ...b...."
    heads = {
        "poppy": ((216, 44, 40), (90, 26, 30)),
        "buttercup": ((250, 210, 60), (226, 150, 40)),
        "cornflower": ((88, 116, 226), (60, 70, 160)),
        "daisy": ((248, 248, 244), (242, 200, 70)),
    }
    return {
        "grass tuft": p.drawn(tuft, stem),
        "fern": p.drawn(fern, {"s": (60, 112, 54), "d": (44, 86, 40), "l": (84, 140, 70)}),
        "dead bush": p.drawn(bush, {"b": (130, 94, 56)}),
        **{name: p.drawn(flower, {**stem, "a": a, "b": b}) for name, (a, b) in heads.items()},
    }


def _halved(picture: np.ndarray) -> np.ndarray:
    """The next mip level of (n, n, 4): colours averaged by coverage, so that holes add none."""
    quads = picture.reshape(len(picture) // 2, 2, len(picture) // 2, 2, 4)
    alpha = quads[..., 3:].sum((1, 3))
    colour = (quads[..., :3] * quads[..., 3:]).sum((1, 3))
    colour = (colour + alpha // 2) // np.maximum(alpha, 1)
    return np.concatenate([colour, (alpha + 2) // 4], -1)


def mip_levels(picture: UInt8[np.ndarray, "16 16 4"]) -> list[np.ndarray]:
    """The five levels of a texture: (16, 16, 4), (8, 8, 4), ... (1, 1, 4) uint8."""
    chain = [picture.astype(np.int64)]
    while len(chain[-1]) > 1:
        chain.append(_halved(chain[-1]))
    return [level.astype(np.uint8) for level in chain]


@cache
def texture_pictures() -> dict[str, np.ndarray]:
    """Every texture by name: (16, 16, 4) uint8 RGBA, first row up."""
    pictures = {**_turfs(), **_earths(), **_growths(), **_works(), **_plants()}
    opaque = np.full((16, 16, 1), 255)
    full = {
        name: picture if picture.shape[-1] == 4 else np.concatenate([picture, opaque], -1)
        for name, picture in pictures.items()
    }
    return {name: full[name].astype(np.uint8) for name in TEXTURE_NAMES}


@cache
def texture_atlas() -> UInt32[np.ndarray, "textures texels"]:
    """All textures, one row each: levels from fine to coarse, a texel as 0xAABBGGRR."""
    rows = []
    for picture in texture_pictures().values():
        texels = np.concatenate([level.reshape(-1, 4) for level in mip_levels(picture)])
        rows.append(texels.astype(np.uint32) @ np.array([1, 1 << 8, 1 << 16, 1 << 24], np.uint32))
    return np.stack(rows).astype(np.uint32)
