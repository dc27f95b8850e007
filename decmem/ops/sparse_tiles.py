"""What the kernels of block-sparse attention must know of their inputs, and the tiles they use."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = math.log2(math.e)

MOST_SHARED_BYTES = 227 * 1024
"""Shared memory of a program, at most, on a Hopper GPU."""


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


class CudaTiles(NamedTuple):
    """Of the forward in CUDA C++: a step has `span` keys, copied `unit` at a time; constants of
    `sparse_cuda.cu`."""

    span: int
    unit: int
    groups: int
    stages: int
    held: bool

    @property
    def heights(self) -> range:
        """Keys that one copy can bring."""
        return range(self.unit, self.span + 1, self.unit)

    def shared_bytes(self, D: int) -> int:
        """Shared memory of a program, without its list."""
        rest = rest_columns(D)
        stage = self.span * (128 + 2 * rest + (256 if rest else 128))
        queries = 0 if self.held else self.groups * 64 * (128 + 2 * rest)
        return queries + self.stages * (stage + 48) + 3072

    def room(self, D: int) -> int:
        """Bytes that are left for the list."""
        return MOST_SHARED_BYTES - self.shared_bytes(D)


class CudaQueryTiles(NamedTuple):
    """The same of dQ; constants of `sparse_query_gradient_cuda.cu`."""

    span: int
    unit: int
    groups: int
    stages: int

    @property
    def heights(self) -> range:
        """Keys that one copy can bring."""
        return range(self.unit, self.span + 1, self.unit)

    def shared_bytes(self, D: int) -> int:
        """Shared memory of a program, without its list."""
        rest = rest_columns(D)
        stage = self.span * (256 + 2 * rest + (128 if rest else 0))
        return self.groups * 64 * (128 + 2 * rest) + self.stages * (stage + 32) + 4096

    def room(self, D: int) -> int:
        """Bytes that are left for the list."""
        return MOST_SHARED_BYTES - self.shared_bytes(D)


class CudaKeyTiles(NamedTuple):
    """Of dK and dV: a step has `span` queries; constants of `sparse_key_gradient_cuda.cu`."""

    span: int
    groups: int
    stages: int

    def shared_bytes(self, PK: int, D: int) -> int:
        """Shared memory of a program."""
        rest = rest_columns(D)
        own = -(-2 * PK * (128 + 2 * rest) // 1024) * 1024
        stage = self.span * (256 + (256 if rest else 0) + 8)
        return 2 * own + self.stages * (stage + 16) + 96 + 1024


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


# Programs of one warp group are small enough for so many to run side by side.
_PER_MULTIPROCESSOR = 2

# What putting parts of lists together costs a program, in slots of keys.
_MERGE = 460


def cuda_split_of(programs: int, groups: int, slots: int, device: torch.device) -> int:
    """Parts the forward in CUDA C++ cuts lists into: as few rounds of programs as may be.

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


def rest_columns(D: int) -> int:
    """Columns beyond the first 64 as `sparse_cuda.cu` stores them."""
    return 0 if D <= 64 else 16 if D <= 80 else 32 if D <= 96 else 64


_SPANS = (128, 112, 96, 80, 64, 48, 32)


def _unit(span: int, PK: int, masked: bool) -> int:
    """Slots to leave out at once where they hold no token; as many as possible where all do."""
    return 16 if masked else math.gcd(span, PK)


def cuda_tiles(PQ: int, PK: int, D: int, masked: bool) -> CudaTiles | None:
    """The default of the forward in CUDA C++, or None where blocks do not suit it."""
    groups = _row_tiles(PQ, 64, 3)
    # Registers for scores, weights, the output's sums and, where there is room, queries: of the
    # 224, 232 or 160 that a thread has.
    room = (190, 204, 132)[groups - 1]
    for span in _SPANS:
        needed, queries = D // 2 + span // 2 + span // 4, cdiv(D, 16) * 4
        if PK % 16 or needed > room:
            continue
        # Two groups with two stages of 128 keys are faster than with three.
        for stages in (4, 3, 2) if groups == 3 else (4, 2):
            unit, held = _unit(span, PK, masked), needed + queries <= room
            tiles = CudaTiles(span, unit, groups, stages, held)
            if tiles.room(D) >= 8192 + (MOST_SHARED_BYTES // 2 if groups == 1 else 0):
                return tiles
    return None


def cuda_query_tiles(PQ: int, PK: int, D: int, masked: bool) -> CudaQueryTiles | None:
    """The same of dQ. A group alone shares its loads with nobody: Triton's is faster."""
    groups = _row_tiles(PQ, 64, 3)
    if groups == 1:
        return None
    for span in _SPANS:
        # Registers for the gradient, queries and two products.
        if PK % 16 or D // 2 + cdiv(D, 16) * 4 + span > (128 if groups == 3 else 160):
            continue
        for stages in (4, 3, 2):
            tiles = CudaQueryTiles(span, _unit(span, PK, masked), groups, stages)
            if tiles.room(D) >= 8192:
                return tiles
    return None


def cuda_key_tiles(PQ: int, PK: int, D: int) -> CudaKeyTiles | None:
    """The same of dK and dV, for blocks of keys for two groups or three."""
    if not 64 < PK <= 192 or PK % 16:
        return None
    groups = cdiv(PK, 64)
    for span in (80, 64, 48, 32):
        # Registers for both gradients, scores and weights, of the 160 or 240 that a thread has.
        if PQ % span == 0 and D + span // 2 + span // 4 <= (132 if groups == 3 else 212):
            for stages in (4, 3, 2):
                tiles = CudaKeyTiles(span, groups, stages)
                if tiles.shared_bytes(PK, D) <= MOST_SHARED_BYTES:
                    return tiles
    return None
