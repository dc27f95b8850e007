"""Window attention in Triton: forward and both gradients.

Each program owns a tile of rows (queries in the forward pass and in dQ, keys in dK and dV) and
walks the runs of columns that its rows see (`decmem.ops.window_tiles`): every block of columns is
one contiguous piece of memory, and only blocks in which rows differ are masked. No atomics: the
same bits every time. Statistics and accumulators are fp32; fp32 operands multiply in fp32, not
TF32. Head dimensions that are no power of two are taken in two pieces where that wastes less, 72
as 64 + 16. `no_type_check` keeps the tests' run-time shape checks off the kernels, whose source
Triton reads.
"""

import math
from collections.abc import Sequence
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Int
from torch import Tensor

from decmem.ops.window_blocks import WindowBlocks, window_blocks
from decmem.ops.window_launches import Launch, Launches, head_pieces
from decmem.ops.window_tiles import tile_latents


@triton.jit
@no_type_check
def _channels(P, at, ok, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    """Channels FROM, FROM + 1, ... of rows of D channels; zero where there is none."""
    d = FROM + tl.arange(0, WIDTH)
    ok = ok[:, None]
    if FROM + WIDTH > D:
        ok = ok & (d < D)[None, :]
    return tl.load(P + at[:, None] * D + d[None, :], mask=ok, other=0.0)


@triton.jit
@no_type_check
def _put(P, at, x, ok, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    d = FROM + tl.arange(0, WIDTH)
    ok = ok[:, None]
    if FROM + WIDTH > D:
        ok = ok & (d < D)[None, :]
    tl.store(P + at[:, None] * D + d[None, :], x.to(P.dtype.element_ty), mask=ok)


@triton.jit
@no_type_check
def _walk(TILE, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    """Number of blocks that a tile walks, and its first run."""
    blocks = 0
    for r in tl.static_range(RUNS):
        blocks += tl.cdiv(tl.load(TILE + 4 * r + 3) - tl.load(TILE + 4 * r + 2), BLOCK)
    return blocks, tl.load(TILE + 2), tl.load(TILE + 3), tl.load(TILE + 4), tl.load(TILE + 5)


@triton.jit
@no_type_check
def _advance(TILE, run, start, stop, inner, outer, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    """The next block: in the same run, or the first of the next one."""
    start += BLOCK
    turn = start >= stop
    run += turn.to(tl.int32)
    turn = turn & (run < RUNS)
    AT = TILE + 2 + 4 * run
    start = tl.load(AT, mask=turn, other=start)
    stop = tl.load(AT + 1, mask=turn, other=stop)
    inner = tl.load(AT + 2, mask=turn, other=inner)
    outer = tl.load(AT + 3, mask=turn, other=outer)
    return run, start, stop, inner, outer


@triton.jit
@no_type_check
def _seen(TILE, first, rows, run, S: tl.constexpr, RUNS: tl.constexpr):
    """What each row sees of a run: its first column, and how many follow from there."""
    AT = TILE + 2 + 4 * RUNS + ((rows // S - first // S) * RUNS + run) * 2
    return tl.load(AT), tl.load(AT + 1)


@triton.jit
@no_type_check
def _inside(TILE, first, rows, run, n, S: tl.constexpr, RUNS: tl.constexpr):
    """Whether each row sees each of the columns n of a run."""
    start, count = _seen(TILE, first, rows, run, S, RUNS)
    # One comparison: what lies before the start wraps round to a large number.
    return (n[None, :] - start[:, None]).to(tl.uint32) < count.to(tl.uint32)[:, None]


@triton.jit
@no_type_check
def _valid_words(VALID, start, S: tl.constexpr, BN: tl.constexpr):
    """A bit for each of the columns from `start` on: whether it holds a token. 64 in each word."""
    low = tl.load(VALID + start % S)
    if BN < 64:
        low = low | (-1 << BN)
    high = low
    if BN > 64:
        high = tl.load(VALID + (start + 64) % S)
    return low, high


@triton.jit
@no_type_check
def _valid_columns(low, high, BN: tl.constexpr):
    c = tl.arange(0, BN)
    word = low
    if BN > 64:
        word = tl.where(c < 64, low, high)
    return ((word >> (c % 64).to(tl.int64)) & 1) != 0


@triton.jit
@no_type_check
def _head(P, H, batch, head):
    bh = tl.program_id(1).to(tl.int64)
    return P + (bh // H) * batch + (bh % H) * head


@triton.jit
@no_type_check
def _forward_kernel(
    Q, K, V, TILES, VALID, OUT, LSE,
    H, ROWS, q_batch, q_head, k_batch, k_head, v_batch, v_head, scale_log2,
    S: tl.constexpr, FIELDS: tl.constexpr, RUNS: tl.constexpr, PADDED: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    TILE = TILES + tl.program_id(0) * FIELDS
    first = tl.load(TILE)
    last = tl.load(TILE + 1)
    if first >= last:
        return
    Q = _head(Q, H, q_batch, q_head)
    K = _head(K, H, k_batch, k_head)
    V = _head(V, H, v_batch, v_head)
    stat = tl.program_id(1).to(tl.int64) * ROWS
    rows = first + tl.arange(0, BM)
    row_ok = rows < last
    q1 = _channels(Q, rows, row_ok, D, 0, D1)
    acc1 = tl.zeros([BM, D1], tl.float32)
    if D2 > 0:
        q2 = _channels(Q, rows, row_ok, D, D1, D2)
        acc2 = tl.zeros([BM, D2], tl.float32)
    top = tl.full([BM], -1e30, tl.float32)
    norm = tl.zeros([BM], tl.float32)

    run = 0
    blocks, start, stop, inner, outer = _walk(TILE, RUNS, BN)
    for _ in range(0, blocks):
        n = start + tl.arange(0, BN)
        ok = n < stop
        if PADDED:
            low, high = _valid_words(VALID, start, S, BN)
            ok = ok & _valid_columns(low, high, BN)
        k1 = _channels(K, n, ok, D, 0, D1)
        s = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        if D2 > 0:
            k2 = _channels(K, n, ok, D, D1, D2)
            s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")
        partial = (start < inner) | (start + BN > outer)
        if PADDED:
            partial = partial | ((low & high) != -1)
        if partial:
            inside = _inside(TILE, first, rows, run, n, S, RUNS)
            if PADDED:
                inside = inside & ok[None, :]
            s = tl.where(inside, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1) * scale_log2)
        p = tl.exp2(s * scale_log2 - new_top[:, None])
        fade = tl.exp2(top - new_top)
        norm = norm * fade + tl.sum(p, axis=1)
        top = new_top
        v1 = _channels(V, n, ok, D, 0, D1)
        p = p.to(v1.dtype)
        acc1 = tl.dot(p, v1, acc1 * fade[:, None], input_precision="ieee")
        if D2 > 0:
            v2 = _channels(V, n, ok, D, D1, D2)
            acc2 = tl.dot(p, v2, acc2 * fade[:, None], input_precision="ieee")
        run, start, stop, inner, outer = _advance(TILE, run, start, stop, inner, outer, RUNS, BN)

    some = norm > 0
    safe = tl.where(some, norm, 1.0)
    _put(OUT + stat * D, rows, acc1 / safe[:, None], row_ok, D, 0, D1)
    if D2 > 0:
        _put(OUT + stat * D, rows, acc2 / safe[:, None], row_ok, D, D1, D2)
    tl.store(LSE + stat + rows, tl.where(some, top + tl.log2(safe), float("inf")), mask=row_ok)


@triton.jit
@no_type_check
def _query_gradient_kernel(
    Q, K, V, TILES, VALID, OUT, GRAD, LSE, STATS, DQ,
    H, ROWS, q_batch, q_head, k_batch, k_head, v_batch, v_head, scale, scale_log2,
    S: tl.constexpr, FIELDS: tl.constexpr, RUNS: tl.constexpr, PADDED: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    TILE = TILES + tl.program_id(0) * FIELDS
    first = tl.load(TILE)
    last = tl.load(TILE + 1)
    if first >= last:
        return
    Q = _head(Q, H, q_batch, q_head)
    K = _head(K, H, k_batch, k_head)
    V = _head(V, H, v_batch, v_head)
    stat = tl.program_id(1).to(tl.int64) * ROWS
    rows = first + tl.arange(0, BM)
    row_ok = rows < last
    q1 = _channels(Q, rows, row_ok, D, 0, D1)
    do1 = _channels(GRAD + stat * D, rows, row_ok, D, 0, D1)
    o1 = _channels(OUT + stat * D, rows, row_ok, D, 0, D1)
    delta = tl.sum(o1.to(tl.float32) * do1.to(tl.float32), axis=1)
    dq1 = tl.zeros([BM, D1], tl.float32)
    if D2 > 0:
        q2 = _channels(Q, rows, row_ok, D, D1, D2)
        do2 = _channels(GRAD + stat * D, rows, row_ok, D, D1, D2)
        o2 = _channels(OUT + stat * D, rows, row_ok, D, D1, D2)
        delta += tl.sum(o2.to(tl.float32) * do2.to(tl.float32), axis=1)
        dq2 = tl.zeros([BM, D2], tl.float32)
    lse = tl.load(LSE + stat + rows, mask=row_ok, other=0.0)
    tl.store(STATS + (stat + rows) * 2, lse, mask=row_ok)
    tl.store(STATS + (stat + rows) * 2 + 1, delta, mask=row_ok)

    run = 0
    blocks, start, stop, inner, outer = _walk(TILE, RUNS, BN)
    for _ in range(0, blocks):
        n = start + tl.arange(0, BN)
        ok = n < stop
        if PADDED:
            low, high = _valid_words(VALID, start, S, BN)
            ok = ok & _valid_columns(low, high, BN)
        k1 = _channels(K, n, ok, D, 0, D1)
        v1 = _channels(V, n, ok, D, 0, D1)
        s = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        dp = tl.dot(do1, tl.trans(v1), input_precision="ieee")
        if D2 > 0:
            k2 = _channels(K, n, ok, D, D1, D2)
            v2 = _channels(V, n, ok, D, D1, D2)
            s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")
            dp = tl.dot(do2, tl.trans(v2), dp, input_precision="ieee")
        p = tl.exp2(s * scale_log2 - lse[:, None])
        ds = p * (dp - delta[:, None])
        partial = (start < inner) | (start + BN > outer)
        if PADDED:
            partial = partial | ((low & high) != -1)
        if partial:
            inside = _inside(TILE, first, rows, run, n, S, RUNS)
            if PADDED:
                inside = inside & ok[None, :]
            ds = tl.where(inside, ds, 0.0)
        ds = ds.to(k1.dtype)
        dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
        if D2 > 0:
            dq2 = tl.dot(ds, k2, dq2, input_precision="ieee")
        run, start, stop, inner, outer = _advance(TILE, run, start, stop, inner, outer, RUNS, BN)

    _put(DQ + stat * D, rows, dq1 * scale, row_ok, D, 0, D1)
    if D2 > 0:
        _put(DQ + stat * D, rows, dq2 * scale, row_ok, D, D1, D2)


@triton.jit
@no_type_check
def _key_gradient_kernel(
    Q, K, V, TILES, VALID, GRAD, STATS, DK, DV,
    H, ROWS, COLS, q_batch, q_head, k_batch, k_head, v_batch, v_head, scale, scale_log2,
    S: tl.constexpr, FIELDS: tl.constexpr, RUNS: tl.constexpr, PADDED: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    TILE = TILES + tl.program_id(0) * FIELDS
    first = tl.load(TILE)
    last = tl.load(TILE + 1)
    if first >= last:
        return
    Q = _head(Q, H, q_batch, q_head)
    K = _head(K, H, k_batch, k_head)
    V = _head(V, H, v_batch, v_head)
    stat = tl.program_id(1).to(tl.int64) * ROWS
    rows = first + tl.arange(0, BM)
    row_ok = rows < last
    # What nobody reads may hold anything, NaN included.
    read = rows < first
    for r in tl.static_range(RUNS):
        _, count = _seen(TILE, first, rows, r, S, RUNS)
        read = read | (count > 0)
    read = read & row_ok
    if PADDED:
        read = read & ((tl.load(VALID + rows % S) & 1) != 0)
    k1 = _channels(K, rows, read, D, 0, D1)
    v1 = _channels(V, rows, read, D, 0, D1)
    dk1 = tl.zeros([BM, D1], tl.float32)
    dv1 = tl.zeros([BM, D1], tl.float32)
    if D2 > 0:
        k2 = _channels(K, rows, read, D, D1, D2)
        v2 = _channels(V, rows, read, D, D1, D2)
        dk2 = tl.zeros([BM, D2], tl.float32)
        dv2 = tl.zeros([BM, D2], tl.float32)

    run = 0
    blocks, start, stop, inner, outer = _walk(TILE, RUNS, BN)
    for _ in range(0, blocks):
        n = start + tl.arange(0, BN)
        ok = n < stop
        q1 = _channels(Q, n, ok, D, 0, D1)
        # In pairs: enough elements for one asynchronous copy instead of one load for each thread.
        pair = (stat + n)[:, None] * 2 + tl.arange(0, 2)[None, :]
        lse, delta = tl.split(tl.load(STATS + pair, mask=ok[:, None], other=0.0))
        s = tl.dot(k1, tl.trans(q1), input_precision="ieee")
        if D2 > 0:
            q2 = _channels(Q, n, ok, D, D1, D2)
            s = tl.dot(k2, tl.trans(q2), s, input_precision="ieee")
        p = tl.exp2(s * scale_log2 - lse[None, :])
        if (start < inner) | (start + BN > outer):
            inside = _inside(TILE, first, rows, run, n, S, RUNS)
            p = tl.where(inside, p, 0.0)
        do1 = _channels(GRAD + stat * D, n, ok, D, 0, D1)
        weights = p.to(q1.dtype)
        dv1 = tl.dot(weights, do1, dv1, input_precision="ieee")
        dp = tl.dot(v1, tl.trans(do1), input_precision="ieee")
        if D2 > 0:
            do2 = _channels(GRAD + stat * D, n, ok, D, D1, D2)
            dv2 = tl.dot(weights, do2, dv2, input_precision="ieee")
            dp = tl.dot(v2, tl.trans(do2), dp, input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q1.dtype)
        dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
        if D2 > 0:
            dk2 = tl.dot(ds, q2, dk2, input_precision="ieee")
        run, start, stop, inner, outer = _advance(TILE, run, start, stop, inner, outer, RUNS, BN)

    at = tl.program_id(1).to(tl.int64) * COLS * D
    live = read[:, None]
    _put(DK + at, rows, tl.where(live, dk1 * scale, 0.0), row_ok, D, 0, D1)
    _put(DV + at, rows, tl.where(live, dv1, 0.0), row_ok, D, 0, D1)
    if D2 > 0:
        _put(DK + at, rows, tl.where(live, dk2 * scale, 0.0), row_ok, D, D1, D2)
        _put(DV + at, rows, tl.where(live, dv2, 0.0), row_ok, D, D1, D2)


def valid_words(valid: Bool[Tensor, "S"]) -> Int[Tensor, "S"]:
    """Bit i of word s says whether token slot s + i holds a token, slots being counted round."""
    at = torch.arange(len(valid), device=valid.device)
    bit = torch.arange(64, device=valid.device)
    return (valid[(at[:, None] + bit) % len(valid)].long() << bit).sum(1)


def _heads(x: Tensor) -> Tensor:
    """`x` with the rows of every head contiguous; heads and worlds may lie anywhere."""
    *_, S, D = x.shape
    return x if x.stride()[2:] == (S * D, D, 1) else x.contiguous()


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _options(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, words: Tensor | None, launch: Launch,
    scale: float | None,
) -> dict[str, Any]:  # fmt: skip
    """What all kernels are called with, by name."""
    S, D = q.shape[3:]
    first, second = head_pieces(D)
    return {
        "Q": q,
        "K": k,
        "V": v,
        "TILES": tiles,
        "VALID": words,
        "H": q.shape[1],
        "ROWS": q.shape[2] * S,
        "q_batch": q.stride(0),
        "q_head": q.stride(1),
        "k_batch": k.stride(0),
        "k_head": k.stride(1),
        "v_batch": v.stride(0),
        "v_head": v.stride(1),
        "scale_log2": _scale(q, scale) * math.log2(math.e),
        "S": S,
        "FIELDS": tiles.shape[1],
        "RUNS": (tiles.shape[1] - 2) // (4 + 2 * tile_latents(launch.rows, S)),
        "PADDED": words is not None,
        "D": D,
        "D1": first,
        "D2": second,
        "BM": launch.rows,
        "BN": launch.columns,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "maxnreg": launch.registers or None,
    }


def forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, words: Tensor | None, launch: Launch,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output, and the log2 of the sum of the exponentials of each query, fp32."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:4], dtype=torch.float32)
    options = _options(q, k, v, tiles, words, launch, scale)
    _forward_kernel[(len(tiles), q.shape[0] * q.shape[1])](OUT=out, LSE=lse, **options)
    return out, lse


def query_gradient(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, words: Tensor | None, launch: Launch,
    out: Tensor, lse: Tensor, grad: Tensor, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dQ, and what dK and dV need of each query, fp32: lse, and output times gradient, summed."""
    dq, stats = q.new_empty(q.shape), lse.new_empty((*lse.shape, 2))
    options = _options(q, k, v, tiles, words, launch, scale)
    _query_gradient_kernel[(len(tiles), q.shape[0] * q.shape[1])](
        OUT=out, GRAD=grad, LSE=lse, STATS=stats, DQ=dq, scale=_scale(q, scale), **options
    )
    return dq, stats


def key_gradient(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, words: Tensor | None, launch: Launch,
    stats: Tensor, grad: Tensor, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dK and dV; zeros for keys that no query reads."""
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    options = _options(q, k, v, tiles, words, launch, scale)
    _key_gradient_kernel[(len(tiles), q.shape[0] * q.shape[1])](
        GRAD=grad, STATS=stats, DK=dk, DV=dv,
        COLS=k.shape[2] * k.shape[3], scale=_scale(q, scale), **options,
    )  # fmt: skip
    return dk, dv


@torch.library.custom_op("decmem::window_forward", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tensor], words: Tensor | None,
    launches: Sequence[int], scale: float | None, lists: Tensor | None, counts: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = _heads(q), _heads(k), _heads(v)
    if lists is not None:
        found = _forward_on_hopper(window_blocks(q, k, v, lists, counts), _scale(q, scale))
        if found is not None:
            return found[0].view(q.shape), found[1].view(q.shape[:4])
    return forward(q, k, v, tiles[0], words, Launches.unpack(launches).forward, scale)


def _forward_on_hopper(x: WindowBlocks, scale: float) -> tuple[Tensor, Tensor] | None:
    """The same of tiles and blocks, by the kernels for Hopper GPUs; None where these do not serve.
    What they leave for gradients is what `forward` leaves."""
    from decmem.ops.sparse_kernels import hopper_obstacle, sparse_cuda_kernels

    if hopper_obstacle(x.q, x.k, x.valid, x.lists) or sparse_cuda_kernels is None:
        return None
    return sparse_cuda_kernels.run_forward(
        x.q.contiguous(), x.k, x.v, x.lists, x.valid, scale
    )  # fmt: skip


@_forward.register_fake
def _(q, k, v, tiles, words, launches, scale, lists, counts):
    return q.new_empty(q.shape), q.new_empty(q.shape[:4], dtype=torch.float32)


@torch.library.custom_op("decmem::window_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tensor], words: Tensor | None,
    launches: Sequence[int], out: Tensor, lse: Tensor, grad: Tensor, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _, of_queries, of_keys = Launches.unpack(launches)
    q, k, v, grad = _heads(q), _heads(k), _heads(v), grad.contiguous()
    dq, stats = query_gradient(q, k, v, tiles[1], words, of_queries, out, lse, grad, scale)
    return dq, *key_gradient(q, k, v, tiles[2], words, of_keys, stats, grad, scale)


@_backward.register_fake
def _(q, k, v, tiles, words, launches, out, lse, grad, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, tiles, words, launches, scale, *_ = inputs
    ctx.save_for_backward(q, k, v, words, *output, *tiles)
    ctx.launches, ctx.scale = launches, scale


def _autograd(ctx, grad, _grad_lse):
    q, k, v, words, out, lse, *tiles = ctx.saved_tensors
    grads = _backward(q, k, v, tiles, words, ctx.launches, out, lse, grad, ctx.scale)
    return *grads, [None] * len(tiles), None, None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Sequence[Tensor],
    valid: Tensor | None,
    launches: Launches,
    scale: float | None = None,
    lists: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Attention over windows; `decmem.ops.window.window_attention` says what of.

    Args:
        k, v: as many latents as the table has columns.
        tiles: of the table for the forward pass, dQ, and dK and dV, of the launches' sizes; the
            first alone where no gradient is wanted.
        scale: of scores; None: D^-1/2.
        lists: blocks that tiles of queries see, `counts` tokens in them: for the kernels for Hopper
            GPUs, which do the forward pass where they can. None: they are not asked.
    """
    words = None if valid is None else valid_words(valid)
    out, _ = _forward(q, k, v, tiles, words, launches.pack(), scale, lists, counts)
    return out
