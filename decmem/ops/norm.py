"""Root mean square norm; with a scale per latent, after a residual sum, rounded to 8 bits."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decmem.ops.fp8 import FP8, LARGEST, LEAST, Fp8Rows, fp8_rows
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
        return _norm(x, None, scale, True, False)[1]
    return rms_norm(x, scale[:, :, None]).to(x.dtype)


def add_norm(
    x: Float[Tensor, "B T S width"],
    y: Float[Tensor, "B T S width"],
    scale: Float[Tensor, "B T width"],
) -> tuple[Float[Tensor, "B T S width"], Float[Tensor, "B T S width"]]:
    """The sum x + y, and its `scaled_norm`."""
    if bare_kernels_serve(x):
        return _norm(x, y, scale, True, False)[:2]
    x = x + y
    return x, scaled_norm(x, scale)


def scaled_norm_rows(x: Float[Tensor, "B T S width"], scale: Float[Tensor, "B T width"]) -> Fp8Rows:
    """`scaled_norm`, rounded to 8 bits."""
    if bare_kernels_serve(x):
        *_, values, row_scale = _norm(x, None, scale, False, True)
        return Fp8Rows(values, row_scale, x.dtype)
    return fp8_rows(scaled_norm(x, scale))


def add_norm_rows(
    x: Float[Tensor, "B T S width"],
    y: Float[Tensor, "B T S width"],
    scale: Float[Tensor, "B T width"],
) -> tuple[Float[Tensor, "B T S width"], Fp8Rows]:
    """`add_norm`, the norm rounded to 8 bits."""
    if bare_kernels_serve(x):
        total, _, values, row_scale = _norm(x, y, scale, False, True)
        return total, Fp8Rows(values, row_scale, x.dtype)
    x = x + y
    return x, scaled_norm_rows(x, scale)


def add_norm_both(
    x: Float[Tensor, "B T S width"],
    y: Float[Tensor, "B T S width"],
    scale: Float[Tensor, "B T width"],
) -> tuple[Float[Tensor, "B T S width"], Float[Tensor, "B T S width"], Fp8Rows]:
    """`add_norm`, and the norm rounded to 8 bits besides."""
    if bare_kernels_serve(x):
        total, normed, values, row_scale = _norm(x, y, scale, True, True)
        return total, normed, Fp8Rows(values, row_scale, x.dtype)
    x, normed = add_norm(x, y, scale)
    return x, normed, fp8_rows(normed)


@torch.library.custom_op("decmem::scaled_norm", mutates_args=())
def _norm(
    x: Tensor, y: Tensor | None, scale: Tensor, plain: bool, rounded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum where there is a `y`, the norm as it is, rounded to 8 bits, or both, and the scales
    of what is rounded."""
    from decmem.ops.norm_kernels import _norm_kernel

    x, scale = x.contiguous(), scale.float()
    if scale.stride(-1) != 1:
        scale = scale.contiguous()
    total, out, rows, row_scale = _normed(x, y, plain, rounded)
    B, T, S, W = x.shape
    constants: dict[str, Any] = {
        "W": W, "WIDTH": 1 << (W - 1).bit_length(), "ROWS": _ROWS, "num_warps": _WARPS,
        "EPS": _EPS, "LARGEST": LARGEST, "LEAST": LEAST,
    }  # fmt: skip
    _norm_kernel[(B * T * -(-S // _ROWS),)](
        x, None if y is None else y.contiguous(), scale, total, out, rows, row_scale, T, S,
        *scale.stride()[:2], **constants, ADDED=y is not None, PLAIN=plain, ROUNDED=rounded,
    )  # fmt: skip
    return total, out, rows, row_scale


@_norm.register_fake
def _(x, y, scale, plain, rounded):
    return _normed(x, y, plain, rounded)


def _normed(
    x: Tensor, y: Tensor | None, plain: bool, rounded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for all four."""
    nothing = (0,)
    return (
        x.new_empty(nothing if y is None else x.shape),
        x.new_empty(x.shape if plain else nothing),
        x.new_empty(x.shape if rounded else nothing, dtype=FP8),
        x.new_empty((*x.shape[:-1], 1) if rounded else nothing, dtype=torch.float32),
    )
