"""Root mean square norm; with a scale per latent, and after a residual sum."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decmem.ops.untraced import bare_kernels_serve, untraced

_EPS = 1e-6
_ROWS, _WARPS = 4, 4


def rms_norm(
    x: Float[Tensor, "... channels"], gain: Float[Tensor, "... _"], eps: float = _EPS
) -> Float[Tensor, "... channels"]:
    """Unit root mean square over channels, times `gain`; in fp32, returned in fp32."""
    x = x.float()
    if untraced(x):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        shrink = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        return x * (shrink * gain) if gain.shape[-1] == 1 else (x * shrink).mul_(gain)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def scaled_norm(
    x: Float[Tensor, "B T S width"], scale: Float[Tensor, "B T width"]
) -> Float[Tensor, "B T S width"]:
    """`rms_norm` over the width, times the latent's scale (fp32); in the dtype of `x`."""
    if bare_kernels_serve(x):
        return _norm(x, None, scale)[1]
    return rms_norm(x, scale[:, :, None]).to(x.dtype)


def add_norm(
    x: Float[Tensor, "B T S width"],
    y: Float[Tensor, "B T S width"],
    scale: Float[Tensor, "B T width"],
) -> tuple[Float[Tensor, "B T S width"], Float[Tensor, "B T S width"]]:
    """The sum x + y, and its `scaled_norm`."""
    if bare_kernels_serve(x):
        return _norm(x, y, scale)
    x = x + y
    return x, scaled_norm(x, scale)


@torch.library.custom_op("decmem::scaled_norm", mutates_args=())
def _norm(x: Tensor, y: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, where there is a `y`, and the norm."""
    from decmem.ops.norm_kernels import _norm_kernel

    x, scale = x.contiguous(), scale.float()
    if scale.stride(-1) != 1:
        scale = scale.contiguous()
    total, out = _normed(x, y)
    B, T, S, W = x.shape
    constants: dict[str, Any] = {
        "W": W, "WIDTH": 1 << (W - 1).bit_length(), "ROWS": _ROWS, "num_warps": _WARPS,
    }  # fmt: skip
    _norm_kernel[(B * T * -(-S // _ROWS),)](
        x, None if y is None else y.contiguous(), scale, total, out, T, S, *scale.stride()[:2],
        **constants, ADDED=y is not None, EPS=_EPS,
    )  # fmt: skip
    return total, out


@_norm.register_fake
def _(x, y, scale):
    return _normed(x, y)


def _normed(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for both."""
    return x.new_empty((0,) if y is None else x.shape), x.new_empty(x.shape)
