"""Layers that say where precision changes: fp32 weights, arithmetic in the activation's dtype."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from decmem.ops.norm import rms_norm
from decmem.ops.untraced import untraced

_GELU_INNER, _GELU_CUBE = math.sqrt(2 / math.pi), 0.044715


class Linear(nn.Linear):
    """A linear map whose weight follows the dtype of its input."""

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class ScaledNorm(nn.Module):
    """RMSNorm and a scale computed from the diffusion time (appendix A.2)."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.scale = Linear(time_width, width)

    def forward(
        self, x: Float[Tensor, "B T S width"], time: Float[Tensor, "B T time"]
    ) -> Float[Tensor, "B T S width"]:
        scale = self.weight.float() * (1 + self.scale(time.float()))
        return rms_norm(x, scale[:, :, None]).to(x.dtype)


def gelu(x: Float[Tensor, "... channels"]) -> Float[Tensor, "... channels"]:
    """GELU in its tanh form."""
    if x.dtype == torch.float32 and untraced(x):
        # The same as x sigmoid(2 u) for tanh(u); PyTorch's tanh takes three times as long.
        twice_u = torch.square(x).mul_(2 * _GELU_INNER * _GELU_CUBE).add_(2 * _GELU_INNER).mul_(x)
        return twice_u.sigmoid_().mul_(x)
    return F.gelu(x, approximate="tanh")
