"""Multimodal position embedding (section 3.5, appendix A.3): camera, space and time groups.

R = diag(R_cam, R_sp, R_tem) over the channels of a head. Queries and keys carry all three,
values and outputs camera and space only (eq. 5, 12, 13). A fourth group, the surface's, is an
addition of ours (`decmem.memory.surface`) and goes where camera and space go.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decmem.errors import UserError
from decmem.memory.surface import Sight, make_sight, point_angles, surface_rotation
from decmem.ops.projective import projective_matrices, transform_quads
from decmem.ops.rotary import Rotation, rotary_angles, rotate_pairs, rotation
from decmem.ops.untraced import untraced


@dataclass(frozen=True)
class PositionConfig:
    """Channels of a head and their scales.

    Args:
        camera, space, time, surface: channels of the groups; their sum is the head dimension.
        space_base, time_base: rotary bases.
        surface_waves: shortest and longest wavelength of the surface group, metres.
        metre: weight of one metre in the projective matrices. Matters: logits grow with distance.
        reach: metres; cameras farther than this from the anchor are drawn in to it, which bounds
            the logits however long the walk. 0 switches it off.
        global_time: the retrieval sees the time group. Off, a place remembered an hour ago is as
            easy to read as one remembered a second ago.
    """

    camera: int = 24
    space: int = 24
    time: int = 24
    surface: int = 0
    space_base: float = 10_000.0
    time_base: float = 10_000.0
    surface_waves: tuple[float, float] = (1.5, 40.0)
    metre: float = 1 / 12
    reach: float = 0.0
    global_time: bool = True

    def __post_init__(self) -> None:
        if self.camera % 4 or self.space % 4 or self.time % 2 or self.surface % 6:
            raise UserError(
                "position",
                f"groups of {self.camera}, {self.space}, {self.time}, {self.surface} channels",
                "Use multiples of 4 for camera and space, of 2 for time, of 6 for surface",
            )

    @property
    def head_dim(self) -> int:
        return self.camera + self.space + self.surface + self.time


class Position(NamedTuple):
    """Rotations of the latents of one pass, ready to apply; layers share all but the surface's.

    `sight` is where and along which ray tokens look, for the layers to estimate `surface` from.
    """

    projection: Float[Tensor, "B 1 T 1 4 4"]
    unprojection: Float[Tensor, "B 1 T 1 4 4"]
    space: Rotation
    time: Rotation
    sight: Sight | None = None
    surface: Rotation | None = None


def draw_in(
    world_to_camera: Float[Tensor, "*shape 4 4"], reach: float
) -> Float[Tensor, "*shape 4 4"]:
    """Moves cameras farther than `reach` from the origin towards it, orientation unchanged."""
    if not reach:
        return world_to_camera
    rotation, translation = world_to_camera[..., :3, :3], world_to_camera[..., :3, 3]
    shrink = (reach / translation.norm(dim=-1).clamp(min=1e-6)).clamp(max=1.0)
    drawn = torch.cat((rotation, (translation * shrink[..., None])[..., None]), dim=-1)
    return torch.cat((drawn, world_to_camera[..., 3:, :]), dim=-2)


def camera_matrices(
    config: PositionConfig,
    world_to_camera: Float[Tensor, "*shape 4 4"],
    lens: Float[Tensor, "*shape 4"],
) -> tuple[Float[Tensor, "*shape 4 4"], Float[Tensor, "*shape 4 4"]]:
    """R_cam's 4x4 matrices and their inverses; cameras are given relative to the anchor."""
    drawn = draw_in(world_to_camera.float(), config.reach)
    rigid = torch.cat((drawn[..., :3, :3], drawn[..., :3, 3:] * config.metre), dim=-1)
    scaled = torch.cat((rigid, drawn[..., 3:, :]), dim=-2)
    return projective_matrices(scaled, lens)


