"""Rotary position embedding: angles for 1D indices, rotation of channel pairs."""

import torch
from jaxtyping import Float, Real
from torch import Tensor


def rotary_angles(
    index: Real[Tensor, "*shape"], channels: int, base: float
) -> Float[Tensor, "*shape pairs"]:
    """Angles index * base^(-2i / channels), one per channel pair, fp32."""
    pairs = torch.arange(0, channels, 2, dtype=torch.float32, device=index.device)
    return index.float()[..., None] * base ** (-pairs / channels)


def rotate_pairs(
    x: Float[Tensor, "... channels"], angles: Float[Tensor, "... pairs"], inverse: bool = False
) -> Float[Tensor, "... channels"]:
    """Rotates each pair (x[2i], x[2i + 1]) by its angle, in fp32; `inverse` rotates back."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    if inverse:
        sin = -sin
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2)
