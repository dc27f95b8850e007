"""Block-sparse attention for Hopper GPUs, backward, in Gluon.

As in the forward, warp groups share a ring of stages that the copy engine fills: for dQ keys and
values of the listed blocks, for dK and dV queries and output gradients of the blocks that read a
key block. Probabilities are made again from the log-sum-exp of the forward.
"""

from typing import NamedTuple, no_type_check

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from decmem.ops.sparse_backward_kernels import inverse_lists
from decmem.ops.sparse_hopper_kernels import (
    EVEN_SPLIT,
    ROWS,
    accumulator,
    at_least_16,
    barrier,
    boxes,
    feed,
    rowwise,
    shared,
)
from decmem.ops.sparse_tiles import (
    LOG2E,
    HopperTiles,
    blocks,
    cdiv,
    columns,
    hopper_key_tiles,
    hopper_query_tiles,
)


@gluon.jit
@no_type_check
def _own_rows(
    X, at, rows_left, buffers, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Puts the group's 64 rows of `X`, from line `at` on, into its part of shared memory."""
    layout: gl.constexpr = rowwise(D0)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    d = gl.arange(0, D0, gl.SliceLayout(0, layout))
    ok = (rows < rows_left)[:, None] & (d < D)[None, :]
    where = (at + rows).to(gl.int64)[:, None] * D + d[None, :]
    buffers[0].index(GROUP).store(gl.load(X + where, mask=ok, other=0.0))
    if D1 > 0:
        layout1: gl.constexpr = rowwise(at_least_16(D1))
        rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout1))
        d = D0 + gl.arange(0, D1, gl.SliceLayout(0, layout1))
        ok = (rows < rows_left)[:, None] & (d < D)[None, :]
        where = (at + rows).to(gl.int64)[:, None] * D + d[None, :]
        buffers[1].index(GROUP).store(gl.load(X + where, mask=ok, other=0.0))


@gluon.jit
@no_type_check
def _write_rows(X, at, rows, columns, x, ok, D: gl.constexpr):
    where = (at + rows).to(gl.int64)[:, None] * D + columns[None, :]
    mask = ok[:, None] & (columns < D)[None, :]
    gl.store(X + where, x.to(X.dtype.element_ty), mask=mask)


