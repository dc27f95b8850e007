"""The scaled norm in Triton: a residual sum, its norm and its scale in one pass over the numbers.

What is computed, in plain PyTorch: `decmem.ops.norm`. A program takes a few tokens of one latent,
which share a scale, and holds a token's channels while it needs them; arithmetic is fp32, and where
products are made of 8-bit numbers, the rows are rounded to those. No gradients: training leaves the
fusion to the compiler.
"""

from typing import no_type_check

import triton
import triton.language as tl

from decmem.ops.fp8_kernels import to_fp8


@triton.jit
@no_type_check
def _norm_kernel(
    X, Y, SCALE, SUM, OUT, FP8_ROWS, ROW_SCALE, T, S, stride_b, stride_t,
    W: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    ADDED: tl.constexpr, PLAIN: tl.constexpr, ROUNDED: tl.constexpr,
    EPS: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(S, ROWS)
    bt, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * ROWS
    d = tl.arange(0, WIDTH)
    scale = tl.load(SCALE + bt // T * stride_b + bt % T * stride_t + d, mask=d < W, other=0.0)
    for row in tl.static_range(ROWS):
        here = (d < W) & (first + row < S)
        at = (bt * S + first + row).to(tl.int64) * W + d
        x = tl.load(X + at, mask=here, other=0.0).to(tl.float32)
        if ADDED:
            x += tl.load(Y + at, mask=here, other=0.0).to(tl.float32)
            rounded = x.to(SUM.dtype.element_ty)
            tl.store(SUM + at, rounded, mask=here)
            x = rounded.to(tl.float32)
        shrink = tl.rsqrt(tl.sum(x * x, 0) / W + EPS)
        x = (x * shrink * scale).to(X.dtype.element_ty)
        if PLAIN:
            tl.store(OUT + at, x, mask=here)
        if ROUNDED:
            x, row_scale = to_fp8(x.to(tl.float32), LARGEST, LEAST)
            tl.store(ROW_SCALE + bt * S + first + row, row_scale, mask=first + row < S)
            tl.store(FP8_ROWS + at, x.to(FP8_ROWS.dtype.element_ty), mask=here)
