"""What steers the model: actions, cameras and the diffusion time."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from decmem.codec.base import FRAMES_PER_LATENT
from decmem.model.linear import Linear

# The frame of a latent whose camera stands for the latent: the one nearest its middle.
REFERENCE_FRAME = 2


@dataclass(frozen=True)
class Conditions:
    """Steering of T latents, four frames each (a first latent repeats its one frame).

    Attributes:
        actions: (B, T, 4, A). lens: (B, T, 4) fx, fy, cx, cy in half picture sizes.
        world_to_camera: (B, T, 4, 4, 4) float64, absolute.
        time: (T,) index of each latent.
    """

    actions: Float[Tensor, "B T 4 A"]
    world_to_camera: Float[Tensor, "B T 4 4 4"]
    lens: Float[Tensor, "B T 4"]
    time: Int[Tensor, "T"]

    @property
    def cameras(self) -> Float[Tensor, "B T 4 4"]:
        """One camera per latent, the reference frame's."""
        return self.world_to_camera[:, :, REFERENCE_FRAME]

    def __getitem__(self, latents: slice) -> "Conditions":
        return Conditions(
            self.actions[:, latents],
            self.world_to_camera[:, latents],
            self.lens[:, latents],
            self.time[latents],
        )

    def then(self, later: "Conditions") -> "Conditions":
        """These latents, followed by others."""
        return Conditions(
            torch.cat((self.actions, later.actions), 1),
            torch.cat((self.world_to_camera, later.world_to_camera), 1),
            torch.cat((self.lens, later.lens), 1),
            torch.cat((self.time, later.time)),
        )

    def to(self, device: torch.device | str) -> "Conditions":
        return Conditions(
            self.actions.to(device),
            self.world_to_camera.to(device),
            self.lens.to(device),
            self.time.to(device),
        )


def camera_centres(world_to_camera: Float[Tensor, "*shape 4 4"]) -> Float[Tensor, "*shape 3"]:
    """Where the cameras stand, in world coordinates."""
    rotation, translation = world_to_camera[..., :3, :3], world_to_camera[..., :3, 3:]
    return -(rotation.mT @ translation)[..., 0]


def relative_to(
    world_to_camera: Float[Tensor, "B *shape 4 4"], anchor: Float[Tensor, "B 3"]
) -> Float[Tensor, "B *shape 4 4"]:
    """Cameras in a world whose origin is moved to `anchor`; computed in the input's precision."""
    rotation = world_to_camera[..., :3, :3]
    shape = (anchor.shape[0],) + (1,) * (world_to_camera.dim() - 3) + (3, 1)
    translation = world_to_camera[..., :3, 3:] + rotation @ anchor.to(rotation).view(shape)
    moved = torch.cat((rotation, translation), dim=-1)
    return torch.cat((moved, world_to_camera[..., 3:, :]), dim=-2)


def group_frames(x: Float[Tensor, "B F *rest"], first_alone: bool) -> Float[Tensor, "B T 4 *rest"]:
    """Frames in the groups the codec codes together.

    With `first_alone` the first frame is a latent of its own and repeated four times.
    """
    if first_alone:
        x = torch.cat((x[:, :1].expand(-1, FRAMES_PER_LATENT - 1, *x.shape[2:]), x), dim=1)
    return x.unflatten(1, (-1, FRAMES_PER_LATENT))


def normalised_lens(
    intrinsics: Float[Tensor, "*shape 3 3"], size: tuple[int, int]
) -> Float[Tensor, "*shape 4"]:
    """Intrinsics in pixels as (fx, fy, cx, cy) in half picture sizes, centre at 0."""
    height, width = size
    fx = intrinsics[..., 0, 0] * 2 / width
    fy = intrinsics[..., 1, 1] * 2 / height
    cx = intrinsics[..., 0, 2] * 2 / width - 1
    cy = intrinsics[..., 1, 2] * 2 / height - 1
    return torch.stack((fx, fy, cx, cy), dim=-1).float()


