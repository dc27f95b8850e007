"""Block-sparse attention for Hopper GPUs, forward, in Gluon: warp groups that share what they load.

A program owns up to 192 rows of one query block, 64 per warp group. Keys and values of the listed
blocks come through the bulk copy engine into a ring of stages; all groups read a stage, each at
its own pace, and while one group is busy with its softmax the others keep the tensor cores busy.
Filling the ring is shared out among the groups: a group of its own for it would take registers
away from those that compute. Names as in `sparse_forward_kernels`.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from decmem.ops.sparse_forward_kernels import Parts, gated, merge
from decmem.ops.sparse_tiles import (
    LOG2E,
    Blocks,
    HopperTiles,
    blocks,
    cdiv,
    columns,
    hopper_split_of,
    hopper_tiles,
)

# The second is its name before Triton 3.7.
barrier = vars(gl).get("barrier") or vars(gl)["thread_barrier"]

ROWS = gl.constexpr(64)
"""Rows of a warp group."""

FLOOR = gl.constexpr(-1e30)

# Asking for more registers than there are makes Triton leave the hardware's even split alone. Any
# other split makes the assembler wait after every single matrix instruction.
EVEN_SPLIT = gl.constexpr(512)


@gluon.constexpr_function
def accumulator(columns):
    """Layout of a warp group's 64 x columns result."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
    )


def shared_layout(columns: int) -> Any:
    """Layout of rows of `columns` 16-bit numbers in shared memory."""
    return gl.NVMMASharedLayout(
        swizzle_byte_width=min(128, 2 * columns), element_bitwidth=16, rank=2
    )


shared = gluon.constexpr_function(shared_layout)


@gluon.constexpr_function
def rowwise(columns):
    """Layout in which a warp group loads 64 rows, 16 bytes at a time."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def at_least_16(n):
    return max(n, 16)


@gluon.constexpr_function
def fed_by(groups, tail_keys, of_values, of_tail, of_rest):
    """Which group copies a piece of a stage, so that all have about as many."""
    if groups == 3 and (of_tail or (tail_keys == 0 and of_rest)):
        return 2
    return int(of_values) if groups > 1 else 0


@gluon.constexpr_function
def fed_bytes(group, groups, BN, BT, D0, D1):
    """Bytes of a stage that the group copies."""
    pieces = [
        (fed_by(groups, BT, values, tail, rest), (BT if tail else BN) * (D1 if rest else D0) * 2)
        for values in (False, True)
        for tail in (False, True)
        for rest in (False, True)
    ]
    return sum(size for owner, size in pieces if owner == group)


@gluon.jit
@no_type_check
def copy_pieces(
    maps, buffers, line, stage, bar, VALUES: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr,
    D0: gl.constexpr, D1: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Copies the group's pieces of the keys, or of the values, of one stage."""
    if fed_by(GROUPS, BT, VALUES, False, False) == GROUP:
        tma.async_copy_global_to_shared(maps[0], [line, 0], bar, buffers[0].index(stage))
    if D1 > 0:  # noqa: SIM102, known when compiled
        if fed_by(GROUPS, BT, VALUES, False, True) == GROUP:
            tma.async_copy_global_to_shared(maps[1], [line, D0], bar, buffers[1].index(stage))
    if BT > 0:
        if fed_by(GROUPS, BT, VALUES, True, False) == GROUP:
            tma.async_copy_global_to_shared(maps[2], [line + BN, 0], bar, buffers[2].index(stage))
        if D1 > 0:  # noqa: SIM102
            if fed_by(GROUPS, BT, VALUES, True, True) == GROUP:
                tma.async_copy_global_to_shared(
                    maps[3], [line + BN, D0], bar, buffers[3].index(stage)
                )


