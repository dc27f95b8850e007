"""The surface group: tokens placed where the surface they see lies (an addition to the paper).

Projective encoding compares cameras and patches; what two frames share, though, is a piece of the
world. Every layer estimates how far away a token's surface is, with a spread, and rotary
embedding of the point so found lets a query find the keys that show the same place from
elsewhere. What is uncertain fades: channels carry the rotation *expected* under the spread, as in
RayRoPE (arXiv 2601.15275), so that long waves answer first and short ones once depth is known.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from decmem.ops.rotary import Rotation

_FIRST_DEPTH = math.log(8.0)
_SPREADS = (-3.5, 1.0)
"""Bounds of the log spread: 3 % of the depth, and all but unknown."""
NEAREST, FARTHEST = math.log(0.2), math.log(48.0)
"""Bounds of log depth; all that is farther is haze and sky."""


class Sight(NamedTuple):
    """Where tokens look from, relative to the anchor, and along which ray of unit depth."""

    eye: Float[Tensor, "B T 1 3"]
    ray: Float[Tensor, "B T S 3"]


def make_sight(
    world_to_camera: Float[Tensor, "B T 4 4"],
    lens: Float[Tensor, "B T 4"],
    coordinates: Int[Tensor, "S 2"],
    grid: tuple[int, int],
) -> Sight:
    """The ray through the middle of each patch, fp32. Cameras are given relative to the anchor."""
    world_to_camera = world_to_camera.float()
    row, column = coordinates.to(world_to_camera).unbind(-1)
    x = (column + 0.5) * 2 / grid[1] - 1
    y = (row + 0.5) * 2 / grid[0] - 1
    fx, fy, cx, cy = lens.float()[:, :, None].unbind(-1)
    in_camera = torch.stack(torch.broadcast_tensors((x - cx) / fx, (y - cy) / fy, x * 0 + 1), -1)
    rotation, translation = world_to_camera[..., :3, :3], world_to_camera[..., :3, 3]
    eye = -torch.einsum("btij,bti->btj", rotation, translation)
    return Sight(eye[:, :, None], torch.einsum("btij,btsi->btsj", rotation, in_camera))


def wave_numbers(
    channels: int, waves: tuple[float, float], device: torch.device | None = None
) -> Float[Tensor, "waves"]:
    """2 pi over wavelengths from the shortest to the longest, a sixth of the channels of them."""
    shortest, longest = (math.log(2 * math.pi / w) for w in waves)
    return torch.linspace(shortest, longest, channels // 6, device=device).exp()


def point_angles(
    points: Float[Tensor, "*shape 3"], channels: int, waves: tuple[float, float]
) -> Float[Tensor, "*shape pairs"]:
    """Angles of points in the world: x, y and z, each on all waves."""
    numbers = wave_numbers(channels, waves, points.device).to(points.dtype)
    return (points[..., None] * numbers).flatten(-2)


def surface_rotation(
    sight: Sight,
    estimate: Float[Tensor, "B T S 2"],
    channels: int,
    waves: tuple[float, float],
) -> Rotation:
    """Rotation expected of tokens whose log depth is normal with `estimate` = (mean, log spread).

    Shapes (B, 1, T, S, pairs), fp32: the same for all heads.
    """
    log_depth, log_spread = estimate.float().unbind(-1)
    depth = log_depth.clamp(NEAREST, FARTHEST).exp()
    angles = point_angles(sight.eye + sight.ray * depth[..., None], channels, waves)
    # To first order a relative error of the depth moves the point along its ray.
    spread = (depth * log_spread.clamp(*_SPREADS).exp())[..., None] * sight.ray
    fade = torch.exp(-0.5 * point_angles(spread, channels, waves).square())
    return Rotation((angles.cos() * fade)[:, None], (angles.sin() * fade)[:, None])


class SurfaceDepth(nn.Module):
    """How far away the surface is that a token shows, as one layer sees it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.readout = nn.Linear(width, 2)

    def forward(self, features: Float[Tensor, "B T tokens width"]) -> Float[Tensor, "B T tokens 2"]:
        """Mean of log depth (metres along the camera's axis) and log of its spread, fp32."""
        weight = self.readout.weight.to(features.dtype)
        estimate = nn.functional.linear(features, weight).float() + self.readout.bias
        log_depth, log_spread = estimate.unbind(-1)
        return torch.stack((log_depth + _FIRST_DEPTH, log_spread), -1)


def depth_loss(
    estimate: Float[Tensor, "B T S 2"],
    mean: Float[Tensor, "B T S"],
    variance: Float[Tensor, "B T S"],
) -> Float[Tensor, "B T S"]:
    """Negative log likelihood of a patch's log depths, known by their mean and variance."""
    log_depth, log_spread = estimate.unbind(-1)
    log_spread = log_spread.clamp(*_SPREADS)
    error = (mean - log_depth).square() + variance
    return log_spread + 0.5 * error * torch.exp(-2 * log_spread)