def conditions_of_frames(
    actions: Float[Tensor, "B F A"],
    world_to_camera: Float[Tensor, "B F 4 4"],
    lens: Float[Tensor, "B F 4"],
    start: int,
) -> Conditions:
    """Conditions of the latents these frames make up; latent 0 is the clip's first frame alone."""
    first = start == 0
    grouped = group_frames(actions.float(), first)
    return Conditions(
        grouped,
        group_frames(world_to_camera.double(), first),
        group_frames(lens, first)[:, :, 0],
        torch.arange(start, start + grouped.shape[1], device=actions.device),
    )


def patch_rays(
    world_to_camera: Float[Tensor, "B T 4 4 4"],
    lens: Float[Tensor, "B T 4"],
    coordinates: Int[Tensor, "S 2"],
    grid: tuple[int, int],
) -> Float[Tensor, "B T S features"]:
    """Fourier features of the ray through each patch, in each of a latent's four frames.

    Directions and displacements are told in the latent's own frame: the reference camera's
    position and heading, upright. Nothing absolute enters, so a place looks the same wherever
    in the world it lies, and a latent's features do not depend on its chunk.
    """
    rotation = world_to_camera[..., :3, :3].float()  # world to camera
    centre = camera_centres(world_to_camera)
    shift = (centre - centre[:, :, REFERENCE_FRAME, None]).float()
    heading = rotation[:, :, REFERENCE_FRAME, 2]  # the reference camera's z axis in the world
    yaw = torch.atan2(heading[..., 0], -heading[..., 2])
    cos, sin, zero = yaw.cos(), yaw.sin(), torch.zeros_like(yaw)
    # Rows: right, up, backwards of the upright frame, in world axes (x east, y up, z south).
    upright = torch.stack(
        (cos, zero, sin, zero, torch.ones_like(yaw), zero, -sin, zero, cos), dim=-1
    ).unflatten(-1, (3, 3))

    row, column = coordinates.to(lens).unbind(-1)
    x = (column + 0.5) * 2 / grid[1] - 1
    y = (row + 0.5) * 2 / grid[0] - 1
    fx, fy, cx, cy = lens.float()[:, :, None].unbind(-1)
    in_camera = torch.stack(torch.broadcast_tensors((x - cx) / fx, (y - cy) / fy, x * 0 + 1), -1)
    in_camera = in_camera / in_camera.norm(dim=-1, keepdim=True)
    to_upright = upright[:, :, None] @ rotation.mT
    direction = torch.einsum("btfij,btsj->btsfi", to_upright, in_camera)
    displacement = torch.einsum("btij,btfj->btfi", upright, shift)
    displacement = displacement[:, :, None].expand(-1, -1, direction.shape[2], -1, -1)
    waves = [f(direction * (math.pi * 2**i)) for i in range(3) for f in (torch.sin, torch.cos)]
    return torch.cat((direction, *waves, displacement), dim=-1).flatten(-2)


RAY_FEATURES = FRAMES_PER_LATENT * (3 + 3 * 2 * 3 + 3)


class TimeEmbedding(nn.Module):
    """Diffusion time in [0, 1] as features."""

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.hidden = hidden
        self.mlp = nn.Sequential(Linear(hidden, width), nn.SiLU(), Linear(width, width), nn.SiLU())

    def forward(self, t: Float[Tensor, "B T"]) -> Float[Tensor, "B T width"]:
        half = self.hidden // 2
        rate = torch.exp(-math.log(1000.0) * torch.arange(half, device=t.device) / half)
        angle = t.float()[..., None] * 1000 * rate
        return self.mlp(torch.cat((angle.cos(), angle.sin()), dim=-1))


class ActionFusion(nn.Module):
    """psi(a): the actions of a latent's four frames as one feature added to its tokens (eq. 2)."""

    def __init__(self, actions: int, width: int) -> None:
        super().__init__()
        # Degrees and fractions in one vector: bring them to a common size.
        scale = torch.ones(actions)
        scale[2:4] = 0.1
        self.register_buffer("scale", scale, persistent=False)
        self.scale: Tensor
        hidden = min(width, 256)
        self.mlp = nn.Sequential(
            Linear(FRAMES_PER_LATENT * actions, hidden), nn.SiLU(), Linear(hidden, width)
        )

    def forward(self, actions: Float[Tensor, "B T 4 A"]) -> Float[Tensor, "B T width"]:
        return self.mlp((actions.float() * self.scale).flatten(-2))