def make_position(
    config: PositionConfig,
    world_to_camera: Float[Tensor, "B T 4 4"],
    lens: Float[Tensor, "B T 4"],
    time: Int[Tensor, "T"],
    coordinates: Int[Tensor, "S 2"],
    grid: tuple[int, int],
) -> Position:
    """Rotations for latents with these cameras (relative to the anchor), indices and patches."""
    projection, unprojection = camera_matrices(config, world_to_camera, lens)
    row, column = (
        rotary_angles(c, config.space // 2, config.space_base) for c in coordinates.unbind(-1)
    )
    return Position(
        projection[:, None, :, None],
        unprojection[:, None, :, None],
        rotation(torch.cat((column, row), dim=-1)),
        time_rotation(config, time),
        make_sight(world_to_camera, lens, coordinates, grid) if config.surface else None,
    )


def time_rotation(config: PositionConfig, time: Int[Tensor, "T"]) -> Rotation:
    """R_tem of latents with these indices."""
    return rotation(rotary_angles(time, config.time, config.time_base)[:, None])


def seeing(config: PositionConfig, position: Position, estimate: Tensor) -> Position:
    """With the surfaces where one layer sees them (`SurfaceDepth`'s estimate)."""
    assert position.sight is not None
    turn = surface_rotation(position.sight, estimate, config.surface, config.surface_waves)
    return position._replace(surface=turn)


def surface_shift(config: PositionConfig, shift: Float[Tensor, "B 3"]) -> Rotation:
    """What carries the surface group of stored keys to an anchor moved by `shift`.

    Phases are taken modulo a turn in fp64: anchors may lie far apart.
    """
    angles = point_angles(shift.double(), config.surface, config.surface_waves)
    return rotation((angles % (2 * math.pi)).float()[:, None, None, None])


def encode_query(config: PositionConfig, position: Position, q: Tensor) -> Tensor:
    """R_cs^T q (eq. 5 without time), fp32 inside."""
    return _coded(config, position, q, position.projection, transpose=True, inverse=True)


def encode_key(config: PositionConfig, position: Position, k: Tensor) -> Tensor:
    """R_cs^-1 k (eq. 5 without time); the same for values (eq. 12), fp32 inside."""
    return _coded(config, position, k, position.unprojection, transpose=False, inverse=True)


def decode_output(config: PositionConfig, position: Position, o: Tensor) -> Tensor:
    """R_cs o (eq. 13), fp32 inside."""
    return _coded(config, position, o, position.projection, transpose=False, inverse=False)


def _coded(
    config: PositionConfig,
    position: Position,
    x: Tensor,
    matrix: Tensor,
    *,
    transpose: bool,
    inverse: bool,
) -> Tensor:
    """The camera group times `matrix`, the space and surface groups turned or turned back."""
    groups = (config.camera, config.space, config.surface, config.time)
    camera, space, surface, rest = x.split(groups, dim=-1)
    if untraced(x):
        # Every group goes to its place, and the heads of a token stay side by side.
        out = torch.empty_like(x, dtype=torch.float32)
        places = out.split(groups, dim=-1)
        places[0].copy_(transform_quads(camera, matrix, transpose))
        rotate_pairs(space, position.space, inverse, out=places[1])
        if position.surface is not None:
            rotate_pairs(surface, position.surface, inverse, out=places[2])
        else:
            places[2].copy_(surface)
        places[3].copy_(rest)
        return out.to(x.dtype)
    parts = [transform_quads(camera, matrix, transpose)]
    parts.append(rotate_pairs(space, position.space, inverse))
    surface = surface.float()
    if position.surface is not None:
        surface = rotate_pairs(surface, position.surface, inverse)
    return torch.cat((*parts, surface, rest.float()), dim=-1).to(x.dtype)


def encode_time(config: PositionConfig, x: Tensor, turn: Rotation) -> Tensor:
    """R_tem^T on the time group of queries or keys (eq. 5), fp32 inside."""
    rest, time = x.split((config.head_dim - config.time, config.time), dim=-1)
    turned = rotate_pairs(time, turn, inverse=True).to(x.dtype)
    if untraced(x):
        out = x.clone()
        out[..., config.head_dim - config.time :].copy_(turned)
        return out
    return torch.cat((rest, turned), dim=-1)
