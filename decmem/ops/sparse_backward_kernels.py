"""Block-sparse attention in Triton, backward: runs on every GPU, and in the CPU interpreter.

dQ is query-outer, like the forward; dK and dV are key-outer: a program owns a tile of one key block
and walks the query blocks that read it (an inverse list). So nothing is added up by atomics, and
the bits are the same every time. Probabilities are made again from the log-sum-exp of the forward.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from decmem.ops.readers import inverse_lists
from decmem.ops.sparse_forward_kernels import (
    COUNTS,
    SLOTS,
    common,
    key_tile,
    listed,
    product,
    rows_of,
    some_rows_of,
    without,
)
from decmem.ops.sparse_tiles import (
    LOG2E,
    KeyTiles,
    QueryTiles,
    blocks,
    cdiv,
    key_tiles,
    power,
    query_tiles,
)


@triton.jit(do_not_specialize=["lines"])
@no_type_check
def delta_kernel(OUT, DOUT, DELTA, lines, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr):
    """delta = sum over channels of o do, one number per query row, without fp32 copies."""
    line = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    ok = (line < lines)[:, None] & (d < D)[None, :]
    at = line[:, None] * D + d[None, :]
    o = tl.load(OUT + at, mask=ok, other=0.0).to(tl.float32)
    do = tl.load(DOUT + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(DELTA + line, tl.sum(o * do, axis=1), mask=line < lines)


@triton.jit
@no_type_check
def _query_step(
    q0, q1, do0, do1, k0, k1, v0, v1, left, ok, lse, delta, dq0, dq1, scale,
    MASKED: tl.constexpr, BN: tl.constexpr, D1: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One tile of rows meets one tile of keys; dQ lacks the factor of the scale."""
    p = tl.exp2(product(q0, q1, k0, k1, D1) * scale - lse[:, None])
    if MASKED:
        p = without(p, 0.0, left, ok, BN, FIRST)
    ds = (p * (product(do0, do1, v0, v1, D1) - delta[:, None])).to(k0.dtype)
    dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
    if D1 > 0:
        dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    return dq0, dq1


@triton.jit
@no_type_check
def _store_rows(X, rows, d0, d1, x0, x1, row_ok, D: tl.constexpr, D1: tl.constexpr):
    dtype = X.dtype.element_ty
    tl.store(
        X + rows[:, None] * D + d0[None, :], x0.to(dtype), mask=row_ok[:, None] & (d0 < D)[None, :]
    )
    if D1 > 0:
        tl.store(
            X + rows[:, None] * D + d1[None, :],
            x1.to(dtype),
            mask=row_ok[:, None] & (d1 < D)[None, :],
        )


