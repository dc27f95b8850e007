"""Exact co-visibility: which pixels of one frame show surfaces that another frame saw too.

A pixel's centre is put into the world by its depth and projected into the other frame. It is
visible there if it falls inside and the depth there agrees: within 2 % of one of the four pixels
around it, or of their interpolation (inverse depth is linear over a plane, however slanting). Sky
lies at infinity: it is visible where its direction falls onto sky. Errors are confined to outlines,
about a pixel wide.
"""

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32

from decmem.world.compiled import compiled

_TOLERANCE = 0.02
_NEAR = 0.01


@compiled
def _agrees(depth, u, v, z):
    """Whether a depth map shows a surface of depth z (infinite: sky) at the place (u, v)."""
    height, width = depth.shape
    left = min(max(int(np.floor(u - 0.5)), 0), width - 2)
    upper = min(max(int(np.floor(v - 0.5)), 0), height - 2)
    wu = min(max(u - 0.5 - left, 0.0), 1.0)
    wv = min(max(v - 0.5 - upper, 0.0), 1.0)
    inverse = 0.0
    skies = 0
    for row in range(2):
        for column in range(2):
            there = depth[upper + row, left + column]
            if there == np.inf:
                skies += 1
            elif abs(there - z) <= _TOLERANCE * z:
                return True
            weight = (wv if row else 1 - wv) * (wu if column else 1 - wu)
            inverse += weight / there
    if z == np.inf:
        return skies > 0
    return skies == 0 and abs(inverse * z - 1) <= _TOLERANCE


@compiled
def seen_by(depth, pose, intrinsics, bank_depth, bank_poses, bank_intrinsics, order):
    """For each pixel the first entry of `order` whose bank frame sees it, as its number; or -1.

    The bank's depth maps may have another size, with intrinsics of their own.
    """
    height, width = depth.shape
    fx, fy = intrinsics[0, 0], intrinsics[1, 1]
    cx, cy = intrinsics[0, 2], intrinsics[1, 2]
    there_fx, there_fy = bank_intrinsics[0, 0], bank_intrinsics[1, 1]
    there_cx, there_cy = bank_intrinsics[0, 2], bank_intrinsics[1, 2]
    seen = np.full((height, width), -1, np.int32)
    point = np.empty(3)
    for row in range(height):
        for column in range(width):
            z = np.float64(depth[row, column])
            sky = z == np.inf
            scale = 1.0 if sky else z
            ray0 = (column + 0.5 - cx) / fx * scale
            ray1 = (row + 0.5 - cy) / fy * scale
            for axis in range(3):
                # Rotated into the world; points also lose the camera's shift, directions do not.
                point[axis] = (
                    pose[0, axis] * (ray0 - (0.0 if sky else pose[0, 3]))
                    + pose[1, axis] * (ray1 - (0.0 if sky else pose[1, 3]))
                    + pose[2, axis] * (scale - (0.0 if sky else pose[2, 3]))
                )
            for number in order:
                other = bank_poses[number]
                deep = other[2, 0] * point[0] + other[2, 1] * point[1] + other[2, 2] * point[2]
                if not sky:
                    deep += other[2, 3]
                if deep <= _NEAR:
                    continue
                x = other[0, 0] * point[0] + other[0, 1] * point[1] + other[0, 2] * point[2]
                y = other[1, 0] * point[0] + other[1, 1] * point[1] + other[1, 2] * point[2]
                if not sky:
                    x += other[0, 3]
                    y += other[1, 3]
                u = x / deep * there_fx + there_cx
                v = y / deep * there_fy + there_cy
                if u < 0 or v < 0 or u >= bank_depth.shape[2] or v >= bank_depth.shape[1]:
                    continue
                if _agrees(bank_depth[number], u, v, np.inf if sky else deep):
                    seen[row, column] = number
                    break
    return seen


def last_seen(
    depth: Float32[np.ndarray, "H W"],
    world_to_camera: Float64[np.ndarray, "4 4"],
    bank_depth: Float32[np.ndarray, "N H W"],
    bank_world_to_camera: Float64[np.ndarray, "N 4 4"],
    intrinsics: Float64[np.ndarray, "3 3"],
) -> Int32[np.ndarray, "H W"]:
    """For each pixel the last bank frame (0 to N-1) that sees its surface, or -1 for none.

    Depths along the camera's z axis, infinite for sky; all frames share the intrinsics.
    """
    order = np.arange(len(bank_depth) - 1, -1, -1)
    return seen_by(
        depth, world_to_camera, intrinsics, bank_depth, bank_world_to_camera, intrinsics, order
    )


def visible(
    depth: Float32[np.ndarray, "H W"],
    world_to_camera: Float64[np.ndarray, "4 4"],
    other_depth: Float32[np.ndarray, "H W"],
    other_world_to_camera: Float64[np.ndarray, "4 4"],
    intrinsics: Float64[np.ndarray, "3 3"],
) -> Bool[np.ndarray, "H W"]:
    """For each pixel whether another frame sees its surface."""
    seen = last_seen(
        depth, world_to_camera, other_depth[None], other_world_to_camera[None], intrinsics
    )
    return seen >= 0


def seen_fraction(
    depth: Float32[np.ndarray, "H W"],
    world_to_camera: Float64[np.ndarray, "4 4"],
    bank_depth: Float32[np.ndarray, "N H W"],
    bank_world_to_camera: Float64[np.ndarray, "N 4 4"],
    intrinsics: Float64[np.ndarray, "3 3"],
) -> float:
    """Share of a frame's pixels whose surfaces at least one bank frame sees."""
    seen = last_seen(depth, world_to_camera, bank_depth, bank_world_to_camera, intrinsics)
    return float((seen >= 0).mean())


def by_block(
    pixels: Bool[np.ndarray, "H W"], grid: tuple[int, int] = (2, 3)
) -> Float64[np.ndarray, "rows columns"]:
    """Share of true pixels in each block of a frame's grid (rows, columns), as even as it goes."""
    rows = np.array_split(pixels.astype(np.float64), grid[0], axis=0)
    return np.array([[b.mean() for b in np.array_split(row, grid[1], axis=1)] for row in rows])


def covisibility(
    depth: Float32[np.ndarray, "H W"],
    world_to_camera: Float64[np.ndarray, "4 4"],
    other_depth: Float32[np.ndarray, "H W"],
    other_world_to_camera: Float64[np.ndarray, "4 4"],
    intrinsics: Float64[np.ndarray, "3 3"],
    grid: tuple[int, int] = (2, 3),
) -> Float64[np.ndarray, "rows columns"]:
    """For each block of a frame the share of its pixels that another frame sees."""
    pixels = visible(depth, world_to_camera, other_depth, other_world_to_camera, intrinsics)
    return by_block(pixels, grid)
