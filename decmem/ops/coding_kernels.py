"""Coding of heads in Triton: between projections and attention in one pass, and back in another.

`encode_heads` takes the fused projection of queries, keys and values, norms queries and keys, codes
their channels by position and puts heads first, or leaves them last. `decode_heads` undoes the
position on what was read, weighs the global branch by the gate, adds the local one and puts heads
last. Heads lie in slots; projections and gates are of tokens, which may be fewer (PACKED): then
SOURCE tells the token of each slot and KEPT the slot of each token. Arithmetic is fp32, each number
is read and written once, and nothing but the operands is kept for gradients. What is computed, in
plain PyTorch: `decmem.memory.coding`.

A head's channels lie in groups, camera | space | surface | time. Camera channels are multiplied by
a matrix, four by four; those of another group are turned in pairs, (i, i + half). On the way there
a program takes some heads of one token, which share its rotation; for gradients, a tile of tokens,
whose rotations it holds while it walks the heads. No atomics: the same bits every time.
`no_type_check` keeps the tests' run-time shape checks off the kernels, whose source Triton reads.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _pairs(d, CAMERA: tl.constexpr, SPACE: tl.constexpr, SURFACE: tl.constexpr, TIME: tl.constexpr):
    """Of each channel: its partner, 1 where it comes first and -1 where second, and its pair."""
    SURFACE_AT: tl.constexpr = CAMERA + SPACE
    TIME_AT: tl.constexpr = CAMERA + SPACE + SURFACE
    start = tl.where(d < SURFACE_AT, CAMERA, tl.where(d < TIME_AT, SURFACE_AT, TIME_AT))
    half = tl.where(d < SURFACE_AT, SPACE // 2, tl.where(d < TIME_AT, SURFACE // 2, TIME // 2))
    first = d - start < half
    partner = tl.where(first, d + half, d - half)
    turned = (d >= CAMERA) & (d < TIME_AT + TIME)
    pair = tl.where(first, d, partner) - start
    return tl.where(turned, partner, 0), tl.where(first, 1.0, -1.0), tl.where(turned, pair, 0)


@triton.jit
@no_type_check
def _turn(
    cos, sin, TABLE_COS, TABLE_SIN, row, pair, inside, ok, PAIRS: tl.constexpr
):  # fmt: skip
    """Cosines and sines of one group's channels, put among those of the others."""
    at = row[:, None] * PAIRS + pair[None, :]
    here = ok[:, None] & inside[None, :]
    cos = tl.where(inside[None, :], tl.load(TABLE_COS + at, mask=here, other=1.0), cos)
    sin = tl.where(inside[None, :], tl.load(TABLE_SIN + at, mask=here, other=0.0), sin)
    return cos, sin


