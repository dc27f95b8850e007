"""Layers that say where precision changes: fp32 weights, arithmetic in the activation's dtype."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear map whose weight follows the dtype of its input."""

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


def rms_norm(x: Float[Tensor, "... channels"], eps: float = 1e-6) -> Float[Tensor, "... channels"]:
    """Unit root mean square over channels, in fp32; returned in fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


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
        return (rms_norm(x) * scale[:, :, None]).to(x.dtype)