@gluon.jit
@no_type_check
def feed(
    m, first, LISTS, k_maps, v_maps, k_buffers, v_buffers, full, free, k_line, v_line,
    PK: gl.constexpr, BN: gl.constexpr, BT: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """Starts the group's copies of span `m`, once all groups have done with what lies there."""
    SPAN: gl.constexpr = BN + BT
    SPANS: gl.constexpr = PK // SPAN
    stage = m % STAGES
    at = gl.load(LISTS + (first + m) // SPANS) * PK + (first + m) % SPANS * SPAN
    mbarrier.wait(free.index(stage), ((m // STAGES) & 1) ^ 1)
    bar = full.index(stage)
    mbarrier.expect(bar, fed_bytes(GROUP, GROUPS, BN, BT, D0, D1))
    copy_pieces(k_maps, k_buffers, k_line + at, stage, bar, False, BN, BT, D0, D1, GROUP, GROUPS)
    copy_pieces(v_maps, v_buffers, v_line + at, stage, bar, True, BN, BT, D0, D1, GROUP, GROUPS)


@gluon.jit
@no_type_check
def pieces_of(
    buffers, BN: gl.constexpr, BT: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    PIECES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The same stages, piece by piece."""
    if PIECES == 1:
        return buffers
    dtype: gl.constexpr = buffers[0].dtype
    main, rest, tail, corner = buffers
    main = main._reinterpret(dtype, [STAGES * PIECES, BN // PIECES, D0], shared(D0))
    if D1 > 0:
        rest = rest._reinterpret(dtype, [STAGES * PIECES, BN // PIECES, D1], shared(D1))
    if BT > 0:
        tail = tail._reinterpret(dtype, [STAGES * PIECES, BT // PIECES, D0], shared(D0))
        if D1 > 0:
            corner = corner._reinterpret(dtype, [STAGES * PIECES, BT // PIECES, D1], shared(D1))
    return main, rest, tail, corner


@gluon.jit
@no_type_check
def _stored(
    OUT, ALM, GATE, line, shift, rows, columns, x,
    PQ: gl.constexpr, D: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Writes some columns of the group's rows, joined with the local branch where there is one."""
    ok = (rows < PQ)[:, None] & (columns < D)[None, :]
    at = (line + rows).to(gl.int64)[:, None] * D + columns[None, :]
    if GATED > 0:
        if GATED == 1:
            gate = gl.load(GATE + line + rows, mask=rows < PQ, other=0.0)[:, None]
        else:
            gate = gl.load(GATE + at, mask=ok, other=0.0)
        x = gl.load(ALM + at, mask=ok, other=0.0).to(gl.float32) + gate.to(gl.float32) * x
    gl.store(OUT + at + shift.to(gl.int64) * D, x.to(OUT.dtype.element_ty), mask=ok)


@gluon.jit
@no_type_check
def _compute(
    Q, OUT, LSE, ALM, GATE, LISTS, VALID, k_maps, v_maps, q_buffers, k_buffers, v_buffers, full,
    free, turn, line, shift, k_line, v_line, row, first, last, scale,
    PQ: gl.constexpr, PK: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    PERIOD: gl.constexpr, GATED: gl.constexpr, PARTIAL: gl.constexpr, BN: gl.constexpr,
    BT: gl.constexpr, PIECES: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    GROUP: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """What one warp group does: 64 rows of queries against all spans of the list.

    With `TURNS`, groups start their matrix products one after another. They would all start at
    once otherwise, and then all be busy with their softmax while the tensor cores have no work.
    """
    SPAN: gl.constexpr = BN + BT
    SPANS: gl.constexpr = PK // SPAN
    KEYS: gl.constexpr = BN // PIECES
    TAIL: gl.constexpr = BT // PIECES
    # Spans that are loaded ahead. A group may lag behind the others by a piece, or by a span where
    # there is only one piece, before anybody waits for it.
    AHEAD: gl.constexpr = STAGES - 1 if PIECES > 1 else STAGES - 2
    DX: gl.constexpr = at_least_16(D1)
    s_layout: gl.constexpr = accumulator(KEYS)
    t_layout: gl.constexpr = accumulator(at_least_16(TAIL))
    o_layout: gl.constexpr = accumulator(D0)
    x_layout: gl.constexpr = accumulator(DX)
    stats: gl.constexpr = gl.SliceLayout(1, o_layout)
    weights: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    load0: gl.constexpr = rowwise(D0)
    load1: gl.constexpr = rowwise(DX)
    dtype: gl.constexpr = Q.dtype.element_ty

    row = row + GROUP * ROWS
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, load0))
    d = gl.arange(0, D0, gl.SliceLayout(0, load0))
    ok = (rows < PQ)[:, None] & (d < D)[None, :]
    q0 = q_buffers[0].index(GROUP)
    at = (line + rows).to(gl.int64)[:, None] * D + d[None, :]
    q0.store(gl.load(Q + at, mask=ok, other=0.0))
    q1 = q_buffers[1].index(GROUP)
    if D1 > 0:
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, load1))
        d = D0 + gl.arange(0, DX, gl.SliceLayout(0, load1))
        ok = (rows < PQ)[:, None] & (d < D)[None, :]
        q1.store(
            gl.load(Q + (line + rows).to(gl.int64)[:, None] * D + d[None, :], mask=ok, other=0.0)
        )
    # What ordinary stores put into shared memory, the tensor cores read past the cache.
    fence_async_shared()
    barrier()

    for m in range(0, gl.minimum(AHEAD, last - first)):
        feed(
            m, first, LISTS, k_maps, v_maps, k_buffers, v_buffers, full, free, k_line, v_line,
            PK, BN, BT, D0, D1, STAGES, GROUP, GROUPS,
        )  # fmt: skip
    k_pieces = pieces_of(k_buffers, BN, BT, D0, D1, PIECES, STAGES)
    v_pieces = pieces_of(v_buffers, BN, BT, D0, D1, PIECES, STAGES)
    top = gl.full([ROWS], FLOOR, gl.float32, stats)
    norm = gl.zeros([ROWS], gl.float32, stats)
    acc0 = warpgroup_mma_init(gl.zeros([ROWS, D0], gl.float32, o_layout))
    acc1 = gl.zeros([ROWS, DX], gl.float32, x_layout)
    if D1 > 0:
        acc1 = warpgroup_mma_init(acc1)
    columns = gl.arange(0, KEYS, gl.SliceLayout(0, s_layout))
    nothing = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    if TAIL > 0:
        tail_columns = gl.arange(0, TAIL, gl.SliceLayout(0, t_layout))
        nothing_t = gl.zeros([ROWS, TAIL], gl.float32, t_layout)

    for u in range(0, (last - first) * PIECES):
        n = u // PIECES
        stage = n % STAGES
        piece = u % PIECES
        there = stage * PIECES + piece
        if PERIOD > 0:
            # Before the wait, so that it hides these loads.
            block = gl.load(LISTS + (first + n) // SPANS)
            left = gl.load(VALID + block % PERIOD) - (first + n) % SPANS * SPAN
            # Always 0, which the compiler cannot know: it would keep a register for every column
            # number otherwise.
            zero = block >> 31
        mbarrier.wait(full.index(stage), (n // STAGES) & 1)
        s = warpgroup_mma(
            q0, k_pieces[0].index(there).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        if D1 > 0:
            s = warpgroup_mma(q1, k_pieces[1].index(there).permute((1, 0)), s, is_async=True)
        if TAIL > 0:
            st = warpgroup_mma(
                q0, k_pieces[2].index(there).permute((1, 0)), nothing_t, use_acc=False,
                is_async=True,
            )  # fmt: skip
            if D1 > 0:
                st = warpgroup_mma(q1, k_pieces[3].index(there).permute((1, 0)), st, is_async=True)
        if TURNS:
            # The tensor cores do products in the order in which they were started.
            mbarrier.arrive(turn.index((GROUP + 1) % GROUPS), count=1, pred=u > 0)
        # This waits for the products with the last piece's values too.
        if TAIL > 0 and D1 > 0:
            s, st, acc0, acc1 = warpgroup_mma_wait(0, deps=[s, st, acc0, acc1])
        elif TAIL > 0:
            s, st, acc0 = warpgroup_mma_wait(0, deps=[s, st, acc0])
        elif D1 > 0:
            s, acc0, acc1 = warpgroup_mma_wait(0, deps=[s, acc0, acc1])
        else:
            s, acc0 = warpgroup_mma_wait(0, deps=[s, acc0])
        mbarrier.arrive(free.index((n + STAGES - 1) % STAGES), count=1, pred=(piece == 0) & (n > 0))
        if (piece == PIECES - 1) & (first + n + AHEAD < last):
            feed(
                n + AHEAD, first, LISTS, k_maps, v_maps, k_buffers, v_buffers, full, free, k_line,
                v_line, PK, BN, BT, D0, D1, STAGES, GROUP, GROUPS,
            )  # fmt: skip

        if PERIOD > 0:
            here = left - piece * KEYS
            if here < KEYS:
                s = gl.where((columns + zero < here)[None, :], s, float("-inf"))
        peak = gl.convert_layout(gl.max(s, axis=1), stats)
        if TAIL > 0:
            if PERIOD > 0:
                here = left - BN - piece * TAIL
                st = gl.where((tail_columns + zero < here)[None, :], st, float("-inf"))
            peak = gl.maximum(peak, gl.convert_layout(gl.max(st, axis=1), stats))
        new_top = gl.maximum(top, peak * scale)
        fade = gl.exp2(top - new_top)
        top = new_top
        shifts = gl.convert_layout(new_top, gl.SliceLayout(1, s_layout))
        p = gl.exp2(s * scale - shifts[:, None])
        norm = norm * fade + gl.convert_layout(gl.sum(p, axis=1), stats)
        p = gl.convert_layout(p.to(dtype), weights)
        acc0 = acc0 * fade[:, None]
        if D1 > 0:
            acc1 = acc1 * gl.convert_layout(fade, gl.SliceLayout(1, x_layout))[:, None]
        if TAIL > 0:
            shifts = gl.convert_layout(new_top, gl.SliceLayout(1, t_layout))
            pt = gl.exp2(st * scale - shifts[:, None])
            norm += gl.convert_layout(gl.sum(pt, axis=1), stats)
            pt = gl.convert_layout(pt.to(dtype), weights)
        if TURNS:
            # The first group begins; a turn lasts until the next keys have met the queries.
            mbarrier.wait(turn.index(GROUP), (u & 1) ^ 1 if GROUP == 0 else u & 1)
        acc0 = warpgroup_mma(p, v_pieces[0].index(there), acc0, is_async=True)
        if D1 > 0:
            acc1 = warpgroup_mma(p, v_pieces[1].index(there), acc1, is_async=True)
        if TAIL > 0:
            acc0 = warpgroup_mma(pt, v_pieces[2].index(there), acc0, is_async=True)
            if D1 > 0:
                acc1 = warpgroup_mma(pt, v_pieces[3].index(there), acc1, is_async=True)
    if D1 > 0:
        acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
    else:
        acc0 = warpgroup_mma_wait(0, deps=[acc0])
    if TURNS:
        mbarrier.arrive(turn.index((GROUP + 1) % GROUPS), count=1)

    some = norm > 0
    norm = gl.where(some, norm, 1.0)
    rows = row + gl.arange(0, ROWS, stats)
    c = gl.arange(0, D0, gl.SliceLayout(0, o_layout))
    _stored(OUT, ALM, GATE, line, shift, rows, c, acc0 / norm[:, None], PQ, D, GATED)
    unread = float("-inf") if PARTIAL else 0.0
    lse = gl.where(some, top + gl.log2(norm), unread)
    gl.store(LSE + line + shift + rows, lse, mask=rows < PQ)
    if D1 > 0:
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, x_layout))
        c = D0 + gl.arange(0, DX, gl.SliceLayout(0, x_layout))
        norm = gl.convert_layout(norm, gl.SliceLayout(1, x_layout))
        _stored(OUT, ALM, GATE, line, shift, rows, c, acc1 / norm[:, None], PQ, D, GATED)


@gluon.jit(
    do_not_specialize=[
        "B", "H", "G", "NQ", "slots", "lists_world", "k_world", "k_head", "v_world", "v_head",
    ]
)  # fmt: skip
@no_type_check
def forward_kernel(
    Q, K0, K1, KT0, KT1, V0, V1, VT0, VT1, LISTS, VALID, OUT, LSE, ALM, GATE,
    B, H, G, NQ, slots, lists_world, k_world, k_head, v_world, v_head, scale,
    PQ: gl.constexpr, PK: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    PERIOD: gl.constexpr, GATED: gl.constexpr, SPLIT: gl.constexpr, BN: gl.constexpr,
    BT: gl.constexpr, PIECES: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    GROUPS: gl.constexpr,
):  # fmt: skip
    """Arguments as of `sparse_forward_kernels.forward_kernel`; K and V as maps of the copy engine.

    K0 is (rows, D) in boxes of BN x D0, K1 of BN x D1, KT0 and KT1 of BT rows; V alike. A span of
    BN + BT keys, which divides PK, is a stage; it is read in `PIECES` equal pieces.
    """
    SPANS: gl.constexpr = PK // (BN + BT)
    STEP: gl.constexpr = ROWS * GROUPS
    PROGRAMS: gl.constexpr = (PQ + STEP - 1) // STEP
    DX: gl.constexpr = at_least_16(D1)
    BX: gl.constexpr = at_least_16(BT)
    # A piece that is not used takes no room.
    X_STAGES: gl.constexpr = STAGES if D1 > 0 else 1
    T_STAGES: gl.constexpr = STAGES if BT > 0 else 1
    XT_STAGES: gl.constexpr = STAGES if D1 > 0 and BT > 0 else 1
    lines: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = Q.dtype.element_ty
    q_buffers = (
        gl.allocate_shared_memory(dtype, [GROUPS, ROWS, D0], shared(D0)),
        gl.allocate_shared_memory(dtype, [GROUPS, ROWS, DX], shared(DX)),
    )
    k_buffers = (
        gl.allocate_shared_memory(dtype, [STAGES, BN, D0], shared(D0)),
        gl.allocate_shared_memory(dtype, [X_STAGES, BN, DX], shared(DX)),
        gl.allocate_shared_memory(dtype, [T_STAGES, BX, D0], shared(D0)),
        gl.allocate_shared_memory(dtype, [XT_STAGES, BX, DX], shared(DX)),
    )
    v_buffers = (
        gl.allocate_shared_memory(dtype, [STAGES, BN, D0], shared(D0)),
        gl.allocate_shared_memory(dtype, [X_STAGES, BN, DX], shared(DX)),
        gl.allocate_shared_memory(dtype, [T_STAGES, BX, D0], shared(D0)),
        gl.allocate_shared_memory(dtype, [XT_STAGES, BX, DX], shared(DX)),
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=GROUPS)
        mbarrier.init(free.index(s), count=GROUPS)
    turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(GROUPS):
        mbarrier.init(turn.index(s), count=1)

    pid = gl.program_id(0)
    i = (pid // PROGRAMS) % NQ
    b = (pid // (PROGRAMS * NQ)) % B
    h = (pid // (PROGRAMS * NQ * B)) % H
    part = pid // (PROGRAMS * NQ * B * H)
    LISTS += b * lists_world + (gl.where(G > 1, h, 0) * NQ + i) * slots
    filled = 0
    for start in range(0, slots, 128):
        x = start + gl.arange(0, 128, lines)
        listed = gl.load(LISTS + x, mask=x < slots, other=-1) >= 0
        filled += gl.sum(listed.to(gl.int32), axis=0)
    first = part * filled // SPLIT * SPANS
    last = (part + 1) * filled // SPLIT * SPANS
    line = ((b * H + h) * NQ + i) * PQ
    shift = part * B * H * NQ * PQ
    row = pid % PROGRAMS * STEP
    k_line = (b * k_world + h * k_head) * PK
    v_line = (b * v_world + h * v_head) * PK
    k_maps, v_maps = (K0, K1, KT0, KT1), (V0, V1, VT0, VT1)

    # The tuples stand in the call: one that is given a name loses its compile-time constants.
    if GROUPS == 1:
        _compute(
            Q, OUT, LSE, ALM, GATE, LISTS, VALID, k_maps, v_maps, q_buffers, k_buffers, v_buffers,
            full, free, turn, line, shift, k_line, v_line, row, first, last, scale, PQ, PK, D, D0,
            D1, PERIOD, GATED, SPLIT > 1, BN, BT, PIECES, STAGES, TURNS, 0, GROUPS,
        )  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (_compute, (
                    Q, OUT, LSE, ALM, GATE, LISTS, VALID, k_maps, v_maps, q_buffers, k_buffers,
                    v_buffers, full, free, turn, line, shift, k_line, v_line, row, first, last,
                    scale, PQ, PK, D, D0, D1, PERIOD, GATED, SPLIT > 1, BN, BT, PIECES, STAGES,
                    TURNS, 0, GROUPS)),
                (_compute, (
                    Q, OUT, LSE, ALM, GATE, LISTS, VALID, k_maps, v_maps, q_buffers, k_buffers,
                    v_buffers, full, free, turn, line, shift, k_line, v_line, row, first, last,
                    scale, PQ, PK, D, D0, D1, PERIOD, GATED, SPLIT > 1, BN, BT, PIECES, STAGES,
                    TURNS, 1, GROUPS)),
            ],
            [4], [EVEN_SPLIT],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_compute, (
                    Q, OUT, LSE, ALM, GATE, LISTS, VALID, k_maps, v_maps, q_buffers, k_buffers,
                    v_buffers, full, free, turn, line, shift, k_line, v_line, row, first, last,
                    scale, PQ, PK, D, D0, D1, PERIOD, GATED, SPLIT > 1, BN, BT, PIECES, STAGES,
                    TURNS, 0, GROUPS)),
                (_compute, (
                    Q, OUT, LSE, ALM, GATE, LISTS, VALID, k_maps, v_maps, q_buffers, k_buffers,
                    v_buffers, full, free, turn, line, shift, k_line, v_line, row, first, last,
                    scale, PQ, PK, D, D0, D1, PERIOD, GATED, SPLIT > 1, BN, BT, PIECES, STAGES,
                    TURNS, 1, GROUPS)),
                (_compute, (
                    Q, OUT, LSE, ALM, GATE, LISTS, VALID, k_maps, v_maps, q_buffers, k_buffers,
                    v_buffers, full, free, turn, line, shift, k_line, v_line, row, first, last,
                    scale, PQ, PK, D, D0, D1, PERIOD, GATED, SPLIT > 1, BN, BT, PIECES, STAGES,
                    TURNS, 2, GROUPS)),
            ],
            [4, 4], [EVEN_SPLIT, EVEN_SPLIT],
        )  # fmt: skip


def obstacle(q: Tensor, k: Tensor, valid: Tensor | None) -> str | None:
    """Why these kernels cannot take these inputs; None if they can."""
    PQ, PK, D = q.shape[3], k.shape[3], q.shape[4]
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 9:
        return "needs a Hopper GPU"
    if q.element_size() != 2:
        return f"takes bfloat16 and float16, not {q.dtype}"
    if D % 8 or not 32 <= D <= 128:
        return f"takes head dims from 32 to 128 in multiples of 8, not {D}"
    if valid is not None and valid.dtype == torch.bool:
        return "takes `valid` as counts, not as slots"
    if PQ <= 32 or hopper_tiles(PQ, PK, D) is None:
        return f"takes blocks of a multiple of 64 or 80 slots, not {PQ} x {PK}"
    return None


def boxes(x: Blocks, rows: int, tail: int) -> list[TensorDescriptor]:
    """The lines of `x`, from its first to its last, as maps in the four boxes of a stage."""
    B, H, N, P, D = x.tensor.shape
    D0, D1 = columns(D)
    lines = ((B - 1) * x.world + (H - 1) * x.head + N) * P
    return [
        TensorDescriptor(x.tensor, [lines, D], [D, 1], [height, width], shared_layout(width))
        for height in (rows, max(16, tail))
        for width in (D0, max(16, D1))
    ]


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    alm: Tensor | None = None, gate: Tensor | None = None, split: int | None = None,
    tiles: HopperTiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `sparse_kernels.run_forward`, for inputs without an `obstacle`."""
    B, H, NQ, PQ, D = q.shape
    PK = k.shape[3]
    tiles = tiles or hopper_tiles(PQ, PK, D)
    assert tiles is not None
    D0, D1 = columns(D)
    keys, values = blocks(k), blocks(v)
    programs = B * H * NQ * cdiv(PQ, 64 * tiles.groups)
    if split is None:
        split = hopper_split_of(programs, tiles.groups, lists.shape[-1] * PK, q.device)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:4], dtype=torch.float32)
    target = Parts(out, lse) if split == 1 else Parts.like(q, split)
    joined = (alm, gate) if split == 1 else (None, None)
    forward_kernel[(programs * split,)](
        q, *boxes(keys, tiles.keys, tiles.tail), *boxes(values, tiles.keys, tiles.tail), lists,
        valid, *target, *joined,
        B, H, lists.shape[1], NQ, lists.shape[-1],
        0 if lists.shape[0] == 1 else lists.stride(0),
        keys.world, keys.head, values.world, values.head, scale * LOG2E,
        PQ=PQ, PK=PK, D=D, D0=D0, D1=D1, PERIOD=0 if valid is None else valid.shape[0],
        GATED=gated(joined[1]), SPLIT=split, BN=tiles.keys, BT=tiles.tail, PIECES=tiles.pieces,
        STAGES=tiles.stages, TURNS=tiles.turns, GROUPS=tiles.groups, num_warps=4,
    )  # fmt: skip
    if split > 1:
        merge(target, out, lse, alm, gate)
    return out, lse
