"""All that the renderers draw with, in one array: texels, clouds, and which texture a face has."""

from functools import cache

import numpy as np
from jaxtyping import UInt32

from decmem.world.blocks import FACE_TEXTURES, TEXTURE_NAMES
from decmem.world.compiled import compiled
from decmem.world.noise import octaves
from decmem.world.textures import TEXELS, texture_atlas

CLOUD_BITS = 6
CLOUD_SIDE = 1 << CLOUD_BITS
CLOUDS = len(TEXTURE_NAMES) * TEXELS
"""Where the clouds begin: 64 x 64 covers of 0 to 255."""
FACES = CLOUDS + CLOUD_SIDE * CLOUD_SIDE
"""Where the table of faces begins: top, side and bottom texture of each block."""


def _cloud_map() -> np.ndarray:
    """Cover of a flat periodic layer of clouds."""
    noise = octaves(CLOUD_SIDE, 5, 500, (4, 4096), (3, 2048), (2, 700))
    return np.clip((noise - 250) * 170 // 1500, 0, 150).astype(np.uint32)


@cache
def pictures() -> UInt32[np.ndarray, " entries"]:
    """The texture atlas (`textures.texture_atlas`) in one row, the clouds, the faces."""
    faces = FACE_TEXTURES.astype(np.uint32)
    return np.concatenate(
        [texture_atlas().reshape(-1), _cloud_map().reshape(-1), faces.reshape(-1)]
    )


@compiled
def face_texture(pictures, block, part):
    """The texture number of a block's top (0), side (1) or bottom (2)."""
    return np.int32(pictures[np.uint64(FACES + 3 * np.int32(block) + part)])


@compiled
def level_start(bits):
    """Where the mip level of side 2**bits begins within a texture's texels."""
    return np.int32((1024 - (4 << (2 * bits))) // 3)


@compiled
def texel_at(pictures, texture, bits, u, v):
    """The texel of a texture's level of side 2**bits at u to the right and v down, from [0, 1)."""
    side = np.float32(np.int32(1) << bits)
    place = (np.int32(v * side) << bits) + np.int32(u * side)
    return pictures[np.uint64(texture * TEXELS + level_start(bits) + place)]