@gluon.jit
@no_type_check
def _product(a, b, stage, nothing, GROUP: gl.constexpr, D1: gl.constexpr):
    """Starts a b^T: the group's own rows with those of a stage."""
    c = warpgroup_mma(
        a[0].index(GROUP), b[0].index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    if D1 > 0:
        c = warpgroup_mma(
            a[1].index(GROUP), b[1].index(stage).permute((1, 0)), c, is_async=True
        )  # fmt: skip
    return c


@gluon.jit
@no_type_check
def _query_group(
    Q, DOUT, LSE, DELTA, DQ, LISTS, VALID, k_maps, v_maps, q_buffers, do_buffers, k_buffers,
    v_buffers, full, free, turn, line, k_line, v_line, row, last, scale, scale_log2,
    PQ: gl.constexpr, PK: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    PERIOD: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    GROUP: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """dQ of 64 rows; `TURNS` as in the forward."""
    SPANS: gl.constexpr = PK // BN
    DX: gl.constexpr = at_least_16(D1)
    s_layout: gl.constexpr = accumulator(BN)
    o_layout: gl.constexpr = accumulator(D0)
    x_layout: gl.constexpr = accumulator(DX)
    operand: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dtype: gl.constexpr = Q.dtype.element_ty

    row = row + GROUP * ROWS
    _own_rows(Q, line + row, PQ - row, q_buffers, D, D0, D1, GROUP)
    _own_rows(DOUT, line + row, PQ - row, do_buffers, D, D0, D1, GROUP)
    fence_async_shared()
    barrier()
    for m in range(0, gl.minimum(STAGES - 2, last)):
        feed(
            m, 0, LISTS, k_maps, v_maps, k_buffers, v_buffers, full, free, k_line, v_line, PK, BN,
            0, D0, D1, STAGES, GROUP, GROUPS,
        )  # fmt: skip
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    lse = gl.load(LSE + line + rows, mask=rows < PQ, other=0.0)
    delta = gl.load(DELTA + line + rows, mask=rows < PQ, other=0.0)
    dq0 = warpgroup_mma_init(gl.zeros([ROWS, D0], gl.float32, o_layout))
    dq1 = gl.zeros([ROWS, DX], gl.float32, x_layout)
    if D1 > 0:
        dq1 = warpgroup_mma_init(dq1)
    places = gl.arange(0, BN, gl.SliceLayout(0, s_layout))
    nothing = gl.zeros([ROWS, BN], gl.float32, s_layout)

    for n in range(0, last):
        stage = n % STAGES
        if PERIOD > 0:
            block = gl.load(LISTS + n // SPANS)
            left = gl.load(VALID + block % PERIOD) - n % SPANS * BN
            zero = block >> 31  # always, see the forward
        mbarrier.wait(full.index(stage), (n // STAGES) & 1)
        s = _product(q_buffers, k_buffers, stage, nothing, GROUP, D1)
        dp = _product(do_buffers, v_buffers, stage, nothing, GROUP, D1)
        if TURNS:
            mbarrier.arrive(turn.index((GROUP + 1) % GROUPS), count=1, pred=n > 0)
        if D1 > 0:
            s, dp, dq0, dq1 = warpgroup_mma_wait(0, deps=[s, dp, dq0, dq1])
        else:
            s, dp, dq0 = warpgroup_mma_wait(0, deps=[s, dp, dq0])
        mbarrier.arrive(free.index((n + STAGES - 1) % STAGES), count=1, pred=n > 0)
        if n + STAGES - 2 < last:
            feed(
                n + STAGES - 2, 0, LISTS, k_maps, v_maps, k_buffers, v_buffers, full, free, k_line,
                v_line, PK, BN, 0, D0, D1, STAGES, GROUP, GROUPS,
            )  # fmt: skip

        p = gl.exp2(s * scale_log2 - lse[:, None])
        if PERIOD > 0:  # noqa: SIM102, known when compiled
            if left < BN:
                p = gl.where((places + zero < left)[None, :], p, 0.0)
        ds = gl.convert_layout((p * (dp - delta[:, None])).to(dtype), operand)
        if TURNS:
            mbarrier.wait(turn.index(GROUP), (n & 1) ^ 1 if GROUP == 0 else n & 1)
        dq0 = warpgroup_mma(ds, k_buffers[0].index(stage), dq0, is_async=True)
        if D1 > 0:
            dq1 = warpgroup_mma(ds, k_buffers[1].index(stage), dq1, is_async=True)
    if D1 > 0:
        dq0, dq1 = warpgroup_mma_wait(0, deps=[dq0, dq1])
    else:
        dq0 = warpgroup_mma_wait(0, deps=[dq0])
    if TURNS:
        mbarrier.arrive(turn.index((GROUP + 1) % GROUPS), count=1)
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, o_layout))
    c = gl.arange(0, D0, gl.SliceLayout(0, o_layout))
    _write_rows(DQ, line, rows, c, dq0 * scale, rows < PQ, D)
    if D1 > 0:
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, x_layout))
        c = D0 + gl.arange(0, DX, gl.SliceLayout(0, x_layout))
        _write_rows(DQ, line, rows, c, dq1 * scale, rows < PQ, D)


@gluon.jit(
    do_not_specialize=[
        "B", "H", "G", "NQ", "slots", "lists_world", "k_world", "k_head", "v_world", "v_head",
    ]
)  # fmt: skip
@no_type_check
def query_gradient_kernel(
    Q, DOUT, LSE, DELTA, DQ, K0, K1, KT0, KT1, V0, V1, VT0, VT1, LISTS, VALID,
    B, H, G, NQ, slots, lists_world, k_world, k_head, v_world, v_head, scale, scale_log2,
    PQ: gl.constexpr, PK: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    PERIOD: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    GROUPS: gl.constexpr,
):  # fmt: skip
    """dQ. Programs, maps and stages as in the forward, without tails."""
    SPANS: gl.constexpr = PK // BN
    STEP: gl.constexpr = ROWS * GROUPS
    PROGRAMS: gl.constexpr = (PQ + STEP - 1) // STEP
    DX: gl.constexpr = at_least_16(D1)
    X_STAGES: gl.constexpr = STAGES if D1 > 0 else 1
    lines: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = Q.dtype.element_ty
    q_buffers = (
        gl.allocate_shared_memory(dtype, [GROUPS, ROWS, D0], shared(D0)),
        gl.allocate_shared_memory(dtype, [GROUPS, ROWS, DX], shared(DX)),
    )
    do_buffers = (
        gl.allocate_shared_memory(dtype, [GROUPS, ROWS, D0], shared(D0)),
        gl.allocate_shared_memory(dtype, [GROUPS, ROWS, DX], shared(DX)),
    )
    k_buffers = (
        gl.allocate_shared_memory(dtype, [STAGES, BN, D0], shared(D0)),
        gl.allocate_shared_memory(dtype, [X_STAGES, BN, DX], shared(DX)),
    )
    v_buffers = (
        gl.allocate_shared_memory(dtype, [STAGES, BN, D0], shared(D0)),
        gl.allocate_shared_memory(dtype, [X_STAGES, BN, DX], shared(DX)),
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
    h = pid // (PROGRAMS * NQ * B)
    LISTS += b * lists_world + (gl.where(G > 1, h, 0) * NQ + i) * slots
    filled = 0
    for start in range(0, slots, 128):
        x = start + gl.arange(0, 128, lines)
        listed = gl.load(LISTS + x, mask=x < slots, other=-1) >= 0
        filled += gl.sum(listed.to(gl.int32), axis=0)
    last = filled * SPANS
    line = ((b * H + h) * NQ + i) * PQ
    row = pid % PROGRAMS * STEP
    k_line = (b * k_world + h * k_head) * PK
    v_line = (b * v_world + h * v_head) * PK
    k_maps, v_maps = (K0, K1, KT0, KT1), (V0, V1, VT0, VT1)
    if GROUPS == 1:
        _query_group(
            Q, DOUT, LSE, DELTA, DQ, LISTS, VALID, k_maps, v_maps, q_buffers, do_buffers, k_buffers,
            v_buffers, full, free, turn, line, k_line, v_line, row, last, scale, scale_log2, PQ,
            PK, D, D0, D1, PERIOD, BN, STAGES, TURNS, 0, GROUPS,
        )  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (_query_group, (
                    Q, DOUT, LSE, DELTA, DQ, LISTS, VALID, k_maps, v_maps, q_buffers, do_buffers,
                    k_buffers, v_buffers, full, free, turn, line, k_line, v_line, row, last, scale,
                    scale_log2, PQ, PK, D, D0, D1, PERIOD, BN, STAGES, TURNS, 0, GROUPS)),
                (_query_group, (
                    Q, DOUT, LSE, DELTA, DQ, LISTS, VALID, k_maps, v_maps, q_buffers, do_buffers,
                    k_buffers, v_buffers, full, free, turn, line, k_line, v_line, row, last, scale,
                    scale_log2, PQ, PK, D, D0, D1, PERIOD, BN, STAGES, TURNS, 1, GROUPS)),
            ],
            [4], [EVEN_SPLIT],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_query_group, (
                    Q, DOUT, LSE, DELTA, DQ, LISTS, VALID, k_maps, v_maps, q_buffers, do_buffers,
                    k_buffers, v_buffers, full, free, turn, line, k_line, v_line, row, last, scale,
                    scale_log2, PQ, PK, D, D0, D1, PERIOD, BN, STAGES, TURNS, 0, GROUPS)),
                (_query_group, (
                    Q, DOUT, LSE, DELTA, DQ, LISTS, VALID, k_maps, v_maps, q_buffers, do_buffers,
                    k_buffers, v_buffers, full, free, turn, line, k_line, v_line, row, last, scale,
                    scale_log2, PQ, PK, D, D0, D1, PERIOD, BN, STAGES, TURNS, 1, GROUPS)),
                (_query_group, (
                    Q, DOUT, LSE, DELTA, DQ, LISTS, VALID, k_maps, v_maps, q_buffers, do_buffers,
                    k_buffers, v_buffers, full, free, turn, line, k_line, v_line, row, last, scale,
                    scale_log2, PQ, PK, D, D0, D1, PERIOD, BN, STAGES, TURNS, 2, GROUPS)),
            ],
            [4, 4], [EVEN_SPLIT, EVEN_SPLIT],
        )  # fmt: skip


