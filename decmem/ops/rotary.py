"""Rotary position embedding: angles for 1D indices, rotation of channel pairs."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Real
from torch import Tensor


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
    x: Float[Tensor, "... channels"], turn: Rotation, inverse: bool = False
) -> Float[Tensor, "... channels"]:
    """Rotates each pair (x[i], x[i + half]) by its angle, in fp32; `inverse` rotates back."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = turn
    if inverse:
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