@triton.jit(
    do_not_specialize=[
        "B", "H", "G", "NQ", "slots", "lists_world", "k_world", "k_head", "v_world", "v_head",
    ]
)  # fmt: skip
@no_type_check
def query_gradient_kernel(
    Q, K, V, LISTS, VALID, DOUT, LSE, DELTA, DQ,
    B, H, G, NQ, slots, lists_world, k_world, k_head, v_world, v_head, scale, scale_log2,
    PQ: tl.constexpr, PK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    MASK: tl.constexpr, PERIOD: tl.constexpr, SMALL: tl.constexpr,
    BM: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dQ. Programs are laid out as in `forward_kernel`."""
    STEP: tl.constexpr = BM * TILES
    PROGRAMS: tl.constexpr = (PQ + STEP - 1) // STEP
    SPANS: tl.constexpr = 1 if SMALL else (PK + BN - 1) // BN
    MASKED: tl.constexpr = SMALL or PK % BN != 0 or MASK > 0
    FIRST: tl.constexpr = MASK != SLOTS and not (SMALL and MASK == COUNTS)
    DX: tl.constexpr = D1 if D1 > 0 else 16
    pid = tl.program_id(0)
    i = (pid // PROGRAMS) % NQ
    b = (pid // (PROGRAMS * NQ)) % B
    h = pid // (PROGRAMS * NQ * B)
    row = (pid % PROGRAMS) * STEP + tl.arange(0, BM)
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, DX)
    line = ((b * H + h).to(tl.int64) * NQ + i) * PQ
    Q += line * D
    DOUT += line * D
    DQ += line * D
    K += (b * k_world + h * k_head).to(tl.int64) * (PK * D)
    V += (b * v_world + h * v_head).to(tl.int64) * (PK * D)

    q00 = some_rows_of(Q, row, d0, PQ, D)
    q01 = some_rows_of(Q, row, d1, PQ, D)
    do00 = some_rows_of(DOUT, row, d0, PQ, D)
    do01 = some_rows_of(DOUT, row, d1, PQ, D)
    lse0 = tl.load(LSE + line + row, mask=row < PQ, other=0.0)
    delta0 = tl.load(DELTA + line + row, mask=row < PQ, other=0.0)
    dq00 = tl.zeros([BM, D0], tl.float32)
    dq01 = tl.zeros([BM, DX], tl.float32)
    if TILES > 1:
        row1 = row + BM
        q10 = some_rows_of(Q, row1, d0, PQ, D)
        q11 = some_rows_of(Q, row1, d1, PQ, D)
        do10 = some_rows_of(DOUT, row1, d0, PQ, D)
        do11 = some_rows_of(DOUT, row1, d1, PQ, D)
        lse1 = tl.load(LSE + line + row1, mask=row1 < PQ, other=0.0)
        delta1 = tl.load(DELTA + line + row1, mask=row1 < PQ, other=0.0)
        dq10, dq11 = dq00, dq01
    if TILES > 2:
        row2 = row + 2 * BM
        q20 = some_rows_of(Q, row2, d0, PQ, D)
        q21 = some_rows_of(Q, row2, d1, PQ, D)
        do20 = some_rows_of(DOUT, row2, d0, PQ, D)
        do21 = some_rows_of(DOUT, row2, d1, PQ, D)
        lse2 = tl.load(LSE + line + row2, mask=row2 < PQ, other=0.0)
        delta2 = tl.load(DELTA + line + row2, mask=row2 < PQ, other=0.0)
        dq20, dq21 = dq00, dq01

    LISTS += b * lists_world + (tl.where(G > 1, h, 0) * NQ + i) * slots
    filled = listed(LISTS, slots)
    steps = (filled * PK + BN - 1) // BN if SMALL else filled * SPANS
    for t in range(0, steps):
        _, _, left, ok, at = key_tile(
            t, LISTS, VALID, filled, PK, D, MASK, PERIOD, SMALL, BN, SPANS, BN
        )
        k0 = rows_of(K, at, d0, D, D0 > D)
        v0 = rows_of(V, at, d0, D, D0 > D)
        k1, v1 = k0, v0
        if D1 > 0:
            k1 = rows_of(K, at, d1, D, D0 + D1 > D)
            v1 = rows_of(V, at, d1, D, D0 + D1 > D)
        dq00, dq01 = _query_step(
            q00, q01, do00, do01, k0, k1, v0, v1, left, ok, lse0, delta0, dq00, dq01, scale_log2,
            MASKED, BN, D1, FIRST,
        )  # fmt: skip
        if TILES > 1:
            dq10, dq11 = _query_step(
                q10, q11, do10, do11, k0, k1, v0, v1, left, ok, lse1, delta1, dq10, dq11,
                scale_log2, MASKED, BN, D1, FIRST,
            )  # fmt: skip
        if TILES > 2:
            dq20, dq21 = _query_step(
                q20, q21, do20, do21, k0, k1, v0, v1, left, ok, lse2, delta2, dq20, dq21,
                scale_log2, MASKED, BN, D1, FIRST,
            )  # fmt: skip
    _store_rows(DQ, row, d0, d1, dq00 * scale, dq01 * scale, row < PQ, D, D1)
    if TILES > 1:
        _store_rows(DQ, row1, d0, d1, dq10 * scale, dq11 * scale, row1 < PQ, D, D1)
    if TILES > 2:
        _store_rows(DQ, row2, d0, d1, dq20 * scale, dq21 * scale, row2 < PQ, D, D1)


@triton.jit(
    do_not_specialize=[
        "B", "H", "G", "NQ", "NK", "entries", "lists_world", "sharing", "k_world", "k_head",
        "v_world", "v_head",
    ]
)  # fmt: skip
@no_type_check
def key_gradient_kernel(
    Q, K, V, READERS, OFFSETS, VALID, DOUT, LSE, DELTA, DK, DV,
    B, H, G, NQ, NK, entries, lists_world, sharing, k_world, k_head, v_world, v_head,
    scale, scale_log2,
    PQ: tl.constexpr, PK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    MASK: tl.constexpr, PERIOD: tl.constexpr, SMALL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dK and dV. `sharing` worlds read the same keys; their gradients add up.

    `READERS` (worlds of lists, G, entries) and `OFFSETS` (the same, NK + 1): see `inverse_lists`.
    """
    PROGRAMS: tl.constexpr = (PK + BN - 1) // BN
    SPANS: tl.constexpr = 1 if SMALL else (PQ + BM - 1) // BM
    RAGGED: tl.constexpr = SMALL or PQ % BM != 0
    DX: tl.constexpr = D1 if D1 > 0 else 16
    pid = tl.program_id(0)
    worlds = B // sharing
    j = (pid // PROGRAMS) % NK
    bk = (pid // (PROGRAMS * NK)) % worlds
    h = pid // (PROGRAMS * NK * worlds)
    col = (pid % PROGRAMS) * BN + tl.arange(0, BN)
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, DX)
    K += (bk * k_world + h * k_head + j).to(tl.int64) * (PK * D)
    V += (bk * v_world + h * v_head + j).to(tl.int64) * (PK * D)
    k0 = some_rows_of(K, col, d0, PK, D)
    k1 = some_rows_of(K, col, d1, PK, D)
    v0 = some_rows_of(V, col, d0, PK, D)
    v1 = some_rows_of(V, col, d1, PK, D)
    dk0 = tl.zeros([BN, D0], tl.float32)
    dk1 = tl.zeros([BN, DX], tl.float32)
    dv0, dv1 = dk0, dk1
    for b in range(bk * sharing, (bk + 1) * sharing):
        bg = b * lists_world * G + tl.where(G > 1, h, 0)
        start = tl.load(OFFSETS + bg * (NK + 1) + j)
        readers = tl.load(OFFSETS + bg * (NK + 1) + j + 1) - start
        who = READERS + bg.to(tl.int64) * entries + start
        head = (b * H + h).to(tl.int64) * NQ * PQ
        steps = (readers * PQ + BM - 1) // BM if SMALL else readers * SPANS
        for t in range(0, steps):
            if SMALL:
                n = t * BM + tl.arange(0, BM)
                ok = n < readers * PQ
                i = tl.load(who + tl.minimum(n // PQ, readers - 1))
                row = n % PQ
            else:
                i = tl.load(who + t // SPANS)
                row = t % SPANS * BM + tl.arange(0, BM)
                ok = row < PQ
                row = tl.minimum(row, PQ - 1) if RAGGED else row
            line = i * PQ + row
            q0 = rows_of(Q + head * D, line * D, d0, D, D0 > D)
            do0 = rows_of(DOUT + head * D, line * D, d0, D, D0 > D)
            q1, do1 = q0, do0
            if D1 > 0:
                q1 = rows_of(Q + head * D, line * D, d1, D, D0 + D1 > D)
                do1 = rows_of(DOUT + head * D, line * D, d1, D, D0 + D1 > D)
            lse = tl.load(LSE + head + line)
            delta = tl.load(DELTA + head + line)
            p = tl.exp2(product(k0, k1, q0, q1, D1) * scale_log2 - lse[None, :])
            if RAGGED:
                p = tl.where(ok[None, :], p, 0.0)
            weights = p.to(do0.dtype)
            dv0 = tl.dot(weights, do0, dv0, input_precision="ieee")
            if D1 > 0:
                dv1 = tl.dot(weights, do1, dv1, input_precision="ieee")
            ds = (p * (product(v0, v1, do0, do1, D1) - delta[None, :])).to(q0.dtype)
            dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
            if D1 > 0:
                dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
    # A slot without a token was read like the others: what came of it is dropped here.
    col_ok = col < PK
    token = col_ok
    if MASK == COUNTS:
        token = col < tl.load(VALID + j % PERIOD)
    elif MASK == SLOTS:
        token = tl.load(VALID + j % PERIOD * PK + col, mask=col_ok, other=0) != 0
    dk0 = tl.where(token[:, None], dk0 * scale, 0.0)
    dk1 = tl.where(token[:, None], dk1 * scale, 0.0)
    dv0 = tl.where(token[:, None], dv0, 0.0)
    dv1 = tl.where(token[:, None], dv1, 0.0)
    out = ((bk * H + h).to(tl.int64) * NK + j) * (PK * D)
    _store_rows(DK + out, col, d0, d1, dk0, dk1, col_ok, D, D1)
    _store_rows(DV + out, col, d0, d1, dv0, dv1, col_ok, D, D1)


def run_delta(out: Tensor, grad: Tensor) -> Tensor:
    """Sum over channels of output times its gradient, (B, H, Nq, Pq) fp32."""
    delta = out.new_empty(out.shape[:4], dtype=torch.float32)
    lines, D = delta.numel(), out.shape[-1]
    delta_kernel[(cdiv(lines, 32),)](out, grad, delta, lines, D=D, DP=power(D), BM=32)
    return delta


def run_query_gradient(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    grad: Tensor, lse: Tensor, delta: Tensor, tiles: QueryTiles | None = None,
) -> Tensor:  # fmt: skip
    """dQ."""
    B, H, NQ, PQ, D = q.shape
    PK = k.shape[3]
    tiles = tiles or query_tiles(PQ, PK, D, q.element_size())
    keys, values, dq = blocks(k), blocks(v), torch.empty_like(q)
    query_gradient_kernel[(B * H * NQ * cdiv(PQ, tiles.rows * tiles.tiles),)](
        q, keys.tensor, values.tensor, lists, valid, grad, lse, delta, dq,
        B, H, lists.shape[1], NQ, lists.shape[-1],
        0 if lists.shape[0] == 1 else lists.stride(0),
        keys.world, keys.head, values.world, values.head, scale, scale * LOG2E,
        **common(q, k, valid), SMALL=tiles.keys > PK,
        BM=tiles.rows, TILES=tiles.tiles, BN=tiles.keys,
        num_warps=tiles.warps, num_stages=tiles.stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return dq


def run_key_gradient(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    grad: Tensor, lse: Tensor, delta: Tensor, tiles: KeyTiles | None = None,
    inverse: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dK and dV, summed over the worlds that share keys."""
    B, H, NQ, PQ, D = q.shape
    NK, PK = k.shape[2:4]
    tiles = tiles or key_tiles(PQ, PK, D, q.element_size())
    readers, offsets = inverse or inverse_lists(lists, NK)
    keys, values = blocks(k), blocks(v)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    key_gradient_kernel[(k.shape[0] * H * NK * cdiv(PK, tiles.keys),)](
        q, keys.tensor, values.tensor, readers, offsets, valid, grad, lse, delta, dk, dv,
        B, H, lists.shape[1], NQ, NK, readers.shape[-1], int(lists.shape[0] > 1),
        B // k.shape[0], keys.world, keys.head, values.world, values.head, scale, scale * LOG2E,
        **common(q, k, valid), SMALL=tiles.rows > PQ, BM=tiles.rows, BN=tiles.keys,
        num_warps=tiles.warps, num_stages=tiles.stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return dk, dv
