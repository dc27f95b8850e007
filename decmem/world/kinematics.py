"""The motion law without a world: what actions do to any camera that moves freely."""

import math

import numpy as np
from jaxtyping import Float32, Float64

from decmem.errors import UserError
from decmem.world.actions import ACTION_FIELDS, FORWARD, PITCH, RIGHT, SPRINT, YAW, quantise_actions
from decmem.world.angles import EIGHTHS
from decmem.world.camera import centres
from decmem.world.motion import PITCH_LIMIT, UNIT, WALK

_RIGID_TOLERANCE = 1e-4


def check_rigid(
    world_to_camera: Float64[np.ndarray, "*batch 4 4"], argument: str = "world_to_camera"
) -> None:
    """Raise `UserError` naming `argument` unless every matrix is a rotation and a shift."""
    rotation = world_to_camera[..., :3, :3]
    finite = np.isfinite(world_to_camera).all((-2, -1))
    gram = rotation @ np.swapaxes(rotation, -1, -2)
    bad = ~finite | (abs(gram - np.eye(3)) > _RIGID_TOLERANCE).any((-2, -1))
    bad |= ~(np.linalg.det(np.where(np.isfinite(rotation), rotation, 0)) > 0)
    bad |= (abs(world_to_camera[..., 3, :] - (0, 0, 0, 1)) > _RIGID_TOLERANCE).any(-1)
    if bad.any():
        raise UserError(
            argument,
            f"pose {int(np.ravel(bad).argmax()) + 1} is not rigid",
            "give 4x4 world-to-camera matrices: a rotation without scale or mirror, a shift, and "
            "(0, 0, 0, 1) as last row",
        )


def _about_up(angle: float) -> np.ndarray:
    """The rotation of the world that undoes a turn to the right by `angle`."""
    sine, cosine = math.sin(angle), math.cos(angle)
    return np.array([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])


def _about_right(angle: float) -> np.ndarray:
    """The rotation of the camera frame that looks up by `angle`."""
    sine, cosine = math.sin(angle), math.cos(angle)
    return np.array([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]])


def integrate(
    world_to_camera: Float64[np.ndarray, "4 4"], actions: Float32[np.ndarray, "F A"]
) -> Float64[np.ndarray, "F 4 4"]:
    """Poses of a camera that follows valid `actions` from a rigid pose, at constant height.

    The world's y axis is up; speeds and limits are those of `decmem.world.motion`, jumps do
    nothing. As there, pose 0 is the start and actions[0] is not applied. A start that looks
    more steeply than the limit of 60 degrees may only turn back. Raises `UserError` if the pose is
    not rigid.
    """
    check_rigid(world_to_camera)
    steps = quantise_actions(actions)
    scale = ACTION_FIELDS[FORWARD].steps
    position = centres(world_to_camera)
    rotation = world_to_camera[:3, :3]
    pitch = math.degrees(math.asin(min(max(rotation[2, 1], -1.0), 1.0))) * EIGHTHS
    low, high = min(pitch, -PITCH_LIMIT), max(pitch, PITCH_LIMIT)
    # Ahead is where the camera looks, laid flat; the camera's right settles it when looking down.
    side = rotation[0].copy()
    heading = math.atan2(side[2], side[0])
    unit = math.radians(1 / EIGHTHS)
    poses = np.empty((len(actions), 4, 4))
    poses[0] = world_to_camera
    yaw, tilt = 0, 0.0
    for frame in range(1, len(actions)):
        action = steps[frame]
        yaw += int(action[YAW])
        tilt = min(max(pitch + tilt + action[PITCH], low), high) - pitch
        turn = heading + yaw * unit
        speed = (WALK * 3 // 2 if action[SPRINT] else WALK) / UNIT / scale
        ahead = np.array([math.sin(turn), 0, -math.cos(turn)])
        aside = np.array([math.cos(turn), 0, math.sin(turn)])
        position = position + speed * (action[FORWARD] * ahead + action[RIGHT] * aside)
        turned = _about_right(tilt * unit) @ rotation @ _about_up(yaw * unit)
        poses[frame] = np.eye(4)
        poses[frame, :3, :3] = turned
        poses[frame, :3, 3] = -turned @ position
    return poses
