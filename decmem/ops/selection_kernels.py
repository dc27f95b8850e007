"""Retrieval in Triton: the best blocks of a list in one launch, and the mean of a block's tokens.

What is computed, in plain PyTorch: `decmem.ops.selection`. A program chooses for one query block.
It holds the scores of all candidates as integers that sort as they do, finds the `count`-th largest
bit by bit, from the highest down, and counts what lies above it; of those that equal it the first
few are taken. Nothing is sorted: the list comes out ascending by itself.
"""

from typing import no_type_check

import triton
import triton.language as tl


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
    X, VALID, OUT, N, PERIOD, room,
    P: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    kind = block % N % PERIOD
    d, token = tl.arange(0, WIDTH), tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, WIDTH), tl.float32)
    count = tl.zeros((TOKENS,), tl.int32)
    for first in range(0, P, TOKENS):
        here = first + token < P
        if MASKED:
            here &= tl.load(VALID + kind * P + first + token, mask=here, other=0) != 0
        # A head of a world has `room` blocks, of which these are the first.
        at = ((block // N * room + block % N) * P + first + token)[:, None] * D + d[None, :]
        total += tl.load(X + at, mask=here[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        count += here.to(tl.int32)
    mean = tl.sum(total, 0) / tl.sum(count, 0).to(tl.float32)
    tl.store(OUT + block * D + d, mean, mask=d < D)
