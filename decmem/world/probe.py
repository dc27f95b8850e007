"""Depth probes: small depth maps without colour, for questions of visibility."""

import math

import numpy as np
from jaxtyping import Float32, Float64

from decmem.world.camera import DEFAULT_FOV, centres, intrinsics
from decmem.world.compiled import compiled
from decmem.world.grid import SIZE, World
from decmem.world.marching import NOTHING, march
from decmem.world.pictures import pictures
from decmem.world.shading import REACH

PROBE_SIZE = (32, 48)

_HALF = np.float32(0.5)


@compiled
def _probe(buffer, texels, cell, inset, rotation, focal, depth):
    height, width = depth.shape
    spread = np.float32(1) / focal
    for row in range(height):
        for column in range(width):
            vx = (np.float32(column) + _HALF - np.float32(width) * _HALF) / focal
            vy = (np.float32(row) + _HALF - np.float32(height) * _HALF) / focal
            dx = rotation[0, 0] * vx + rotation[1, 0] * vy + rotation[2, 0]
            dy = rotation[0, 1] * vx + rotation[1, 1] * vy + rotation[2, 1]
            dz = rotation[0, 2] * vx + rotation[1, 2] * vy + rotation[2, 2]
            length = np.float32(math.sqrt(dx * dx + dy * dy + dz * dz))
            t, _, _, _, face = march(
                buffer, 0, texels, cell[0], cell[1], cell[2], inset[0], inset[1], inset[2],
                dx, dy, dz, REACH / length, spread,
            )  # fmt: skip
            depth[row, column] = np.float32(math.inf) if face == NOTHING else t


def probe_depth(
    world: World,
    world_to_camera: Float64[np.ndarray, "F 4 4"],
    size: tuple[int, int] = PROBE_SIZE,
    fov: float = DEFAULT_FOV,
) -> Float32[np.ndarray, "F H W"]:
    """Depth along the camera's z axis of each pixel's centre, infinite for sky."""
    position = centres(world_to_camera)
    cells = np.floor(position)
    insets = (position - cells).astype(np.float32)
    whole = cells.astype(np.int64)
    whole[:, [0, 2]] %= SIZE
    rotations = np.ascontiguousarray(world_to_camera[:, :3, :3], np.float32)
    focal = np.float32(intrinsics(size, fov)[0, 0])
    depth = np.empty((len(world_to_camera), *size), np.float32)
    texels = pictures()
    for frame in range(len(depth)):
        _probe(
            world.buffer, texels, whole[frame].astype(np.int32), insets[frame], rotations[frame],
            focal, depth[frame],
        )  # fmt: skip
    return depth
