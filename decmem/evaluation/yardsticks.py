"""Rows that need no model: what copying and plain geometry reach on the same frames.

A memory claim stands between two of them: ``nearest_pose`` is what copying a remembered picture
gives, ``oracle_warp`` what re-projecting every remembered pixel with the *true* depth gives.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8

from decmem.evaluation.warp import fill_from_nearest, fuse_views
from decmem.world.camera import centres

DEGREES_PER_METRE = 10.0
"""Turning by this much counts as moving one metre in ``nearest_pose``."""


@dataclass(frozen=True)
class Geometry:
    """Where the cameras of F frames stand and how far they see: ``world_to_camera`` (metres,
    OpenCV axes), ``intrinsics`` in pixels (centres at integer + 0.5), ``depth`` along the optical
    axis in metres, infinite in the sky."""

    world_to_camera: Float64[np.ndarray, "F 4 4"]
    intrinsics: Float64[np.ndarray, "F 3 3"]
    depth: Float32[np.ndarray, "F H W"]


def copy_last(
    bank_frames: UInt8[np.ndarray, "N H W 3"], count: int
) -> UInt8[np.ndarray, "F H W 3"]:
    """The last frame of the bank, ``count`` times: the world stands still."""
    return np.repeat(bank_frames[-1:], count, axis=0)


def nearest_pose_index(
    bank: Float64[np.ndarray, "N 4 4"], poses: Float64[np.ndarray, "F 4 4"]
) -> Int64[np.ndarray, "F"]:
    """Index of the bank pose nearest to each pose; the latest of equals.

    Distance: ``sqrt(m^2 + (a / 10)^2)`` with m the metres between the camera centres and a the
    angle of the relative rotation in degrees, so 10 degrees weigh as much as one metre.
    """
    offset = centres(poses)[:, None] - centres(bank)[None]
    trace = np.einsum("fij,nij->fn", poses[:, :3, :3], bank[:, :3, :3])
    angle = np.degrees(np.arccos(np.clip((trace - 1.0) / 2.0, -1.0, 1.0)))
    distance = np.square(offset).sum(axis=-1) + np.square(angle / DEGREES_PER_METRE)
    # Poses are multiples of a grid, so "equal" is up to rounding of the arccos.
    latest_first = np.argmin(np.round(distance, 6)[:, ::-1], axis=1)
    return distance.shape[1] - 1 - latest_first


def nearest_pose(
    bank_frames: UInt8[np.ndarray, "N H W 3"],
    bank_poses: Float64[np.ndarray, "N 4 4"],
    poses: Float64[np.ndarray, "F 4 4"],
) -> UInt8[np.ndarray, "F H W 3"]:
    """For every pose the bank's frame of the nearest pose, copied as it is."""
    return bank_frames[nearest_pose_index(bank_poses, poses)]


def oracle_warp(
    bank_frames: UInt8[np.ndarray, "N H W 3"], bank: Geometry, target: Geometry, threads: int = 1
) -> tuple[UInt8[np.ndarray, "F H W 3"], Bool[np.ndarray, "F H W"]]:
    """Every target pixel looked up, by its true depth, in every bank frame, and fused.

    A pixel's 3D point is projected into each bank frame; where the bank's own depth agrees (the
    point is not hidden there) the colour is read bilinearly, and all readings are averaged with
    weights that favour views at a like distance and angle (``warp.fuse_views``). Sky is looked up
    by direction. Pixels no bank frame shows take the colour of the nearest pixel that one shows.

    Returns the fused frames and which pixels some bank frame shows. If none shows any, the frame
    is the bank's last.
    """
    inverse_depth = (1.0 / bank.depth).astype(np.float32)  # 0 in the sky
    bank_rays = np.linalg.inv(bank.intrinsics)
    rays = np.linalg.inv(target.intrinsics)
    relative = bank.world_to_camera[None] @ np.linalg.inv(target.world_to_camera)[:, None]

    def warp(f: int) -> tuple[np.ndarray, np.ndarray]:
        turn = bank.intrinsics @ relative[f, :, :3, :3] @ rays[f]
        shift = np.einsum("nij,nj->ni", bank.intrinsics, relative[f, :, :3, 3])
        baseline = np.linalg.norm(relative[f, :, :3, 3], axis=1)
        colour, seen = fuse_views(
            target.depth[f],
            rays[f],
            np.ascontiguousarray(turn),
            shift,
            baseline,
            bank_rays,
            bank_frames,
            inverse_depth,
        )
        if not seen.any():
            return bank_frames[-1], seen
        return np.rint(fill_from_nearest(colour, seen)).astype(np.uint8), seen

    with ThreadPoolExecutor(max_workers=threads) as pool:
        warped = list(pool.map(warp, range(len(target.depth))))
    return np.stack([frame for frame, _ in warped]), np.stack([seen for _, seen in warped])
