"""Coding of heads without gradients: into room that is there, and rounded to 8 bits.

By the kernels in CUDA C++ alone; callers have another way where these do not serve.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decmem.ops.coding import (
    EPS,
    Groups,
    Places,
    decoding_tables,
    encoding_tables,
    fp32_table,
)
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
    slots: Tensor | None, source: Tensor | None, groups: list[int],
) -> Tensor:  # fmt: skip
    assert coding_cuda_kernels is not None
    H, S, D = k.shape[1], k.shape[3], sum(groups)
    q, unused = qkv.new_empty(*qkv.shape[:1], H, qkv.shape[1], S, D), qkv.new_empty(0)
    coding_cuda_kernels.run_encode(
        qkv, gains, tuple(tables), [q, k, v, unused, unused], groups, EPS,
        local=False, values=True, heads_last=False, latents=k.stride(1) // (S * D),
        slots=slots, source=source, query_factor=D**-0.5 / EXPONENT_SCALE,
    )  # fmt: skip
    return q


@_encode_into.register_fake
def _(qkv, gains, tables, k, v, slots, source, groups):
    return qkv.new_empty(qkv.shape[0], k.shape[1], qkv.shape[1], k.shape[3], sum(groups))


def encode_heads_into(
    qkv: Float[Tensor, "B T tokens three_width"],
    gains: Float[Tensor, "2 H"] | None,
    groups: Groups,
    places: Places,
    k: Float[Tensor, "B H T S D"] | Float[Tensor, "B H room S D"],
    v: Float[Tensor, "B H T S D"] | Float[Tensor, "B H room S D"],
    slots: Int[Tensor, "T"] | None = None,
    source: Int[Tensor, "S"] | None = None,
) -> Tensor | None:
    """As `encode_heads` without `local`, keys and values into `k` and `v`: some latents of larger
    tensors, or all, and then the `slots` tell where these latents belong. `source`: the token of
    each slot; None: there are as many of both. Without gradients.

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
    tables, wide = encoding_tables(places), fp32_table(gains)
    return _encode_into(qkv.contiguous(), wide, tables, k, v, slots, source, list(groups))


def _decodes(o: Tensor, far: Tensor | None, gate: Tensor | None, groups: Groups) -> bool:
    cuda = coding_cuda_kernels
    if cuda is None or not bare_kernels_serve(o):
        return False
    return cuda.suits(o, o.shape[1], list(groups), far, gate)


@torch.library.custom_op("decmem::decode_head_rows", mutates_args=())
def _decode_rows(
    o: Tensor, far: Tensor | None, gate: Tensor | None, tables: list[Tensor | None],
    kept: Tensor | None, groups: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert coding_cuda_kernels is not None
    values, scale = _decoded_rows(o, kept)
    coding_cuda_kernels.run_decode(o, far, gate, tables, groups, values, scale, kept=kept)
    return values, scale


@_decode_rows.register_fake
def _(o, far, gate, tables, kept, groups):
    return _decoded_rows(o, kept)


def _decoded_rows(o: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    B, H, T, S, D = o.shape
    N = S if kept is None else len(kept)
    scale = o.new_empty(B, T, N, 1, dtype=torch.float32)
    return o.new_empty(B, T, N, H * D, dtype=FP8), scale


def decode_head_rows(
    o: Float[Tensor, "B H T S D"],
    far: Float[Tensor, "B H T S D"] | None,
    gate: Float[Tensor, "B T tokens gates"] | None,
    groups: Groups,
    places: Places,
    kept: Int[Tensor, "tokens"] | None = None,
) -> Fp8Rows | None:
    """`decode_heads`, of the slots that are `kept`, rounded to 8 bits. Without gradients.

    Returns:
        The rows; None where this is not to be had.
    """
    if not _decodes(o, far, gate, groups):
        return None
    if torch.cuda.get_device_capability(o.device) < (8, 9):
        return None
    far, gate = (None if x is None else x.contiguous() for x in (far, gate))
    tables = decoding_tables(places)
    values, scale = _decode_rows(o.contiguous(), far, gate, tables, kept, list(groups))
    return Fp8Rows(values, scale, o.dtype)
