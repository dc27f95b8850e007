"""What the kernels of block-sparse attention must know of their inputs, and the tiles they use."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = math.log2(math.e)


class ForwardTiles(NamedTuple):
    """A program has `tiles` tiles of `rows` query rows; a step has `keys` + `tail` keys."""

    rows: int
    tiles: int
    keys: int
    tail: int
    warps: int
    stages: int


class QueryTiles(NamedTuple):
    """Of dQ: as in the forward, without a tail."""

    rows: int
    tiles: int
    keys: int
    warps: int
    stages: int


class KeyTiles(NamedTuple):
    """Of dK and dV: a program has `keys` keys; a step has `rows` query rows."""

    rows: int
    keys: int
    warps: int
    stages: int


class HopperTiles(NamedTuple):
    """A stage holds `keys` + `tail` keys, read in `pieces` steps; `groups` of 64 rows share it.

    With `turns`, the groups take turns at the tensor cores (forward and dQ).
    """

    keys: int
    tail: int
    pieces: int
    stages: int
    groups: int
    turns: bool = False


class CudaTiles(NamedTuple):
    """A step has `span` keys, or `brief` where its span holds no more tokens; constants of
    `sparse_cuda.cu`."""

    span: int
    brief: int
    groups: int
    stages: int
    ahead: bool

    def shared_bytes(self, D: int) -> int:
        """Shared memory of a program, without its list."""
        rest = rest_columns(D)
        stage = self.span * (128 + 2 * rest + (256 if rest else 128))
        return self.groups * 64 * (128 + 2 * rest) + self.stages * (stage + 32) + 2048

    def room(self, D: int) -> int:
        """Bytes that are left for the list."""
        return 227 * 1024 - self.shared_bytes(D)


class Blocks(NamedTuple):
    """A tensor of blocks (B, H, N, P, D) as kernels see it: strides in blocks, 0 where shared."""

    tensor: Tensor
    world: int
    head: int


def blocks(x: Tensor) -> Blocks:
    """`x` itself where each block lies in one piece (any part of a bank does), else a copy."""
    B, H, N, P, D = x.shape
    world, head, block, row, column = x.stride()
    size = P * D
    whole = column == 1 and (P == 1 or row == D) and (N == 1 or block == size)
    apart = (B == 1 or world % size == 0) and (H == 1 or head % size == 0)
    if not (whole and apart):
        x = x.contiguous()
        world, head = H * N * size, N * size
    return Blocks(x, 0 if B == 1 else world // size, 0 if H == 1 else head // size)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power(n: int, least: int = 16) -> int:
    """The power of two from `n` up, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def columns(D: int) -> tuple[int, int]:
    """Head dim `D` as the sum of two powers of two that hold it, or of one and nothing."""
    single = power(D)
    first = single // 2
    second = power(max(1, D - first))
    return (first, second) if first >= 16 and first + second < single else (single, 0)


def mask_of(valid: Tensor | None) -> tuple[int, int]:
    """MASK and PERIOD of the Triton kernels."""
    if valid is None:
        return 0, 1
    return (2 if valid.dtype == torch.bool else 1), valid.shape[0]


def split_of(programs: int, device: torch.device) -> int:
    """Parts the Triton forward cuts lists into, so that the last programs do not leave most of the
    GPU idle.

    `programs`: how many there are without cutting, as if one filled a multiprocessor.
    """
    if device.type != "cuda":
        return 1
    waves = programs / torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if waves > 6 else 2 if waves > 1.5 else 4


def _warps(rows: int) -> int:
    # Four warps, 64 rows: a warp group. Fewer rows want fewer warps, so that none shares a row.
    return 4 if rows >= 64 else 2 if rows >= 32 else 1


def _row_tiles(tokens: int, rows: int, most: int) -> int:
    """Tiles a program should own: as many as useful, none in vain."""
    needed = cdiv(tokens, rows)
    return min(range(min(most, needed), 0, -1), key=lambda n: cdiv(needed, n) * n)


def forward_tiles(PQ: int, PK: int, D: int, element_size: int) -> ForwardTiles:
    """The default of the Triton forward."""
    rows = min(64, power(PQ))
    if element_size > 2 or D > 128:
        return ForwardTiles(rows, 1, 32, 0, _warps(rows), 2)
    if PK <= 16:
        return ForwardTiles(rows, 1, 32, 0, _warps(rows), 4)
    if PK < 64:
        return ForwardTiles(rows, 1, 64, 0, _warps(rows), 3)
    if D > 96 and PQ % 128 == 0 and PK % 128 == 0:
        return ForwardTiles(128, 1, 128, 0, 8, 2)
    tiles = _row_tiles(PQ, rows, 3 if D <= 80 else 1 if D <= 96 else 2)
    keys, tail = next(
        ((64, t) for t in (0, 16, 32) if PK % (64 + t) == 0), (32, 0) if PK % 32 == 0 else (64, 0)
    )
    return ForwardTiles(rows, tiles, keys, tail, _warps(rows), 3)


