"""Rounding to 8 bits in Triton, after an activation where one precedes: a row in one launch.

What is computed, in plain PyTorch: `decmem.ops.fp8`; the norm's kernel rounds its own rows.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def to_fp8(x, LARGEST: tl.constexpr, LEAST: tl.constexpr):
    """A row times what brings its largest number to the format's end, and the row's scale."""
    most = tl.maximum(tl.max(tl.abs(x), 0), LEAST)
    return x * (LARGEST / most), most * (1.0 / LARGEST)


@triton.jit
@no_type_check
def _row_kernel(
    X, OUT, SCALE, W: tl.constexpr, WIDTH: tl.constexpr, GELU: tl.constexpr,
    LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    x = tl.load(X + row * W + d, mask=d < W, other=0.0).to(tl.float32)
    if GELU:
        # x sigmoid(2 u) for tanh(u), rounded as the activation is by itself.
        u = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
        x = (x * tl.sigmoid(2.0 * u)).to(X.dtype.element_ty).to(tl.float32)
    x, scale = to_fp8(x, LARGEST, LEAST)
    tl.store(OUT + row * W + d, x.to(OUT.dtype.element_ty), mask=d < W)
    tl.store(SCALE + row, scale)
