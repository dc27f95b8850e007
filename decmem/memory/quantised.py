"""Numbers as they are stored: in 16 or 32 bits as they are, in 8 bits with a scale per token.

A stored number of 8 bits is e4m3 (four bits of exponent, three of mantissa): a relative error of at
most 2^-4, after the scale has brought the largest number of the token's head to the format's end.
"""

import torch
from jaxtyping import Float
from torch import Tensor

FP8 = torch.float8_e4m3fn
_LARGEST = 448.0
STORED = (torch.float32, torch.bfloat16, torch.float16, FP8)
"""What keys and values may be stored in."""


def quantise(x: Float[Tensor, "*tokens D"]) -> tuple[Tensor, Float[Tensor, "*tokens 1"]]:
    """e4m3 numbers and the bf16 scale of each token; x is their product but for rounding."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / _LARGEST).clamp(min=1e-30).to(torch.bfloat16)
    # The scale was rounded: what it no longer covers is cut, where a cast would make it NaN.
    return (x / scale.float()).clamp(-_LARGEST, _LARGEST).to(FP8), scale


def restore(
    stored: Tensor, scale: Float[Tensor, "*tokens 1"] | None, dtype: torch.dtype
) -> Float[Tensor, "*tokens D"]:
    """What was stored, in `dtype`."""
    if scale is None:
        return stored.to(dtype)
    return (stored.to(torch.float32) * scale.float()).to(dtype)