def query_tiles(PQ: int, PK: int, D: int, element_size: int) -> QueryTiles:
    """The default of dQ."""
    rows = min(64, power(PQ))
    if element_size > 2 or D > 128:
        return QueryTiles(rows, 1, 16 if D > 64 else 32, _warps(rows), 2)
    if PK < 64:
        return QueryTiles(rows, 1, 64, _warps(rows), 2)
    tiles = _row_tiles(PQ, rows, 3 if D <= 80 else 2)
    return QueryTiles(rows, tiles, 64 if PK % 64 == 0 else 32, _warps(rows), 2)


def key_tiles(PQ: int, PK: int, D: int, element_size: int) -> KeyTiles:
    """The default of dK and dV."""
    keys = min(64, power(PK))
    if element_size > 2 or D > 128:
        return KeyTiles(16 if D > 64 else 32, keys, _warps(keys), 2)
    if PQ < 64:
        return KeyTiles(64, keys, max(2, _warps(keys)), 2)
    return KeyTiles(64 if PQ % 64 == 0 else 32, keys, _warps(keys), 2)


# What a program may use of a multiprocessor's shared memory, less a little for barriers.
_SHARED_BYTES = 225 * 1024

# Programs of one warp group are small enough for so many to run side by side.
_PER_MULTIPROCESSOR = 3

# What putting parts of lists together costs a program, in slots of keys.
_MERGE = 460


def hopper_split_of(programs: int, groups: int, slots: int, device: torch.device) -> int:
    """Parts the forward for Hopper GPUs cuts lists into: as few rounds of programs as may be.

    `slots`: of keys that a list names. Programs of two and three warp groups fill a
    multiprocessor, so that 576 of them leave 132 multiprocessors idle for most of a fifth round,
    but parts of half their length end halfway through it.
    """
    if device.type != "cuda":
        return 1
    room = torch.cuda.get_device_properties(device).multi_processor_count
    room *= _PER_MULTIPROCESSOR if groups == 1 else 1
    merging = _MERGE * programs / room / slots
    return min((1, 2, 3, 4), key=lambda n: cdiv(programs * n, room) / n + (merging if n > 1 else 0))


def _ring(rows: int, own: int, width: int, groups: int, most: int) -> int:
    """Stages of `rows` rows of two tensors that fit beside `own` rows a group."""
    room = _SHARED_BYTES // (_PER_MULTIPROCESSOR if groups == 1 else 1) - groups * own * width * 2
    return min(most, max(3, room // (2 * rows * width * 2)))


def hopper_tiles(PQ: int, PK: int, D: int) -> HopperTiles | None:
    """The default for warp groups, or None where blocks do not suit them."""
    groups, width = _row_tiles(PQ, 64, 3), sum(columns(D))
    if PK % 160 == 0 and PK % 64 and width <= 80 and groups > 1:
        return HopperTiles(128, 32, 2, 3, groups)
    for keys, tail in ((64, 0), (64, 16)):
        if PK % (keys + tail) == 0:
            stages = _ring(keys + tail, 64, width, groups, 6)
            return HopperTiles(keys, tail, 1, stages, groups)
    return None


def hopper_query_tiles(PQ: int, PK: int, D: int) -> HopperTiles | None:
    """The same for dQ. Three groups have registers for 32 keys at a time, two for 64."""
    groups, width = _row_tiles(PQ, 64, 3), sum(columns(D))
    keys = 64 if groups < 3 and PK % 64 == 0 else 32
    if PK % keys:
        return None
    return HopperTiles(keys, 0, 1, _ring(keys, 128, width, groups, 8), groups)


def hopper_key_tiles(PQ: int, PK: int, D: int) -> HopperTiles | None:
    """The same for dK and dV, where groups own keys and `keys` are rows of queries."""
    groups, width = _row_tiles(PK, 64, 3), sum(columns(D))
    rows = 64 if groups < 3 and D <= 64 and PQ % 64 == 0 else 32
    if PQ % rows:
        return None
    return HopperTiles(rows, 0, 1, _ring(rows, 128, width, groups, 8), groups)


def rest_columns(D: int) -> int:
    """Columns beyond the first 64 as `sparse_cuda.cu` stores them."""
    return 0 if D <= 64 else 16 if D <= 80 else 32 if D <= 96 else 64


def cuda_tiles(PQ: int, PK: int, D: int, masked: bool) -> CudaTiles | None:
    """The default of the forward in CUDA C++, or None where blocks do not suit it.

    Three groups have 168 registers a thread, for two steps' scores and a row's sums where those of
    the next keys are computed ahead.
    """
    groups = _row_tiles(PQ, 64, 3)
    for span, ahead in ((80, True), (64, groups < 3), (96, False), (80, False), (64, False)):
        if PK % span or (ahead and groups == 3 and D > 80):
            continue
        brief = span - 16 if ahead and masked else span
        for stages in (4,) if ahead else (4, 2):
            tiles = CudaTiles(span, brief, groups, stages, ahead)
            if tiles.room(D) >= 8192:
                return tiles
    return None
