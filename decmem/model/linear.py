"""Layers that say where precision changes: fp32 weights, arithmetic in the activation's dtype."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from decmem.ops.fp8 import Fp8Rows, fp8_rows, product
from decmem.ops.untraced import bare_kernels_serve, untraced

_GELU_INNER, _GELU_CUBE = math.sqrt(2 / math.pi), 0.044715


class Linear(nn.Linear):
    """A linear map whose weight follows the dtype of its input."""

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class Projection(Linear):
    """A linear map of a block, without bias; its products may be made of 8-bit numbers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.register_buffer("row_scale", None, persistent=False)
        self.row_scale: Tensor | None

    @property
    def rounds(self) -> bool:
        """Whether its products are made of 8-bit numbers."""
        return self.row_scale is not None

    def hold_fp8(self) -> None:
        """Rounds the weight, row by row, for good."""
        if self.row_scale is None:
            rows = fp8_rows(self.weight.detach())
            self.weight = nn.Parameter(rows.values, requires_grad=False)
            self.row_scale = rows.scale

    def forward(self, x: Float[Tensor, "... inputs"] | Fp8Rows) -> Float[Tensor, "... outputs"]:
        if self.row_scale is not None:
            rows = fp8_rows(x) if isinstance(x, Tensor) else x
            return product(rows, self.weight, self.row_scale)
        assert isinstance(x, Tensor)
        return super().forward(x)

    def activated(self, x: Float[Tensor, "... inputs"] | Fp8Rows) -> Float[Tensor, "... outputs"]:
        """`gelu` of the outputs; in 16 bits on a GPU, without gradients, the product itself applies
        it before its sums are rounded."""
        if self.rounds or not isinstance(x, Tensor):
            return gelu(self(x))
        if x.dtype.itemsize != 2 or not bare_kernels_serve(x):
            return gelu(self(x))
        # On a GPU this GELU is the tanh form (on a CPU it is not).
        weight = self.weight.to(x.dtype)
        rows, none = x.flatten(0, -2), x.new_zeros(len(weight))
        out = torch._addmm_activation(none, rows, weight.T, use_gelu=True)
        return out.unflatten(0, x.shape[:-1])


class ScaledNorm(nn.Module):
    """RMSNorm and a scale computed from the diffusion time (appendix A.2); `decmem.ops.norm`
    applies the scale."""

    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.scale = Linear(time_width, width)

    def scale_at(self, time: Float[Tensor, "B T time"]) -> Float[Tensor, "B T width"]:
        """What the norm is multiplied by at these diffusion times, fp32."""
        return self.weight.float() * (1 + self.scale(time.float()))


class JointScales:
    """The scales of many norms in one product: their parameters become views of joint ones.

    Whatever changes the parameters in place changes both; a model that was moved or cast has
    parameters of its own again, and `serve` says so.
    """

    def __init__(self, norms: list[ScaledNorm]) -> None:
        self.norms = norms
        self.weight = torch.cat([norm.scale.weight.detach() for norm in norms])
        self.bias = torch.cat([norm.scale.bias.detach() for norm in norms])
        self.gain = torch.cat([norm.weight.detach() for norm in norms])
        width = len(self.gain) // len(norms)
        for i, norm in enumerate(norms):
            part = slice(i * width, (i + 1) * width)
            norm.scale.weight.data = self.weight[part]
            norm.scale.bias.data = self.bias[part]
            norm.weight.data = self.gain[part]

    @property
    def serve(self) -> bool:
        """Whether the norms' parameters are still those that are joined."""
        first = self.norms[0]
        mine = (self.weight, self.bias, self.gain)
        theirs = (first.scale.weight, first.scale.bias, first.weight)
        return all(a.data_ptr() == b.data_ptr() for a, b in zip(mine, theirs, strict=True))

    def at(self, time: Float[Tensor, "B T time"]) -> Float[Tensor, "norms B T width"]:
        """`ScaledNorm.scale_at` of every norm."""
        scales = self.gain.float() * (1 + F.linear(time.float(), self.weight, self.bias))
        return scales.unflatten(-1, (len(self.norms), -1)).movedim(2, 0)


def gelu(x: Float[Tensor, "... channels"]) -> Float[Tensor, "... channels"]:
    """GELU in its tanh form."""
    if x.dtype == torch.float32 and untraced(x):
        # The same as x sigmoid(2 u) for tanh(u); PyTorch's tanh takes three times as long.
        twice_u = torch.square(x).mul_(2 * _GELU_INNER * _GELU_CUBE).add_(2 * _GELU_INNER).mul_(x)
        return twice_u.sigmoid_().mul_(x)
    return F.gelu(x, approximate="tanh")
