"""Coding of heads without gradients: into room that is there, and rounded to 8 bits.

By the kernels in CUDA C++ alone; callers have another way where these do not serve.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decmem.ops.coding import EPS, Groups, Places, fp32_table, turn_tables
from decmem.ops.fp8 import FP8, Fp8Rows
from decmem.ops.untraced import bare_kernels_serve

try:
    from decmem.ops import coding_cuda_kernels
except ImportError:  # The driver's Python bindings come with PyTorch for CUDA.
    coding_cuda_kernels = None


EXPONENT_SCALE = math.log(2)
"""The `scale` of attention for which products of queries and keys are exponents of two."""


@torch.library.custom_op("decmem::encode_heads_into", mutates_args=("k", "v"))
def _encode_into(
    qkv: Tensor, gains: Tensor | None, tables: list[Tensor | None], k: Tensor, v: Tensor,
    slots: Tensor | None, groups: list[int],
) -> Tensor:  # fmt: skip
    assert coding_cuda_kernels is not None
    H, D = k.shape[1], sum(groups)
    B, T, S, _ = qkv.shape
    q, unused = qkv.new_empty(B, H, T, S, D), qkv.new_empty(0)
    coding_cuda_kernels.run_encode(
        qkv, gains, tuple(tables), [q, k, v, unused, unused], groups, EPS,
        local=False, values=True, heads_last=False, latents=k.stride(1) // (S * D),
        slots=slots, query_factor=D**-0.5 / EXPONENT_SCALE,
    )  # fmt: skip
    return q


@_encode_into.register_fake
def _(qkv, gains, tables, k, v, slots, groups):
    B, T, S, _ = qkv.shape
    return qkv.new_empty(B, k.shape[1], T, S, sum(groups))


def encode_heads_into(
    qkv: Float[Tensor, "B T S three_width"],
    gains: Float[Tensor, "2 H"] | None,
    groups: Groups,
    places: Places,
    k: Float[Tensor, "B H T S D"] | Float[Tensor, "B H room S D"],
    v: Float[Tensor, "B H T S D"] | Float[Tensor, "B H room S D"],
    slots: Int[Tensor, "T"] | None = None,
) -> Tensor | None:
    """As `encode_heads` without `local`, keys and values into `k` and `v`: some latents of larger
    tensors, or all, and then the `slots` tell where these latents belong. Without gradients.

    Queries come multiplied by D^-1/2 log2(e), before they are rounded, so that attention with the
    scale `EXPONENT_SCALE` need not multiply their scores.

    Returns:
        Queries; None where this is not to be had, and nothing was written.
    """
    B, H, _, S, D = k.shape
    alike = k.stride() == v.stride() and k.stride()[2:] == (S * D, D, 1)
    whole = k.stride(1) % (S * D) == 0 and (B == 1 or k.stride(0) == H * k.stride(1))
    serves = coding_cuda_kernels is not None and coding_cuda_kernels.suits(
        qkv, H, list(groups), k, v
    )
    if not (serves and alike and whole) or torch.is_grad_enabled():
        return None
    tables = [
        fp32_table(places.query_matrix), fp32_table(places.key_matrix), *turn_tables(places.space),
        *turn_tables(places.surface), *turn_tables(places.time),
    ]  # fmt: skip
    return _encode_into(qkv.contiguous(), fp32_table(gains), tables, k, v, slots, list(groups))


@torch.library.custom_op("decmem::decode_head_rows", mutates_args=())
def _decode_rows(
    o: Tensor, far: Tensor | None, gate: Tensor | None, matrix: Tensor | None,
    space_cos: Tensor | None, space_sin: Tensor | None,
    surface_cos: Tensor | None, surface_sin: Tensor | None, groups: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert coding_cuda_kernels is not None
    tables = matrix, space_cos, space_sin, surface_cos, surface_sin
    values, scale = _decoded_rows(o)
    coding_cuda_kernels.run_decode(o, far, gate, *tables, groups, values, scale)
    return values, scale


@_decode_rows.register_fake
def _(o, far, gate, matrix, space_cos, space_sin, surface_cos, surface_sin, groups):
    return _decoded_rows(o)


def _decoded_rows(o: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, S, D = o.shape
    scale = o.new_empty(B, T, S, 1, dtype=torch.float32)
    return o.new_empty(B, T, S, H * D, dtype=FP8), scale


def decode_head_rows(
    o: Float[Tensor, "B H T S D"],
    far: Float[Tensor, "B H T S D"] | None,
    gate: Float[Tensor, "B T S gates"] | None,
    groups: Groups,
    places: Places,
) -> Fp8Rows | None:
    """`decode_heads`, rounded to 8 bits. Without gradients.

    Returns:
        The rows; None where this is not to be had.
    """
    cuda, H = coding_cuda_kernels, o.shape[1]
    if cuda is None or not bare_kernels_serve(o) or not cuda.suits(o, H, list(groups), far, gate):
        return None
    if torch.cuda.get_device_capability(o.device) < (8, 9):
        return None
    values, scale = _decode_rows(
        o.contiguous(), None if far is None else far.contiguous(),
        None if gate is None else gate.contiguous(), fp32_table(places.query_matrix),
        *turn_tables(places.space), *turn_tables(places.surface), list(groups),
    )  # fmt: skip
    return Fp8Rows(values, scale, o.dtype)