@gluon.jit
@no_type_check
def _key_group(
    K, V, LSE, DELTA, DK, DV, READERS, VALID, q_maps, do_maps, k_buffers, v_buffers, q_buffers,
    do_buffers, full, free, k_line, v_line, out_line, head, j, column, last, scale, scale_log2,
    PQ: gl.constexpr, PK: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    PERIOD: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    GROUPS: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys, from all the query blocks that read them."""
    SPANS: gl.constexpr = PQ // BM
    DX: gl.constexpr = at_least_16(D1)
    s_layout: gl.constexpr = accumulator(BM)
    o_layout: gl.constexpr = accumulator(D0)
    x_layout: gl.constexpr = accumulator(DX)
    operand: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    dtype: gl.constexpr = K.dtype.element_ty

    column = column + GROUP * ROWS
    _own_rows(K, k_line + column, PK - column, k_buffers, D, D0, D1, GROUP)
    _own_rows(V, v_line + column, PK - column, v_buffers, D, D0, D1, GROUP)
    fence_async_shared()
    barrier()
    for m in range(0, gl.minimum(STAGES - 2, last)):
        feed(
            m, 0, READERS, q_maps, do_maps, q_buffers, do_buffers, full, free, head, head, PQ, BM,
            0, D0, D1, STAGES, GROUP, GROUPS,
        )  # fmt: skip
    dk0 = gl.zeros([ROWS, D0], gl.float32, o_layout)
    dv0 = gl.zeros([ROWS, D0], gl.float32, o_layout)
    dk1 = gl.zeros([ROWS, DX], gl.float32, x_layout)
    dv1 = gl.zeros([ROWS, DX], gl.float32, x_layout)
    places = gl.arange(0, BM, gl.SliceLayout(0, s_layout))
    nothing = gl.zeros([ROWS, BM], gl.float32, s_layout)

    for n in range(0, last):
        stage = n % STAGES
        at = head + gl.load(READERS + n // SPANS) * PQ + n % SPANS * BM
        lse = gl.load(LSE + at + places)
        delta = gl.load(DELTA + at + places)
        mbarrier.wait(full.index(stage), (n // STAGES) & 1)
        s = _product(k_buffers, q_buffers, stage, nothing, GROUP, D1)
        dp = _product(v_buffers, do_buffers, stage, nothing, GROUP, D1)
        s, dp = warpgroup_mma_wait(0, deps=[s, dp])
        if n + STAGES - 2 < last:
            feed(
                n + STAGES - 2, 0, READERS, q_maps, do_maps, q_buffers, do_buffers, full, free,
                head, head, PQ, BM, 0, D0, D1, STAGES, GROUP, GROUPS,
            )  # fmt: skip
        p = gl.exp2(s * scale_log2 - lse[None, :])
        weights = gl.convert_layout(p.to(dtype), operand)
        ds = gl.convert_layout((p * (dp - delta[None, :])).to(dtype), operand)
        dv0 = warpgroup_mma(weights, do_buffers[0].index(stage), dv0, is_async=True)
        dk0 = warpgroup_mma(ds, q_buffers[0].index(stage), dk0, is_async=True)
        if D1 > 0:
            dv1 = warpgroup_mma(weights, do_buffers[1].index(stage), dv1, is_async=True)
            dk1 = warpgroup_mma(ds, q_buffers[1].index(stage), dk1, is_async=True)
            dk0, dv0, dk1, dv1 = warpgroup_mma_wait(0, deps=[dk0, dv0, dk1, dv1])
        else:
            dk0, dv0 = warpgroup_mma_wait(0, deps=[dk0, dv0])
        mbarrier.arrive(free.index(stage), count=1)

    # A slot without a token was read like the others: what came of it is dropped here.
    tokens = PK
    if PERIOD > 0:
        tokens = gl.load(VALID + j % PERIOD)
    rows = column + gl.arange(0, ROWS, gl.SliceLayout(1, o_layout))
    c = gl.arange(0, D0, gl.SliceLayout(0, o_layout))
    holds = (rows < tokens)[:, None]
    _write_rows(DK, out_line, rows, c, gl.where(holds, dk0 * scale, 0.0), rows < PK, D)
    _write_rows(DV, out_line, rows, c, gl.where(holds, dv0, 0.0), rows < PK, D)
    if D1 > 0:
        rows = column + gl.arange(0, ROWS, gl.SliceLayout(1, x_layout))
        c = D0 + gl.arange(0, DX, gl.SliceLayout(0, x_layout))
        holds = (rows < tokens)[:, None]
        _write_rows(DK, out_line, rows, c, gl.where(holds, dk1 * scale, 0.0), rows < PK, D)
        _write_rows(DV, out_line, rows, c, gl.where(holds, dv1, 0.0), rows < PK, D)


@gluon.jit(
    do_not_specialize=[
        "B", "H", "G", "NQ", "NK", "entries", "lists_world", "k_world", "k_head", "v_world",
        "v_head",
    ]
)  # fmt: skip
@no_type_check
def key_gradient_kernel(
    K, V, LSE, DELTA, DK, DV, Q0, Q1, QT0, QT1, DO0, DO1, DOT0, DOT1, READERS, OFFSETS, VALID,
    B, H, G, NQ, NK, entries, lists_world, k_world, k_head, v_world, v_head, scale, scale_log2,
    PQ: gl.constexpr, PK: gl.constexpr, D: gl.constexpr, D0: gl.constexpr, D1: gl.constexpr,
    PERIOD: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """dK and dV; stages hold BM rows of q and do, which divide PQ."""
    STEP: gl.constexpr = ROWS * GROUPS
    PROGRAMS: gl.constexpr = (PK + STEP - 1) // STEP
    DX: gl.constexpr = at_least_16(D1)
    X_STAGES: gl.constexpr = STAGES if D1 > 0 else 1
    dtype: gl.constexpr = K.dtype.element_ty
    k_buffers = (
        gl.allocate_shared_memory(dtype, [GROUPS, ROWS, D0], shared(D0)),
        gl.allocate_shared_memory(dtype, [GROUPS, ROWS, DX], shared(DX)),
    )
    v_buffers = (
        gl.allocate_shared_memory(dtype, [GROUPS, ROWS, D0], shared(D0)),
        gl.allocate_shared_memory(dtype, [GROUPS, ROWS, DX], shared(DX)),
    )
    q_buffers = (
        gl.allocate_shared_memory(dtype, [STAGES, BM, D0], shared(D0)),
        gl.allocate_shared_memory(dtype, [X_STAGES, BM, DX], shared(DX)),
    )
    do_buffers = (
        gl.allocate_shared_memory(dtype, [STAGES, BM, D0], shared(D0)),
        gl.allocate_shared_memory(dtype, [X_STAGES, BM, DX], shared(DX)),
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=GROUPS)
        mbarrier.init(free.index(s), count=GROUPS)

    pid = gl.program_id(0)
    j = (pid // PROGRAMS) % NK
    b = (pid // (PROGRAMS * NK)) % B
    h = pid // (PROGRAMS * NK * B)
    bg = b * lists_world * G + gl.where(G > 1, h, 0)
    start = gl.load(OFFSETS + bg * (NK + 1) + j)
    last = (gl.load(OFFSETS + bg * (NK + 1) + j + 1) - start) * (PQ // BM)
    READERS += bg * entries + start
    head = (b * H + h) * NQ * PQ
    k_line = (b * k_world + h * k_head + j) * PK
    v_line = (b * v_world + h * v_head + j) * PK
    out_line = ((b * H + h) * NK + j) * PK
    column = pid % PROGRAMS * STEP
    q_maps, do_maps = (Q0, Q1, QT0, QT1), (DO0, DO1, DOT0, DOT1)
    if GROUPS == 1:
        _key_group(
            K, V, LSE, DELTA, DK, DV, READERS, VALID, q_maps, do_maps, k_buffers, v_buffers,
            q_buffers, do_buffers, full, free, k_line, v_line, out_line, head, j, column, last,
            scale, scale_log2, PQ, PK, D, D0, D1, PERIOD, BM, STAGES, 0, GROUPS,
        )  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (_key_group, (
                    K, V, LSE, DELTA, DK, DV, READERS, VALID, q_maps, do_maps, k_buffers, v_buffers,
                    q_buffers, do_buffers, full, free, k_line, v_line, out_line, head, j, column,
                    last, scale, scale_log2, PQ, PK, D, D0, D1, PERIOD, BM, STAGES, 0, GROUPS)),
                (_key_group, (
                    K, V, LSE, DELTA, DK, DV, READERS, VALID, q_maps, do_maps, k_buffers, v_buffers,
                    q_buffers, do_buffers, full, free, k_line, v_line, out_line, head, j, column,
                    last, scale, scale_log2, PQ, PK, D, D0, D1, PERIOD, BM, STAGES, 1, GROUPS)),
            ],
            [4], [EVEN_SPLIT],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_key_group, (
                    K, V, LSE, DELTA, DK, DV, READERS, VALID, q_maps, do_maps, k_buffers, v_buffers,
                    q_buffers, do_buffers, full, free, k_line, v_line, out_line, head, j, column,
                    last, scale, scale_log2, PQ, PK, D, D0, D1, PERIOD, BM, STAGES, 0, GROUPS)),
                (_key_group, (
                    K, V, LSE, DELTA, DK, DV, READERS, VALID, q_maps, do_maps, k_buffers, v_buffers,
                    q_buffers, do_buffers, full, free, k_line, v_line, out_line, head, j, column,
                    last, scale, scale_log2, PQ, PK, D, D0, D1, PERIOD, BM, STAGES, 1, GROUPS)),
                (_key_group, (
                    K, V, LSE, DELTA, DK, DV, READERS, VALID, q_maps, do_maps, k_buffers, v_buffers,
                    q_buffers, do_buffers, full, free, k_line, v_line, out_line, head, j, column,
                    last, scale, scale_log2, PQ, PK, D, D0, D1, PERIOD, BM, STAGES, 2, GROUPS)),
            ],
            [4, 4], [EVEN_SPLIT, EVEN_SPLIT],
        )  # fmt: skip


def suits(q: Tensor, k: Tensor) -> bool:
    """Whether these kernels go back where the forward's took the inputs."""
    PQ, PK, D = q.shape[3], k.shape[3], q.shape[4]
    tiles = hopper_query_tiles(PQ, PK, D), hopper_key_tiles(PQ, PK, D)
    return None not in tiles and PK > 32 and k.shape[0] == q.shape[0]


class Faster(NamedTuple):
    """Whether dQ, and dK with dV, take less time here than by the Triton kernels."""

    queries: bool
    keys: bool


def faster(PQ: int, PK: int) -> Faster:
    """What was timed on an H100 (`docs/log.md`): a warp group alone shares its loads with nobody,
    and tiles of 64 rows, where they fit blocks exactly, are Triton's best for dK and dV."""
    return Faster(PQ > 64, PQ % 64 != 0 or PK % 64 != 0)


def run_query_gradient(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    grad: Tensor, lse: Tensor, delta: Tensor, tiles: HopperTiles | None = None,
) -> Tensor:  # fmt: skip
    """dQ."""
    B, H, NQ, PQ, D = q.shape
    PK = k.shape[3]
    tiles = tiles or hopper_query_tiles(PQ, PK, D)
    assert tiles is not None
    D0, D1 = columns(D)
    keys, values, dq = blocks(k), blocks(v), torch.empty_like(q)
    query_gradient_kernel[(B * H * NQ * cdiv(PQ, 64 * tiles.groups),)](
        q, grad, lse, delta, dq, *boxes(keys, tiles.keys, 0),
        *boxes(values, tiles.keys, 0), lists, valid,
        B, H, lists.shape[1], NQ, lists.shape[-1],
        0 if lists.shape[0] == 1 else lists.stride(0),
        keys.world, keys.head, values.world, values.head, scale, scale * LOG2E,
        PQ=PQ, PK=PK, D=D, D0=D0, D1=D1, PERIOD=0 if valid is None else valid.shape[0],
        BN=tiles.keys, STAGES=tiles.stages, TURNS=tiles.turns, GROUPS=tiles.groups, num_warps=4,
    )  # fmt: skip
    return dq


def run_key_gradient(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None, scale: float,
    grad: Tensor, lse: Tensor, delta: Tensor, tiles: HopperTiles | None = None,
    inverse: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dK and dV."""
    B, H, NQ, PQ, D = q.shape
    NK, PK = k.shape[2:4]
    tiles = tiles or hopper_key_tiles(PQ, PK, D)
    assert tiles is not None
    readers, offsets = inverse or inverse_lists(lists, NK)
    D0, D1 = columns(D)
    keys, values = blocks(k), blocks(v)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    key_gradient_kernel[(B * H * NK * cdiv(PK, 64 * tiles.groups),)](
        keys.tensor, values.tensor, lse, delta, dk, dv, *boxes(blocks(q), tiles.keys, 0),
        *boxes(blocks(grad), tiles.keys, 0), readers, offsets, valid,
        B, H, lists.shape[1], NQ, NK, readers.shape[-1], int(lists.shape[0] > 1),
        keys.world, keys.head, values.world, values.head, scale, scale * LOG2E,
        PQ=PQ, PK=PK, D=D, D0=D0, D1=D1, PERIOD=0 if valid is None else valid.shape[0],
        BM=tiles.keys, STAGES=tiles.stages, GROUPS=tiles.groups, num_warps=4,
    )  # fmt: skip
    return dk, dv
