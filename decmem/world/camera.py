"""Cameras: intrinsics, and world-to-camera matrices from a position and two angles."""

import math

import numpy as np
from jaxtyping import Float64

DEFAULT_SIZE = (128, 192)
"""Height and width in pixels."""
DEFAULT_FOV = 70.0
"""Horizontal field of view in degrees."""


def intrinsics(
    size: tuple[int, int] = DEFAULT_SIZE, fov: float = DEFAULT_FOV
) -> Float64[np.ndarray, "3 3"]:
    """The matrix in pixels of a camera with square pixels; `fov` is horizontal, in degrees."""
    height, width = size
    focal = width / 2 / math.tan(math.radians(fov) / 2)
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float64)


def look(
    position: tuple[float, float, float], yaw: float, pitch: float
) -> Float64[np.ndarray, "4 4"]:
    """World-to-camera of an eye at `position` (blocks), angles in degrees.

    Yaw 0 looks along -z and turns right, pitch positive looks up.
    """
    return rigid(
        np.array(position),
        math.sin(math.radians(yaw)),
        math.cos(math.radians(yaw)),
        math.sin(math.radians(pitch)),
        math.cos(math.radians(pitch)),
    )


def rigid(position, sin_yaw, cos_yaw, sin_pitch, cos_pitch) -> Float64[np.ndarray, "*batch 4 4"]:
    """World-to-camera from positions (..., 3) and sines and cosines (...) of the two angles."""
    zero = np.zeros_like(np.asarray(sin_yaw, np.float64))
    right = np.stack([cos_yaw + zero, zero, sin_yaw + zero], -1)
    forward = np.stack([sin_yaw * cos_pitch, sin_pitch + zero, -cos_yaw * cos_pitch], -1)
    down = np.stack([sin_yaw * sin_pitch, -cos_pitch + zero, -cos_yaw * sin_pitch], -1)
    matrix = np.zeros((*zero.shape, 4, 4))
    rotation = np.stack([right, down, forward], -2)
    matrix[..., :3, :3] = rotation
    matrix[..., :3, 3] = -(rotation * np.asarray(position)[..., None, :]).sum(-1)
    matrix[..., 3, 3] = 1
    return matrix


def centres(world_to_camera: Float64[np.ndarray, "*batch 4 4"]) -> Float64[np.ndarray, "*batch 3"]:
    """Camera positions in the world, in blocks."""
    rotation, shift = world_to_camera[..., :3, :3], world_to_camera[..., :3, 3]
    return -(rotation * shift[..., None]).sum(-2)
