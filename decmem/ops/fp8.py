"""Matrix products of 8-bit numbers: every row of both operands has a scale of its own.

A number of 8 bits is e4m3 (four bits of exponent, three of mantissa). Rows are brought to the
format's end by their largest number, multiplied in 8 bits with fp32 sums, and scaled back. Without
gradients.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from decmem.errors import UserError
from decmem.ops.untraced import kernels_serve

FP8 = torch.float8_e4m3fn
LARGEST, LEAST = 448.0, 1e-12


class Fp8Rows(NamedTuple):
    """Numbers in 8 bits; times their row's scale (fp32) they are what was rounded, in `dtype`."""

    values: Float[Tensor, "*rows width"]
    scale: Float[Tensor, "*rows 1"]
    dtype: torch.dtype


def check_fp8(dtype: torch.dtype, device: torch.device) -> None:
    """Refuses what products cannot be made in.

    Raises:
        UserError: for another dtype, and where the GPU has no such products.
    """
    if dtype != FP8:
        raise UserError("gemm", f"no products in {dtype}", f"Choose {FP8}, or none")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError("gemm", "this GPU multiplies no 8-bit floats", "Leave it out")


def fp8_rows(x: Float[Tensor, "*rows width"]) -> Fp8Rows:
    """Rows rounded to 8 bits."""
    if kernels_serve(x):
        values, scale = _round(x, False)
        return Fp8Rows(values, scale, x.dtype)
    wide = x.float()
    most = wide.abs().amax(-1, keepdim=True).clamp(min=LEAST)
    return Fp8Rows((wide * (LARGEST / most)).to(FP8), most * (1 / LARGEST), x.dtype)


def gelu_rows(x: Float[Tensor, "*rows width"]) -> Fp8Rows:
    """`fp8_rows` of the GELU in its tanh form."""
    if kernels_serve(x):
        values, scale = _round(x, True)
        return Fp8Rows(values, scale, x.dtype)
    return fp8_rows(F.gelu(x, approximate="tanh"))


def product(
    rows: Fp8Rows, weight: Float[Tensor, "outputs width"], scale: Float[Tensor, "outputs 1"]
) -> Float[Tensor, "*rows outputs"]:
    """Rows times the transpose of a weight that was rounded by its rows too.

    On a GPU (compute capability 9.0 on) PyTorch's scaled product in bf16, elsewhere its definition.
    """
    values, by = rows.values.flatten(0, -2), rows.scale.flatten(0, -2)
    if kernels_serve(values):
        out = torch._scaled_mm(
            values, weight.T, scale_a=by, scale_b=scale.T, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip
    else:
        out = values.float() @ weight.float().T * by * scale.T
    return out.to(rows.dtype).unflatten(0, rows.values.shape[:-1])


@torch.library.custom_op("decmem::fp8_rows", mutates_args=())
def _round(x: Tensor, activated: bool) -> tuple[Tensor, Tensor]:
    from decmem.ops.fp8_kernels import _row_kernel

    out, scale = _rounded(x)
    W = x.shape[-1]
    width = max(128, 1 << (W - 1).bit_length())
    constants: dict[str, Any] = {
        "W": W, "WIDTH": width, "num_warps": min(8, max(1, width // 512)),
        "LARGEST": LARGEST, "LEAST": LEAST,
    }  # fmt: skip
    _row_kernel[(scale.numel(),)](x.contiguous(), out, scale, GELU=activated, **constants)
    return out, scale


@_round.register_fake
def _(x, activated):
    return _rounded(x)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for rounded rows and their scales."""
    return x.new_empty(x.shape, dtype=FP8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
