"""Block-sparse attention in Triton, forward: runs on every GPU, and in the CPU interpreter.

A program owns up to three tiles of rows of one query block and walks its list; the keys and values
it loads serve all of them, because one tile per program would ask more of the L2 cache than it
gives. Rows of a listed block lie side by side, so a tile is one plain load. Blocks smaller than a
tile (`SMALL`) are loaded several at a time. Head dims are split into two powers of two, 72 = 64 +
16 with 8 columns of zeros. Where a block's tokens end is a count, and only the tile where they end
is masked. Statistics and sums are fp32; fp32 operands multiply in fp32, not TF32.
`no_type_check` keeps the tests' run-time shape checks off the kernels, whose source Triton reads.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from decmem.ops.sparse_restore_kernels import alike
from decmem.ops.sparse_tiles import (
    LOG2E,
    ForwardTiles,
    cdiv,
    columns,
    forward_tiles,
    mask_of,
    power,
    split_of,
)

# Of `valid`: none, counts of tokens that come first in their block, any slots.
NO_MASK, COUNTS, SLOTS = (tl.constexpr(i) for i in range(3))

# Scores start below any that occur but above -inf, so that no difference of two is ever NaN.
FLOOR = tl.constexpr(-1e30)


@triton.jit
@no_type_check
def listed(LISTS, slots):
    """Number of filled slots of one list; they come first."""
    filled = 0
    for start in range(0, slots, 128):
        s = start + tl.arange(0, 128)
        block = tl.load(LISTS + s, mask=s < slots, other=-1)
        filled += tl.sum((block >= 0).to(tl.int32), axis=0)
    return filled


@triton.jit
@no_type_check
def rows_of(X, at, d, D: tl.constexpr, CUT: tl.constexpr):
    """Columns `d` of the rows that start at `at`; zeros beyond the head dim."""
    if CUT:
        return tl.load(X + at[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
    return tl.load(X + at[:, None] + d[None, :])


@triton.jit
@no_type_check
def stored_rows_of(X, SCALE, at, d, q, D: tl.constexpr, CUT: tl.constexpr, SCALED: tl.constexpr):
    """`rows_of` in the type of `q`: numbers stored in 8 bits times the scale of their token."""
    x = rows_of(X, at, d, D, CUT)
    if SCALED:
        scale = tl.load(SCALE + at // D).to(tl.float32)
        x = (x.to(tl.float32) * scale[:, None]).to(q.dtype)
    return x


@triton.jit
@no_type_check
def some_rows_of(X, rows, d, ROWS: tl.constexpr, D: tl.constexpr):
    """Columns `d` of `rows` of one block of `ROWS` rows; zeros beyond either."""
    ok = (rows < ROWS)[:, None] & (d < D)[None, :]
    return tl.load(X + rows[:, None] * D + d[None, :], mask=ok, other=0.0)


@triton.jit
@no_type_check
def product(a0, a1, b0, b1, D1: tl.constexpr):
    """a b^T over a head dim in two parts."""
    c = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if D1 > 0:
        c = tl.dot(a1, tl.trans(b1), c, input_precision="ieee")
    return c


@triton.jit
@no_type_check
def key_tile(
    t, LISTS, VALID, filled, PK: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr,
    PERIOD: tl.constexpr, SMALL: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Step `t` over a list: its block, the tile's first slot, how many slots from there on hold a
    token, which of the tile's do, and where its rows start."""
    if SMALL:
        n = t * BN + tl.arange(0, BN)
        # Beyond the end the last block is read again: never one that was not selected.
        block = tl.load(LISTS + tl.minimum(n // PK, filled - 1))
        inside = n % PK
        first = 0
        left = filled * PK - t * BN
        ok = n < filled * PK
        if MASK == COUNTS:
            ok = ok & (inside < tl.load(VALID + block % PERIOD))
    else:
        block = tl.load(LISTS + t // SPANS)
        first = t % SPANS * SPAN
        left = PK - first
        if MASK == COUNTS:
            left = tl.load(VALID + block % PERIOD) - first
        inside = first + tl.arange(0, BN)
        ok = inside < PK
        if PK % SPAN != 0:
            inside = tl.minimum(inside, PK - 1)
    if MASK == SLOTS:
        ok = ok & (tl.load(VALID + block % PERIOD * PK + inside) != 0)
    return block, first, left, ok, (block * PK + inside) * D


@triton.jit
@no_type_check
def without(x, nothing, left, ok, BN: tl.constexpr, FIRST: tl.constexpr):
    """`x` with `nothing` in the columns of slots that hold no token."""
    if FIRST:
        if left < BN:
            x = tl.where((tl.arange(0, BN) < left)[None, :], x, nothing)
    else:
        x = tl.where(ok[None, :], x, nothing)
    return x


@triton.jit
@no_type_check
def _attend(
    q0, q1, k0, k1, v0, v1, kt0, kt1, vt0, vt1, left, ok, tail_ok, top, norm, acc0, acc1, scale,
    MASKED: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, D1: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """One tile of rows meets one tile of keys and, where BT > 0, a smaller one.

    `FIRST`: the slots with a token are the first `left` ones; else those of `ok` and `tail_ok`.
    """
    s = product(q0, q1, k0, k1, D1)
    if MASKED:
        s = without(s, float("-inf"), left, ok, BN, FIRST)
    peak = tl.max(s, axis=1)
    if BT > 0:
        st = product(q0, q1, kt0, kt1, D1)
        if MASKED:
            st = without(st, float("-inf"), left - BN, tail_ok, BT, FIRST)
        peak = tl.maximum(peak, tl.max(st, axis=1))
    new_top = tl.maximum(top, peak * scale)
    fade = tl.exp2(top - new_top)
    p = tl.exp2(s * scale - new_top[:, None])
    norm = norm * fade + tl.sum(p, axis=1)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * fade[:, None], input_precision="ieee")
    if D1 > 0:
        acc1 = tl.dot(p, v1, acc1 * fade[:, None], input_precision="ieee")
    if BT > 0:
        pt = tl.exp2(st * scale - new_top[:, None])
        norm += tl.sum(pt, axis=1)
        pt = pt.to(v0.dtype)
        acc0 = tl.dot(pt, vt0, acc0, input_precision="ieee")
        if D1 > 0:
            acc1 = tl.dot(pt, vt1, acc1, input_precision="ieee")
    return new_top, norm, acc0, acc1


@triton.jit
@no_type_check
def joined(x, ALM, GATE, at, lines, d, ok, D: tl.constexpr, GATED: tl.constexpr):
    """o_alm + g o_sgm; GATED: 0 no gate, 1 a gate per token, else one per channel."""
    if GATED > 0:
        if GATED == 1:
            gate = tl.load(GATE + lines[:, None], mask=ok, other=0.0)
        else:
            gate = tl.load(GATE + at, mask=ok, other=0.0)
        x = tl.load(ALM + at, mask=ok, other=0.0).to(tl.float32) + gate.to(tl.float32) * x
    return x


@triton.jit
@no_type_check
def _finish(
    OUT, LSE, ALM, GATE, line, out_line, rows, d0, d1, top, norm, acc0, acc1,
    PQ: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, GATED: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Writes a tile of rows; a partial one says by -inf that it read nothing."""
    some = norm > 0
    norm = tl.where(some, norm, 1.0)
    lines, row_ok = line + rows, rows < PQ
    at, ok = lines[:, None] * D + d0[None, :], row_ok[:, None] & (d0 < D)[None, :]
    shift = (out_line - line) * D
    x = joined(acc0 / norm[:, None], ALM, GATE, at, lines, d0, ok, D, GATED)
    tl.store(OUT + at + shift, x.to(OUT.dtype.element_ty), mask=ok)
    if D1 > 0:
        at, ok = lines[:, None] * D + d1[None, :], row_ok[:, None] & (d1 < D)[None, :]
        x = joined(acc1 / norm[:, None], ALM, GATE, at, lines, d1, ok, D, GATED)
        tl.store(OUT + at + shift, x.to(OUT.dtype.element_ty), mask=ok)
    nothing = float("-inf") if PARTIAL else 0.0
    tl.store(LSE + out_line + rows, tl.where(some, top + tl.log2(norm), nothing), mask=row_ok)


@triton.jit(
    do_not_specialize=[
        "B", "H", "G", "NQ", "slots", "lists_world", "k_world", "k_head", "v_world", "v_head",
    ]
)  # fmt: skip
@no_type_check
def forward_kernel(
    Q, K, V, K_SCALE, V_SCALE, LISTS, VALID, OUT, LSE, ALM, GATE,
    B, H, G, NQ, slots, lists_world, k_world, k_head, v_world, v_head, scale,
    PQ: tl.constexpr, PK: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    MASK: tl.constexpr, PERIOD: tl.constexpr, GATED: tl.constexpr, SPLIT: tl.constexpr,
    SCALED: tl.constexpr, SMALL: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Strides of k and v are in blocks, and those of their scales are the same where they are
    `SCALED`; `scale` is that of exp2.

    `SPLIT` > 1 cuts every list in so many parts, whose results `merge_kernel` puts together.
    """
    STEP: tl.constexpr = BM * TILES
    PROGRAMS: tl.constexpr = (PQ + STEP - 1) // STEP
    SPAN: tl.constexpr = BN + BT
    SPANS: tl.constexpr = 1 if SMALL else (PK + SPAN - 1) // SPAN
    RAGGED: tl.constexpr = not SMALL and PK % SPAN != 0
    MASKED: tl.constexpr = SMALL or RAGGED or MASK > 0
    FIRST: tl.constexpr = MASK != SLOTS and not (SMALL and MASK == COUNTS)
    DX: tl.constexpr = D1 if D1 > 0 else 16
    # Heads outermost: what runs side by side sweeps the history of few heads together.
    pid = tl.program_id(0)
    i = (pid // PROGRAMS) % NQ
    b = (pid // (PROGRAMS * NQ)) % B
    h = (pid // (PROGRAMS * NQ * B)) % H
    part = pid // (PROGRAMS * NQ * B * H)
    row = (pid % PROGRAMS) * STEP + tl.arange(0, BM)
    d0 = tl.arange(0, D0)
    d1 = D0 + tl.arange(0, DX)
    line = ((b * H + h).to(tl.int64) * NQ + i) * PQ
    K += (b * k_world + h * k_head).to(tl.int64) * (PK * D)
    V += (b * v_world + h * v_head).to(tl.int64) * (PK * D)
    if SCALED:
        K_SCALE += (b * k_world + h * k_head).to(tl.int64) * PK
        V_SCALE += (b * v_world + h * v_head).to(tl.int64) * PK

    q = Q + line * D
    q00 = some_rows_of(q, row, d0, PQ, D)
    q01 = some_rows_of(q, row, d1, PQ, D)
    acc00 = tl.zeros([BM, D0], tl.float32)
    acc01 = tl.zeros([BM, DX], tl.float32)
    top0 = tl.full([BM], FLOOR, tl.float32)
    norm0 = tl.zeros([BM], tl.float32)
    if TILES > 1:
        q10 = some_rows_of(q, row + BM, d0, PQ, D)
        q11 = some_rows_of(q, row + BM, d1, PQ, D)
        top1, norm1, acc10, acc11 = top0, norm0, acc00, acc01
    if TILES > 2:
        q20 = some_rows_of(q, row + 2 * BM, d0, PQ, D)
        q21 = some_rows_of(q, row + 2 * BM, d1, PQ, D)
        top2, norm2, acc20, acc21 = top0, norm0, acc00, acc01

    LISTS += b * lists_world + (tl.where(G > 1, h, 0) * NQ + i) * slots
    filled = listed(LISTS, slots)
    steps = (filled * PK + BN - 1) // BN if SMALL else filled
    for t in range(part * steps // SPLIT * SPANS, (part + 1) * steps // SPLIT * SPANS):
        block, first, left, ok, at = key_tile(
            t, LISTS, VALID, filled, PK, D, MASK, PERIOD, SMALL, SPAN, SPANS, BN
        )
        k0 = stored_rows_of(K, K_SCALE, at, d0, q00, D, D0 > D, SCALED)
        v0 = stored_rows_of(V, V_SCALE, at, d0, q00, D, D0 > D, SCALED)
        k1, v1, kt0, vt0, kt1, vt1, tail_ok = k0, v0, k0, v0, k0, v0, ok
        if D1 > 0:
            k1 = stored_rows_of(K, K_SCALE, at, d1, q00, D, D0 + D1 > D, SCALED)
            v1 = stored_rows_of(V, V_SCALE, at, d1, q00, D, D0 + D1 > D, SCALED)
        if BT > 0:
            rest = first + BN + tl.arange(0, BT)
            tail_ok = rest < PK
            if RAGGED:
                rest = tl.minimum(rest, PK - 1)
            if MASK == SLOTS:
                tail_ok = tail_ok & (tl.load(VALID + block % PERIOD * PK + rest) != 0)
            at = (block * PK + rest) * D
            kt0 = stored_rows_of(K, K_SCALE, at, d0, q00, D, D0 > D, SCALED)
            vt0 = stored_rows_of(V, V_SCALE, at, d0, q00, D, D0 > D, SCALED)
            if D1 > 0:
                kt1 = stored_rows_of(K, K_SCALE, at, d1, q00, D, D0 + D1 > D, SCALED)
                vt1 = stored_rows_of(V, V_SCALE, at, d1, q00, D, D0 + D1 > D, SCALED)
        top0, norm0, acc00, acc01 = _attend(
            q00, q01, k0, k1, v0, v1, kt0, kt1, vt0, vt1, left, ok, tail_ok,
            top0, norm0, acc00, acc01, scale, MASKED, BN, BT, D1, FIRST,
        )  # fmt: skip
        if TILES > 1:
            top1, norm1, acc10, acc11 = _attend(
                q10, q11, k0, k1, v0, v1, kt0, kt1, vt0, vt1, left, ok, tail_ok,
                top1, norm1, acc10, acc11, scale, MASKED, BN, BT, D1, FIRST,
            )  # fmt: skip
        if TILES > 2:
            top2, norm2, acc20, acc21 = _attend(
                q20, q21, k0, k1, v0, v1, kt0, kt1, vt0, vt1, left, ok, tail_ok,
                top2, norm2, acc20, acc21, scale, MASKED, BN, BT, D1, FIRST,
            )  # fmt: skip

    out_line = line + part.to(tl.int64) * B * H * NQ * PQ
    _finish(
        OUT, LSE, ALM, GATE, line, out_line, row, d0, d1, top0, norm0, acc00, acc01,
        PQ, D, D1, GATED, SPLIT > 1,
    )  # fmt: skip
    if TILES > 1:
        _finish(
            OUT, LSE, ALM, GATE, line, out_line, row + BM, d0, d1, top1, norm1, acc10, acc11,
            PQ, D, D1, GATED, SPLIT > 1,
        )  # fmt: skip
    if TILES > 2:
        _finish(
            OUT, LSE, ALM, GATE, line, out_line, row + 2 * BM, d0, d1, top2, norm2, acc20, acc21,
            PQ, D, D1, GATED, SPLIT > 1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["lines"])
@no_type_check
def merge_kernel(
    PARTS, PARTS_LSE, OUT, LSE, ALM, GATE, lines,
    D: tl.constexpr, DP: tl.constexpr, GATED: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The parts of cut lists weighed by what each of them read, in one fixed order."""
    line = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    line_ok = line < lines
    ok = line_ok[:, None] & (d < D)[None, :]
    at = line[:, None] * D + d[None, :]
    top = tl.full([BM], FLOOR, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    for part in tl.static_range(SPLIT):
        lse = tl.load(PARTS_LSE + part * lines + line, mask=line_ok, other=float("-inf"))
        x = tl.load(PARTS + part * lines * D + at, mask=ok, other=0.0)
        new_top = tl.maximum(top, lse)
        fade, weight = tl.exp2(top - new_top), tl.exp2(lse - new_top)
        norm = norm * fade + weight
        acc = acc * fade[:, None] + weight[:, None] * x
        top = new_top
    some = norm > 0
    norm = tl.where(some, norm, 1.0)
    x = joined(acc / norm[:, None], ALM, GATE, at, line, d, ok, D, GATED)
    tl.store(OUT + at, x.to(OUT.dtype.element_ty), mask=ok)
    tl.store(LSE + line, tl.where(some, top + tl.log2(norm), 0.0), mask=line_ok)


def common(q: Tensor, k: Tensor, valid: Tensor | None) -> dict[str, int]:
    """Constants of every Triton kernel."""
    D0, D1 = columns(q.shape[-1])
    mask, period = mask_of(valid)
    return {
        "PQ": q.shape[3], "PK": k.shape[3], "D": q.shape[-1], "D0": D0, "D1": D1,
        "MASK": mask, "PERIOD": period,
    }  # fmt: skip


def gated(gate: Tensor | None) -> int:
    """GATED of the kernels."""
    return 0 if gate is None else gate.shape[-1]


class Parts(NamedTuple):
    """Results of lists cut into parts, before they are merged."""

    out: Tensor
    lse: Tensor

    @classmethod
    def like(cls, q: Tensor, split: int) -> "Parts":
        shape = (split, *q.shape[:4])
        return cls(
            q.new_empty((*shape, q.shape[-1]), dtype=torch.float32),
            q.new_empty(shape, dtype=torch.float32),
        )


def merge(parts: Parts, out: Tensor, lse: Tensor, alm: Tensor | None, gate: Tensor | None) -> None:
    """Writes `out` and `lse`, joined with the local branch where there is one."""
    lines, D = lse.numel(), out.shape[-1]
    merge_kernel[(cdiv(lines, 32),)](
        parts.out, parts.lse, out, lse, alm, gate, lines,
        D=D, DP=power(D), GATED=gated(gate), SPLIT=parts.out.shape[0], BM=32,
    )  # fmt: skip


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    alm: Tensor | None = None, gate: Tensor | None = None, split: int | None = None,
    tiles: ForwardTiles | None = None, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp (base 2). All but k and v, and the scales of what is stored in 8 bits,
    lie in one piece; lists are int32."""
    B, H, NQ, PQ, D = q.shape
    PK = k.shape[3]
    tiles = tiles or forward_tiles(PQ, PK, D, q.element_size())
    programs = B * H * NQ * cdiv(PQ, tiles.rows * tiles.tiles)
    split = split_of(programs // 2, q.device) if split is None else split
    keys, k_scale = alike(k, k_scale)
    values, v_scale = alike(v, v_scale)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:4], dtype=torch.float32)
    target = Parts(out, lse) if split == 1 else Parts.like(q, split)
    joined = (alm, gate, gated(gate)) if split == 1 else (None, None, 0)
    forward_kernel[(programs * split,)](
        q, keys.tensor, values.tensor, k_scale, v_scale, lists, valid, *target, *joined[:2],
        B, H, lists.shape[1], NQ, lists.shape[-1],
        0 if lists.shape[0] == 1 else lists.stride(0),
        keys.world, keys.head, values.world, values.head, scale * LOG2E,
        **common(q, k, valid), GATED=joined[2], SPLIT=split, SCALED=k_scale is not None,
        SMALL=tiles.keys > PK,
        BM=tiles.rows, TILES=tiles.tiles, BN=tiles.keys, BT=tiles.tail,
        num_warps=tiles.warps, num_stages=tiles.stages,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    if split > 1:
        merge(target, out, lse, alm, gate)
    return out, lse
