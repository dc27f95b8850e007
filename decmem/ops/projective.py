"""Projective position encoding (PRoPE): channels transformed by the camera's projective matrix.

Section 3.5 and appendix A.3 of the paper: P = [K 0; 0 1] T_cw, so that query^T key depends on
P_query P_key^-1, the relative frustum of two cameras.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from decmem.ops.untraced import untraced


def projective_matrices(
    world_to_camera: Float[Tensor, "*shape 4 4"], lens: Float[Tensor, "*shape 4"]
) -> tuple[Float[Tensor, "*shape 4 4"], Float[Tensor, "*shape 4 4"]]:
    """P and its inverse, fp32.

    Args:
        world_to_camera: rigid matrices; translations in the units the caller wants them weighed
            in (metres times the configured scale).
        lens: (fx, fy, cx, cy) in half picture widths and heights, centre at 0. No pixel units:
            they would swamp the rotation.
    """
    world_to_camera = world_to_camera.float()
    fx, fy, cx, cy = lens.float().unbind(-1)
    one, zero = torch.ones_like(fx), torch.zeros_like(fx)

    def matrix(*entries: Tensor) -> Tensor:
        return torch.stack(entries, dim=-1).unflatten(-1, (4, 4))

    intrinsics = matrix(
        fx, zero, cx, zero, zero, fy, cy, zero, zero, zero, one, zero, zero, zero, zero, one
    )
    inverse_intrinsics = matrix(
        1 / fx, zero, -cx / fx, zero, zero, 1 / fy, -cy / fy, zero,
        zero, zero, one, zero, zero, zero, zero, one,
    )  # fmt: skip
    rotation, translation = world_to_camera[..., :3, :3], world_to_camera[..., :3, 3:]
    # Closed form of a rigid inverse: exact where a general solver would round.
    back = torch.cat((rotation.mT, -rotation.mT @ translation), dim=-1)
    camera_to_world = torch.cat((back, world_to_camera[..., 3:, :]), dim=-2)
    return intrinsics @ world_to_camera, camera_to_world @ inverse_intrinsics


def transform_quads(
    x: Float[Tensor, "... channels"], matrix: Float[Tensor, "... 4 4"], transpose: bool = False
) -> Float[Tensor, "... channels"]:
    """Multiplies every group of four channels by `matrix` (or its transpose), in fp32."""
    if not transpose:
        matrix = matrix.mT
    if untraced(x) and x.dim() == 5 and matrix.shape[1::2] == (1, 1, 4):
        return _transform_latents(x.float(), matrix[:, 0, :, 0])
    quads = x.float().unflatten(-1, (-1, 4))
    if x.device.type == "cpu" and matrix.dim() > 2 and matrix.shape[-3] == 1:
        # One matrix for all tokens of a latent: one product of (tokens x groups, 4) by (4, 4)
        # instead of seven passes.
        rows = quads.flatten(-3, -2)
        return (rows @ matrix.squeeze(-3)).unflatten(-2, quads.shape[-3:-1]).flatten(-2)
    # Written out: four multiply-adds per channel fuse where a batched 4x4 product would not.
    rows = matrix[..., None, :, :]
    out = quads[..., 0:1] * rows[..., 0, :]
    for i in range(1, 4):
        out = out + quads[..., i : i + 1] * rows[..., i, :]
    return out.flatten(-2)


def _transform_latents(
    x: Float[Tensor, "B H T S channels"], matrix: Float[Tensor, "B T 4 4"]
) -> Float[Tensor, "B H T S channels"]:
    """The short cut for one matrix a latent: all heads of all its tokens in one product, with a
    matrix of channels x channels that has the given one along its diagonal."""
    B, H, T, S, channels = x.shape
    wide = x.new_zeros(B, T, channels // 4, 4, channels // 4, 4)
    wide.diagonal(dim1=2, dim2=4).copy_(matrix[..., None])
    rows = x.movedim(1, 3).reshape(B * T, S * H, channels)
    out = torch.bmm(rows, wide.view(B * T, channels, channels))
    return out.view(B, T, S, H, channels).movedim(3, 1)
