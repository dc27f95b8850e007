"""Rotary position embedding: angles for 1D indices, rotation of channel pairs."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Real
from torch import Tensor

from decmem.ops.untraced import untraced


class Rotation(NamedTuple):
    """Cosines and sines of the angles of channel pairs, fp32, computed once and used often."""

    cos: Float[Tensor, "... pairs"]
    sin: Float[Tensor, "... pairs"]


def rotary_angles(
    index: Real[Tensor, "*shape"], channels: int, base: float
) -> Float[Tensor, "*shape pairs"]:
    """Angles index * base^(-2i / channels), one per channel pair, fp32."""
    pairs = torch.arange(0, channels, 2, dtype=torch.float32, device=index.device)
    return index.float()[..., None] * base ** (-pairs / channels)


def rotation(angles: Float[Tensor, "... pairs"]) -> Rotation:
    """The rotation by these angles."""
    return Rotation(angles.cos(), angles.sin())


def rotate_pairs(
    x: Float[Tensor, "... channels"],
    turn: Rotation,
    inverse: bool = False,
    out: Float[Tensor, "... channels"] | None = None,
) -> Float[Tensor, "... channels"]:
    """Rotates each pair (x[i], x[i + half]) by its angle, in fp32; `inverse` rotates back.

    `turn` broadcasts to x. `out`, fp32 and not x itself, is for callers without a trace.
    """
    x = x.float()
    a, b = x.chunk(2, dim=-1)
    cos, sin = turn
    if inverse:
        sin = -sin
    if out is None and untraced(x):
        out = torch.empty_like(x)
    if out is None:
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    first, second = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return out
