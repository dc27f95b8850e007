"""Block-sparse attention in Triton: forward and both gradients.

Query-outer forward and dQ (each program owns a tile of one query block and walks its list);
key-outer dK/dV (each program owns a tile of one key block and walks the query blocks that read
it, an inverse list built by one sort), so no atomics and the same bits every time. Rows of the
listed blocks are gathered one by one, so block sizes need not be powers of two. Empty slots of a
list come last. Statistics and accumulators are fp32; fp32 operands multiply in fp32, not TF32.
`no_type_check` keeps the tests' run-time shape checks off the kernels, whose source Triton reads.
"""

import math
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
@no_type_check
def _entries(LISTS, slots: tl.constexpr, SLOTS2: tl.constexpr):
    """Number of filled slots of one list."""
    s = tl.arange(0, SLOTS2)
    listed = tl.load(LISTS + s, mask=s < slots, other=-1)
    return tl.sum((listed >= 0).to(tl.int32), axis=0)


@triton.jit
@no_type_check
def _forward_kernel(
    Q, K, V, LISTS, VALID, OUT, LSE,
    H, G, NQ, NK, scale_log2,
    PQ: tl.constexpr, PK: tl.constexpr, SLOTS: tl.constexpr, SLOTS2: tl.constexpr,
    PERIOD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (PQ + BM - 1) // BM
    i = tl.program_id(0) // tiles
    bh = tl.program_id(1).to(tl.int64)
    g = tl.where(G > 1, bh % H, 0)
    rows = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    row_ok = rows < PQ
    d_ok = d < D
    q_at = ((bh * NQ + i) * PQ + rows)[:, None] * D + d[None, :]
    q = tl.load(Q + q_at, mask=row_ok[:, None] & d_ok[None, :], other=0.0)

    LISTS += (((bh // H) * G + g) * NQ + i) * SLOTS
    total = _entries(LISTS, SLOTS, SLOTS2) * PK
    top = tl.full([BM], float("-inf"), tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for start in range(0, total, BN):
        n = start + tl.arange(0, BN)
        ok = n < total
        block = tl.load(LISTS + n // PK, mask=ok, other=0)
        if PERIOD > 0:
            ok = ok & (tl.load(VALID + (block % PERIOD) * PK + n % PK, mask=ok, other=0) != 0)
        at = ((bh * NK + block) * PK + n % PK) * D
        k = tl.load(K + at[None, :] + d[:, None], mask=ok[None, :] & d_ok[:, None], other=0.0)
        v = tl.load(V + at[:, None] + d[None, :], mask=ok[:, None] & d_ok[None, :], other=0.0)
        s = tl.dot(q, k, input_precision="ieee") * scale_log2
        s = tl.where(ok[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - shift[:, None])
        fade = tl.exp2(top - shift)
        norm = norm * fade + tl.sum(p, axis=1)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    safe = tl.where(norm > 0, norm, 1.0)
    out = acc / safe[:, None]
    tl.store(OUT + q_at, out.to(OUT.dtype.element_ty), mask=row_ok[:, None] & d_ok[None, :])
    lse = tl.where(norm > 0, top + tl.log2(safe), 0.0)
    tl.store(LSE + (bh * NQ + i) * PQ + rows, lse, mask=row_ok)


@triton.jit
@no_type_check
def _query_gradient_kernel(
    Q, K, V, LISTS, VALID, DOUT, LSE, DELTA, DQ,
    H, G, NQ, NK, scale, scale_log2,
    PQ: tl.constexpr, PK: tl.constexpr, SLOTS: tl.constexpr, SLOTS2: tl.constexpr,
    PERIOD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (PQ + BM - 1) // BM
    i = tl.program_id(0) // tiles
    bh = tl.program_id(1).to(tl.int64)
    g = tl.where(G > 1, bh % H, 0)
    rows = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    row_ok = rows < PQ
    d_ok = d < D
    stat_at = (bh * NQ + i) * PQ + rows
    q_at = stat_at[:, None] * D + d[None, :]
    q = tl.load(Q + q_at, mask=row_ok[:, None] & d_ok[None, :], other=0.0)
    do = tl.load(DOUT + q_at, mask=row_ok[:, None] & d_ok[None, :], other=0.0)
    lse = tl.load(LSE + stat_at, mask=row_ok, other=0.0)
    delta = tl.load(DELTA + stat_at, mask=row_ok, other=0.0)

    LISTS += (((bh // H) * G + g) * NQ + i) * SLOTS
    total = _entries(LISTS, SLOTS, SLOTS2) * PK
    dq = tl.zeros([BM, DP], tl.float32)
    for start in range(0, total, BN):
        n = start + tl.arange(0, BN)
        ok = n < total
        block = tl.load(LISTS + n // PK, mask=ok, other=0)
        if PERIOD > 0:
            ok = ok & (tl.load(VALID + (block % PERIOD) * PK + n % PK, mask=ok, other=0) != 0)
        at = ((bh * NK + block) * PK + n % PK) * D
        kt = tl.load(K + at[None, :] + d[:, None], mask=ok[None, :] & d_ok[:, None], other=0.0)
        vt = tl.load(V + at[None, :] + d[:, None], mask=ok[None, :] & d_ok[:, None], other=0.0)
        s = tl.dot(q, kt, input_precision="ieee") * scale_log2
        p = tl.where(ok[None, :], tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(do, vt, input_precision="ieee")
        ds = p * (dp - delta[:, None]) * scale
        dq += tl.dot(ds.to(kt.dtype), tl.trans(kt), input_precision="ieee")
    tl.store(DQ + q_at, dq.to(DQ.dtype.element_ty), mask=row_ok[:, None] & d_ok[None, :])


@triton.jit
@no_type_check
def _key_gradient_kernel(
    Q, K, V, READERS, OFFSETS, VALID, DOUT, LSE, DELTA, DK, DV,
    H, G, NQ, NK, ENTRIES, scale, scale_log2,
    PQ: tl.constexpr, PK: tl.constexpr, PERIOD: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = (PK + BN - 1) // BN
    j = tl.program_id(0) // tiles
    bh = tl.program_id(1).to(tl.int64)
    bg = (bh // H) * G + tl.where(G > 1, bh % H, 0)
    cols = (tl.program_id(0) % tiles) * BN + tl.arange(0, BN)
    d = tl.arange(0, DP)
    d_ok = d < D
    col_ok = cols < PK
    key_ok = col_ok
    if PERIOD > 0:
        key_ok = col_ok & (tl.load(VALID + (j % PERIOD) * PK + cols, mask=col_ok, other=0) != 0)
    k_at = ((bh * NK + j) * PK + cols)[:, None] * D + d[None, :]
    first = tl.load(OFFSETS + bg * (NK + 1) + j)
    total = (tl.load(OFFSETS + bg * (NK + 1) + j + 1) - first) * PQ
    # An unread block may hold NaN: it is not even loaded.
    load_ok = key_ok & (total > 0)
    k = tl.load(K + k_at, mask=load_ok[:, None] & d_ok[None, :], other=0.0)
    v = tl.load(V + k_at, mask=load_ok[:, None] & d_ok[None, :], other=0.0)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    for start in range(0, total, BM):
        m = start + tl.arange(0, BM)
        ok = m < total
        i = tl.load(READERS + bg * ENTRIES + first + m // PQ, mask=ok, other=0)
        stat_at = (bh * NQ + i) * PQ + m % PQ
        q_at = stat_at[:, None] * D + d[None, :]
        q = tl.load(Q + q_at, mask=ok[:, None] & d_ok[None, :], other=0.0)
        do = tl.load(DOUT + q_at, mask=ok[:, None] & d_ok[None, :], other=0.0)
        lse = tl.load(LSE + stat_at, mask=ok, other=0.0)
        delta = tl.load(DELTA + stat_at, mask=ok, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
        p = tl.where(key_ok[:, None] & ok[None, :], tl.exp2(s - lse[None, :]), 0.0)
        dv += tl.dot(p.to(do.dtype), do, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        ds = p * (dp - delta[None, :]) * scale
        dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
    out_ok = col_ok[:, None] & d_ok[None, :]
    tl.store(DK + k_at, dk.to(DK.dtype.element_ty), mask=out_ok)
    tl.store(DV + k_at, dv.to(DV.dtype.element_ty), mask=out_ok)


def _tile(tokens: int) -> int:
    """Rows of a tile. 64 fill a warp group; on an H200 two of them beat three of 32 for 96 rows."""
    return 64 if tokens > 32 else 32 if tokens > 16 else 16


def _warps(rows: int) -> int:
    return 4 if rows >= 64 else 2 if rows >= 32 else 1


def inverse_lists(lists: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Who reads each key block: query blocks sorted by the key block they read, and offsets.

    Args:
        lists: (B, G, Nq, K) int32, -1 where empty.
        blocks: number of key blocks Nk.

    Returns:
        readers (B, G, Nq K) int32 and offsets (B, G, Nk + 1) int32.
    """
    B, G, Nq, K = lists.shape
    flat = torch.where(lists < 0, blocks, lists).reshape(B, G, Nq * K)
    flat, order = flat.sort(dim=-1, stable=True)
    edges = torch.arange(blocks + 1, dtype=flat.dtype, device=flat.device).expand(B, G, -1)
    offsets = torch.searchsorted(flat, edges.contiguous())
    return (order // K).to(torch.int32), offsets.to(torch.int32)


def _shapes(q: Tensor, k: Tensor, lists: Tensor, valid: Tensor | None) -> dict[str, Any]:
    D = q.shape[-1]
    return {
        "PQ": q.shape[3],
        "PK": k.shape[3],
        "PERIOD": 0 if valid is None else valid.shape[0],
        "D": D,
        "DP": max(16, triton.next_power_of_2(D)),
    }


@torch.library.custom_op("decmem::block_sparse_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    B, H, NQ, PQ, _ = q.shape
    out, lse = torch.empty_like(q), q.new_empty((B, H, NQ, PQ), dtype=torch.float32)
    bm = _tile(PQ)
    slots = lists.shape[-1]
    _forward_kernel[(NQ * triton.cdiv(PQ, bm), B * H)](
        q, k, v, lists, valid, out, lse,
        H, lists.shape[1], NQ, k.shape[2], scale * math.log2(math.e),
        SLOTS=slots, SLOTS2=triton.next_power_of_2(slots), **_shapes(q, k, lists, valid),
        BM=bm, BN=64, num_warps=_warps(bm), num_stages=2,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(q, k, v, lists, valid, scale):
    return torch.empty_like(q), q.new_empty(q.shape[:4], dtype=torch.float32)


@torch.library.custom_op("decmem::block_sparse_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    out: Tensor, lse: Tensor, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, NQ, PQ, _ = q.shape
    NK, PK = k.shape[2:4]
    G, slots = lists.shape[1], lists.shape[-1]
    delta = (out.float() * grad.float()).sum(-1)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    shapes, scale_log2 = _shapes(q, k, lists, valid), scale * math.log2(math.e)
    bm = _tile(PQ)
    _query_gradient_kernel[(NQ * triton.cdiv(PQ, bm), B * H)](
        q, k, v, lists, valid, grad, lse, delta, dq,
        H, G, NQ, NK, scale, scale_log2,
        SLOTS=slots, SLOTS2=triton.next_power_of_2(slots), **shapes,
        BM=bm, BN=64, num_warps=_warps(bm), num_stages=2,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    readers, offsets = inverse_lists(lists, NK)
    bn = _tile(PK)
    _key_gradient_kernel[(NK * triton.cdiv(PK, bn), B * H)](
        q, k, v, readers, offsets, valid, grad, lse, delta, dk, dv,
        H, G, NQ, NK, NQ * slots, scale, scale_log2,
        **shapes, BM=64, BN=bn, num_warps=_warps(bn), num_stages=2,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _(q, k, v, lists, valid, scale, out, lse, grad):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, output):
    q, k, v, lists, valid, scale = inputs
    ctx.save_for_backward(q, k, v, lists, valid, *output)
    ctx.scale = scale


def _autograd(ctx, grad, _grad_lse):
    q, k, v, lists, valid, out, lse = ctx.saved_tensors
    grads = _backward(q, k, v, lists, valid, ctx.scale, out, lse, grad.contiguous())
    return *grads, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    valid: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Same contract as `decmem.ops.reference.block_sparse_attention`; empty slots come last."""
    B, H, NQ, _, D = q.shape
    lists = lists.expand(B, -1, NQ, -1).to(torch.int32).contiguous()
    if valid is not None:
        valid = valid.contiguous()
    scale = D**-0.5 if scale is None else scale
    out, _ = _forward(q.contiguous(), k.contiguous(), v.contiguous(), lists, valid, scale)
    return out