@triton.jit
@no_type_check
def _turns(
    SPACE_COS, SPACE_SIN, SURFACE_COS, SURFACE_SIN, n, s, d, pair, ok,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
    CAMERA: tl.constexpr, SPACE: tl.constexpr, SURFACE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of all channels, the time group at rest."""
    SURFACE_AT: tl.constexpr = CAMERA + SPACE
    cos = tl.full((ROWS, WIDTH), 1.0, tl.float32)
    sin = tl.zeros((ROWS, WIDTH), tl.float32)
    if SPACE > 0:
        inside = (d >= CAMERA) & (d < SURFACE_AT)
        cos, sin = _turn(cos, sin, SPACE_COS, SPACE_SIN, s, pair, inside, ok, SPACE // 2)
    if TURNED and SURFACE > 0:
        inside = (d >= SURFACE_AT) & (d < SURFACE_AT + SURFACE)
        cos, sin = _turn(cos, sin, SURFACE_COS, SURFACE_SIN, n, pair, inside, ok, SURFACE // 2)
    return cos, sin


@triton.jit
@no_type_check
def _load(P, row, d, ok, D: tl.constexpr):
    """Channels `d` of the rows that begin at `row`, fp32."""
    here = ok[:, None] & (d < D)[None, :]
    return tl.load(P + row[:, None] + d[None, :], mask=here, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _store(P, row, d, x, ok, inside):
    here = ok[:, None] & inside[None, :]
    tl.store(P + row[:, None] + d[None, :], x.to(P.dtype.element_ty), mask=here)


@triton.jit
@no_type_check
def _entries(MATRIX, bt, e, j: tl.constexpr, ok, CAMERA: tl.constexpr, ACROSS: tl.constexpr):
    """Of the matrix of each token, for each camera channel i the entry (i, j), or (j, i)."""
    i = e % 4
    at = bt[:, None] * 16 + (j * 4 + i if ACROSS else i * 4 + j)[None, :]
    return tl.load(MATRIX + at, mask=ok[:, None] & (e < CAMERA)[None, :], other=0.0)


@triton.jit
@no_type_check
def _matrix(MATRIX, bt, e, ok, CAMERA: tl.constexpr, ACROSS: tl.constexpr):
    """All of it, or of its transpose (`ACROSS`), by column."""
    return (
        _entries(MATRIX, bt, e, 0, ok, CAMERA, ACROSS),
        _entries(MATRIX, bt, e, 1, ok, CAMERA, ACROSS),
        _entries(MATRIX, bt, e, 2, ok, CAMERA, ACROSS),
        _entries(MATRIX, bt, e, 3, ok, CAMERA, ACROSS),
    )


@triton.jit
@no_type_check
def _quads(P, row, columns, e, ok, CAMERA: tl.constexpr):
    """The camera channels times the matrix."""
    quad = e // 4 * 4
    out = _load(P, row, quad, ok, CAMERA) * columns[0]
    for j in tl.static_range(1, 4):
        out += _load(P, row, quad + j, ok, CAMERA) * columns[j]
    return out


@triton.jit
@no_type_check
def _place(bt, s, T, S, H, D: tl.constexpr, HEADS_LAST: tl.constexpr):
    """Where a token's first head lies, and the step from head to head."""
    bt = bt.to(tl.int64)
    if HEADS_LAST:
        first, step = (bt * S + s) * H * D, D
    else:
        first, step = ((bt // T * H * T + bt % T) * S + s) * D, T * S * D
    return first, step


@triton.jit
@no_type_check
def _token_of(SOURCE, bt, s, TOKENS, ok, PACKED: tl.constexpr):
    """Of slots their tokens, counted over all latents."""
    if PACKED:
        s = tl.load(SOURCE + s, mask=ok, other=0).to(tl.int32)
    return bt * TOKENS + s


@triton.jit
@no_type_check
def _slot_of(KEPT, n, TOKENS, ok, PACKED: tl.constexpr):
    """Of tokens, counted over all latents, their latents and their slots there."""
    bt, s = n // TOKENS, n % TOKENS
    if PACKED:
        s = tl.load(KEPT + s, mask=ok, other=0).to(tl.int32)
    return bt, s


@triton.jit
@no_type_check
def _encode_kernel(
    QKV, GAINS, QUERY_MATRIX, KEY_MATRIX, SPACE_COS, SPACE_SIN, SURFACE_COS, SURFACE_SIN,
    TIME_COS, TIME_SIN, SOURCE, Q, K, V, LOCAL_Q, LOCAL_K, N, T, S, TOKENS, H,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr,
    CAMERA: tl.constexpr, SPACE: tl.constexpr, SURFACE: tl.constexpr, TIME: tl.constexpr,
    TURNED: tl.constexpr, NORMED: tl.constexpr, TIMED: tl.constexpr, LOCAL: tl.constexpr,
    VALUES: tl.constexpr, HEADS_LAST: tl.constexpr, PACKED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) + tl.arange(0, 1)
    h = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ok, live = n < N, h < H
    bt, s = n // S, n % S
    t = bt % T
    d, e = tl.arange(0, WIDTH), tl.arange(0, E)
    partner, sign, pair = _pairs(d, CAMERA, SPACE, SURFACE, TIME)
    behind, ahead = (d >= CAMERA) & (d < D), e < CAMERA
    cos, sin = _turns(
        SPACE_COS, SPACE_SIN, SURFACE_COS, SURFACE_SIN, n, s, d, pair, ok,
        1, WIDTH, CAMERA, SPACE, SURFACE, TURNED,
    )  # fmt: skip
    sin *= sign[None, :]
    timed_cos, timed_sin = cos, sin
    if TIMED or LOCAL:
        inside = (d >= D - TIME) & (d < D)
        timed_cos, timed_sin = _turn(
            cos, sin * sign[None, :], TIME_COS, TIME_SIN, t, pair, inside, ok, TIME // 2
        )
        timed_sin *= sign[None, :]
    if CAMERA > 0:
        of_queries = _matrix(QUERY_MATRIX, bt, e, ok, CAMERA, True)
        of_keys = _matrix(KEY_MATRIX, bt, e, ok, CAMERA, False)
    source = _token_of(SOURCE, bt, s, TOKENS, ok, PACKED).to(tl.int64) * (3 * H * D)
    target, step = _place(bt, s, T, S, H, D, HEADS_LAST)
    place, first = target + h * step, source + h * D
    # All reading from afar begins before the first store, behind which no load may slip.
    own_q = _load(QKV, first, d, live, D)
    own_k = _load(QKV, first + H * D, d, live, D)
    own_v = _load(QKV, first + 2 * H * D, d, live, D)
    for part in tl.static_range(3):
        row = first + part * H * D
        own = own_q if part == 0 else own_k if part == 1 else own_v
        other = _load(QKV, row, partner, live, D)
        size = tl.full((ROWS,), 1.0, tl.float32)
        if NORMED and part < 2:
            gain = tl.load(GAINS + part * H + h, mask=live, other=0.0)
            size = tl.rsqrt(tl.sum(own * own, 1) / D + EPS) * gain
        OUT = Q if part == 0 else K if part == 1 else V
        if part == 2 and not VALUES:
            _store(OUT, place, d, own, live, d < D)
        else:
            if TIMED and part < 2:
                x = (own * timed_cos + other * timed_sin) * size[:, None]
            else:
                x = (own * cos + other * sin) * size[:, None]
            _store(OUT, place, d, x, live, behind)
            if LOCAL and part < 2:
                x = (own * timed_cos + other * timed_sin) * size[:, None]
                _store(LOCAL_Q if part == 0 else LOCAL_K, place, d, x, live, behind)
            if CAMERA > 0:
                x = _quads(QKV, row, of_queries if part == 0 else of_keys, e, live, CAMERA)
                x *= size[:, None]
                _store(OUT, place, e, x, live, ahead)
                if LOCAL and part < 2:
                    _store(LOCAL_Q if part == 0 else LOCAL_K, place, e, x, live, ahead)


@triton.jit
@no_type_check
def _encode_gradient_kernel(
    QKV, GAINS, QUERY_MATRIX, KEY_MATRIX, SPACE_COS, SPACE_SIN, SURFACE_COS, SURFACE_SIN,
    TIME_COS, TIME_SIN, KEPT, Q, K, V, LOCAL_Q, LOCAL_K, OUT, GAIN_PARTS, COS_GRAD, SIN_GRAD,
    N, T, S, TOKENS, H,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr,
    CAMERA: tl.constexpr, SPACE: tl.constexpr, SURFACE: tl.constexpr, TIME: tl.constexpr,
    TURNED: tl.constexpr, NORMED: tl.constexpr, TIMED: tl.constexpr, LOCAL: tl.constexpr,
    VALUES: tl.constexpr, HEADS_LAST: tl.constexpr, PACKED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Q, K, V, LOCAL_Q and LOCAL_K are gradients here, and rows are tokens, not slots; everything
    else as in `_encode_kernel`."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = n < N
    bt, s = _slot_of(KEPT, n, TOKENS, ok, PACKED)
    t, slot = bt % T, bt * S + s
    d, e = tl.arange(0, WIDTH), tl.arange(0, E)
    partner, sign, pair = _pairs(d, CAMERA, SPACE, SURFACE, TIME)
    behind, ahead = (d >= CAMERA) & (d < D), e < CAMERA
    cos, sin = _turns(
        SPACE_COS, SPACE_SIN, SURFACE_COS, SURFACE_SIN, slot, s, d, pair, ok,
        ROWS, WIDTH, CAMERA, SPACE, SURFACE, TURNED,
    )  # fmt: skip
    sin *= sign[None, :]
    timed_cos, timed_sin = cos, sin
    if TIMED or LOCAL:
        inside = (d >= D - TIME) & (d < D)
        timed_cos, timed_sin = _turn(
            cos, sin * sign[None, :], TIME_COS, TIME_SIN, t, pair, inside, ok, TIME // 2
        )
        timed_sin *= sign[None, :]
    if CAMERA > 0:
        of_queries = _matrix(QUERY_MATRIX, bt, e, ok, CAMERA, False)
        of_keys = _matrix(KEY_MATRIX, bt, e, ok, CAMERA, True)
    cos_grad = tl.zeros((ROWS, WIDTH), tl.float32)
    sin_grad = tl.zeros((ROWS, WIDTH), tl.float32)
    source = n.to(tl.int64) * (3 * H * D)
    target, step = _place(bt, s, T, S, H, D, HEADS_LAST)
    for h in range(H):
        for part in tl.static_range(3):
            row = source + (part * H + h) * D
            place = target + h * step
            GRAD = Q if part == 0 else K if part == 1 else V
            grad = _load(GRAD, place, d, ok, D)
            if part == 2 and not VALUES:
                _store(OUT, row, d, grad, ok, d < D)
            else:
                grad_other = _load(GRAD, place, partner, ok, D)
                # A rotation back, where the way there went against its sense.
                if TIMED and part < 2:
                    dx = grad * timed_cos - grad_other * timed_sin
                else:
                    dx = grad * cos - grad_other * sin
                if CAMERA > 0:
                    columns = of_queries if part == 0 else of_keys
                    dx_ahead = _quads(GRAD, place, columns, e, ok, CAMERA)
                if LOCAL and part < 2:
                    FROM = LOCAL_Q if part == 0 else LOCAL_K
                    local = _load(FROM, place, d, ok, D)
                    local_other = _load(FROM, place, partner, ok, D)
                    dx += local * timed_cos - local_other * timed_sin
                    grad += local
                    if CAMERA > 0:
                        dx_ahead += _quads(FROM, place, columns, e, ok, CAMERA)
                dx = tl.where(behind[None, :], dx, 0.0)
                if (NORMED and part < 2) or (TURNED and SURFACE > 0):
                    own = _load(QKV, row, d, ok, D)
                size = tl.full((ROWS,), 1.0, tl.float32)
                if NORMED and part < 2:
                    gain = tl.load(GAINS + part * H + h)
                    shrink = tl.rsqrt(tl.sum(own * own, 1) / D + EPS)
                    size = shrink * gain
                    along = tl.sum(dx * own, 1)
                    if CAMERA > 0:
                        own_ahead = _load(QKV, row, e, ok, CAMERA)
                        along += tl.sum(dx_ahead * own_ahead, 1)
                    at = (tl.program_id(0) * 2 + part) * H + h
                    tl.store(GAIN_PARTS + at, tl.sum(along * shrink))
                    along = along * shrink * shrink / D
                if TURNED and SURFACE > 0:
                    other = _load(QKV, row, partner, ok, D)
                    cos_grad += grad * own * size[:, None]
                    sin_grad += grad * other * size[:, None]
                if NORMED and part < 2:
                    dx -= own * along[:, None]
                _store(OUT, row, d, dx * size[:, None], ok, behind)
                if CAMERA > 0:
                    if NORMED and part < 2:
                        dx_ahead -= own_ahead * along[:, None]
                    _store(OUT, row, e, dx_ahead * size[:, None], ok, ahead)
    if TURNED and SURFACE > 0:
        SURFACE_AT: tl.constexpr = CAMERA + SPACE
        inside = (d >= SURFACE_AT) & (d < SURFACE_AT + SURFACE)
        at = slot.to(tl.int64) * SURFACE - SURFACE_AT
        _store(COS_GRAD, at, d, cos_grad, ok, inside)
        _store(SIN_GRAD, at, d, sin_grad * sign[None, :], ok, inside)


@triton.jit
@no_type_check
def _open(GATE, nh, c, ok, C: tl.constexpr, PER_HEAD: tl.constexpr):
    """How far the gate is open for channels `c` of heads `nh` of all tokens."""
    if PER_HEAD:
        z = tl.load(GATE + nh, mask=ok, other=0.0).to(tl.float32)[:, None]
        return tl.sigmoid(tl.broadcast_to(z, (nh.shape[0], c.shape[0])))
    return tl.sigmoid(_load(GATE, nh * C, c, ok, C))


@triton.jit
@no_type_check
def _decode_kernel(
    LOCAL, FAR, GATE, MATRIX, SPACE_COS, SPACE_SIN, SURFACE_COS, SURFACE_SIN, KEPT, OUT,
    N, T, S, TOKENS, H,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr,
    CAMERA: tl.constexpr, SPACE: tl.constexpr, SURFACE: tl.constexpr, TIME: tl.constexpr,
    TURNED: tl.constexpr, GATED: tl.constexpr, PER_HEAD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) + tl.arange(0, 1)
    h = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    ok, live = n < N, h < H
    bt, s = _slot_of(KEPT, n, TOKENS, ok, PACKED)
    d, e = tl.arange(0, WIDTH), tl.arange(0, E)
    partner, sign, pair = _pairs(d, CAMERA, SPACE, SURFACE, TIME)
    behind, ahead = (d >= CAMERA) & (d < D), e < CAMERA
    cos, sin = _turns(
        SPACE_COS, SPACE_SIN, SURFACE_COS, SURFACE_SIN, bt * S + s, s, d, pair, ok,
        1, WIDTH, CAMERA, SPACE, SURFACE, TURNED,
    )  # fmt: skip
    sin *= sign[None, :]
    if CAMERA > 0:
        columns = _matrix(MATRIX, bt, e, ok, CAMERA, False)
    target, step = _place(bt, s, T, S, H, D, False)
    row, nh = target + h * step, n.to(tl.int64) * H + h
    x = _load(LOCAL, row, d, live, D) * cos - _load(LOCAL, row, partner, live, D) * sin
    if GATED:
        far = _load(FAR, row, d, live, D) * cos - _load(FAR, row, partner, live, D) * sin
        x += _open(GATE, nh, d, live, D, PER_HEAD) * far
    _store(OUT, nh * D, d, x, live, behind)
    if CAMERA > 0:
        x = _quads(LOCAL, row, columns, e, live, CAMERA)
        if GATED:
            far = _quads(FAR, row, columns, e, live, CAMERA)
            x += _open(GATE, nh, e, live, D, PER_HEAD) * far
        _store(OUT, nh * D, e, x, live, ahead)


@triton.jit
@no_type_check
def _decode_gradient_kernel(
    LOCAL, FAR, GATE, MATRIX, SPACE_COS, SPACE_SIN, SURFACE_COS, SURFACE_SIN, KEPT, GRAD,
    LOCAL_GRAD, FAR_GRAD, GATE_GRAD, COS_GRAD, SIN_GRAD, N, T, S, TOKENS, H,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr,
    CAMERA: tl.constexpr, SPACE: tl.constexpr, SURFACE: tl.constexpr, TIME: tl.constexpr,
    TURNED: tl.constexpr, GATED: tl.constexpr, PER_HEAD: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = n < N
    bt, s = _slot_of(KEPT, n, TOKENS, ok, PACKED)
    slot = bt * S + s
    d, e = tl.arange(0, WIDTH), tl.arange(0, E)
    partner, sign, pair = _pairs(d, CAMERA, SPACE, SURFACE, TIME)
    behind, ahead = (d >= CAMERA) & (d < D), e < CAMERA
    cos, sin = _turns(
        SPACE_COS, SPACE_SIN, SURFACE_COS, SURFACE_SIN, slot, s, d, pair, ok,
        ROWS, WIDTH, CAMERA, SPACE, SURFACE, TURNED,
    )  # fmt: skip
    sin *= sign[None, :]
    cos_grad = tl.zeros((ROWS, WIDTH), tl.float32)
    sin_grad = tl.zeros((ROWS, WIDTH), tl.float32)
    if CAMERA > 0:
        columns = _matrix(MATRIX, bt, e, ok, CAMERA, False)
        rows = _matrix(MATRIX, bt, e, ok, CAMERA, True)
    n = n.to(tl.int64)
    quad = e // 4 * 4
    for h in range(H):
        row = (((bt // T).to(tl.int64) * H + h) * T + bt % T) * S * D + s * D
        nh = n * H + h
        place = nh * D
        grad = _load(GRAD, place, d, ok, D)
        grad_other = _load(GRAD, place, partner, ok, D)
        _store(LOCAL_GRAD, row, d, grad * cos + grad_other * sin, ok, behind)
        if CAMERA > 0:
            dx = _quads(GRAD, place, rows, e, ok, CAMERA)
            _store(LOCAL_GRAD, row, e, dx, ok, ahead)
        if TURNED and SURFACE > 0:
            cos_grad += grad * _load(LOCAL, row, d, ok, D)
            sin_grad += grad * _load(LOCAL, row, partner, ok, D)
        if GATED:
            own, other = _load(FAR, row, d, ok, D), _load(FAR, row, partner, ok, D)
            wide = _open(GATE, nh, d, ok, D, PER_HEAD)
            behind_gate = grad * (own * cos - other * sin) * wide * (1.0 - wide)
            grad_other *= _open(GATE, nh, partner, ok, D, PER_HEAD)
            grad *= wide
            _store(FAR_GRAD, row, d, grad * cos + grad_other * sin, ok, behind)
            if TURNED and SURFACE > 0:
                cos_grad += grad * own
                sin_grad += grad * other
            if CAMERA > 0:
                wide = _open(GATE, nh, e, ok, D, PER_HEAD)
                far = _quads(FAR, row, columns, e, ok, CAMERA)
                ahead_gate = _load(GRAD, place, e, ok, CAMERA) * far * wide * (1.0 - wide)
                dx = tl.zeros((ROWS, E), tl.float32)
                for j in tl.static_range(4):
                    g = _load(GRAD, place, quad + j, ok, CAMERA)
                    g *= _open(GATE, nh, quad + j, ok, D, PER_HEAD)
                    dx += g * rows[j]
                _store(FAR_GRAD, row, e, dx, ok, ahead)
            if PER_HEAD:
                total = tl.sum(tl.where(behind[None, :], behind_gate, 0.0), 1)
                if CAMERA > 0:
                    total += tl.sum(tl.where(ahead[None, :], ahead_gate, 0.0), 1)
                tl.store(GATE_GRAD + n * H + h, total.to(GATE_GRAD.dtype.element_ty), mask=ok)
            else:
                _store(GATE_GRAD, place, d, behind_gate, ok, behind)
                if CAMERA > 0:
                    _store(GATE_GRAD, place, e, ahead_gate, ok, ahead)
    if TURNED and SURFACE > 0:
        SURFACE_AT: tl.constexpr = CAMERA + SPACE
        inside = (d >= SURFACE_AT) & (d < SURFACE_AT + SURFACE)
        at = slot.to(tl.int64) * SURFACE - SURFACE_AT
        _store(COS_GRAD, at, d, cos_grad, ok, inside)
        _store(SIN_GRAD, at, d, -sin_grad * sign[None, :], ok, inside)
