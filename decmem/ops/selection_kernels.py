"""Retrieval in Triton: scores of blocks, the best of a list, and the mean of a block's tokens.

What is computed, in plain PyTorch: `decmem.ops.selection`. A program chooses for one query block.
It holds the scores of all candidates as integers that sort as they do, finds the `count`-th largest
bit by bit, from the highest down, and counts what lies above it; of those that equal it the first
few are taken. Nothing is sorted: the list comes out ascending by itself.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from decmem.ops.sparse_tiles import cdiv, columns, power


@triton.jit(do_not_specialize=["H", "Nq", "ROWS", "Nk", "tiles", "k_world", "k_head"])
@no_type_check
def _score_kernel(
    Q, K, OUT, H, Nq, ROWS, Nk, tiles, k_world, k_head,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BK keys of one head with the ROWS query blocks, of one or more worlds, that they serve."""
    pid = tl.program_id(0)
    h, w = pid // tiles % H, pid // tiles // H
    j = pid % tiles * BK + tl.arange(0, BK)
    row = tl.arange(0, BQ)
    world = w * (ROWS // Nq) + row // Nq
    line = ((world * H + h) * Nq + row % Nq).to(tl.int64)[:, None]
    d0, d1 = tl.arange(0, D0)[None, :], D0 + tl.arange(0, D1 if D1 > 0 else 16)[None, :]
    row_ok, key_ok = (row < ROWS)[:, None], (j < Nk)[:, None]
    K += w.to(tl.int64) * k_world + h.to(tl.int64) * k_head
    at = j.to(tl.int64)[:, None] * D
    q = tl.load(Q + line * D + d0, mask=row_ok & (d0 < D), other=0.0)
    k = tl.load(K + at + d0, mask=key_ok & (d0 < D), other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if D1 > 0:
        q = tl.load(Q + line * D + d1, mask=row_ok & (d1 < D), other=0.0)
        k = tl.load(K + at + d1, mask=key_ok & (d1 < D), other=0.0)
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
    tl.store(OUT + line * Nk + j[None, :], scores, mask=row_ok & (j < Nk)[None, :])


def run_score(q: Tensor, k: Tensor) -> Tensor:
    """As the operator `decmem::score_blocks`, of fp32."""
    B, H, Nq, D = q.shape
    worlds, Nk = k.shape[0], k.shape[2]
    if k.stride()[2:] != (D, 1):
        k = k.contiguous()
    out = q.new_empty(B, H, Nq, Nk)
    (D0, D1), rows, keys = columns(D), B // worlds * Nq, 128
    tiles = cdiv(Nk, keys)
    _score_kernel[(worlds * H * tiles,)](
        q, k, out, H, Nq, rows, Nk, tiles, k.stride(0), k.stride(1), D=D, D0=D0, D1=D1,
        BQ=power(rows), BK=keys, PRECISION="ieee" if torch.version.hip else "tf32x3",
        num_warps=4,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return out


@triton.jit
@no_type_check
def _choose_kernel(
    SCORES, CANDIDATES, OUT, G, Nq, N, COUNT, stride_b, stride_q, stride_k,
    BLOCK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    b, q = row // (G * Nq), row % Nq
    n = tl.arange(0, BLOCK)
    score = tl.load(SCORES + row.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)
    seen = CANDIDATES + b.to(tl.int64) * stride_b + q.to(tl.int64) * stride_q
    candidate = tl.load(seen + n.to(tl.int64) * stride_k, mask=n < N, other=0) != 0
    # The order of `ranking_keys`, from one up; both zeros are one number. No candidate: zero.
    bits = score.to(tl.int32, bitcast=True)
    order = tl.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
    order = order.to(tl.uint32, bitcast=True) ^ 0x80000000
    order = tl.where(candidate, order, 0)
    least, bit = tl.zeros((), tl.uint32), tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        trial = least | bit
        enough = tl.sum((order >= trial).to(tl.int32), 0) >= COUNT
        least = tl.where(enough, trial, least)
        bit = bit >> 1
    # With fewer candidates than asked for, `least` stays zero and all of them lie above it.
    above = (order > least).to(tl.int32)
    equal = ((order == least) & candidate).to(tl.int32)
    found = tl.sum(above, 0)
    spare = COUNT - found
    # Both counts in one scan: neither reaches 2^16.
    passed = tl.cumsum((equal << 16) | above, 0)
    above_before = (passed & 0xFFFF) - above
    equal_before = (passed >> 16) - equal
    chosen = (above > 0) | ((equal > 0) & (equal_before < spare))
    place = above_before + tl.minimum(equal_before, spare)
    out = OUT + row.to(tl.int64) * COUNT
    tl.store(out + place, n, mask=chosen)
    listed = found + tl.minimum(tl.sum(equal, 0), spare)
    slot = tl.arange(0, LIST)
    tl.store(out + slot, tl.full((LIST,), -1, tl.int32), mask=(slot >= listed) & (slot < COUNT))


@triton.jit
@no_type_check
def _pool_kernel(
    X, BLOCKS, VALID, OUT, N, PERIOD, room, out_room,
    P: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    MASKED: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Blocks 0 to N of every head, or those that are listed; a head of a world has `room` blocks,
    and `out_room` means."""
    head, block = tl.program_id(0).to(tl.int64) // N, tl.program_id(0).to(tl.int64) % N
    if LISTED:
        block = tl.load(BLOCKS + block).to(tl.int64)
    kind = block % PERIOD
    d, token = tl.arange(0, WIDTH), tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, WIDTH), tl.float32)
    count = tl.zeros((TOKENS,), tl.int32)
    # Written out, so that all is asked for before any of it is added.
    for first in tl.static_range(0, P, TOKENS):
        here = first + token < P
        if MASKED:
            here &= tl.load(VALID + kind * P + first + token, mask=here, other=0) != 0
        at = ((head * room + block) * P + first + token)[:, None] * D + d[None, :]
        total += tl.load(X + at, mask=here[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        count += here.to(tl.int32)
    mean = tl.sum(total, 0) / tl.sum(count, 0).to(tl.float32)
    tl.store(OUT + (head * out_room + block) * D + d, mean, mask=d < D)
