"""Window tables as work for a kernel: tiles of rows, and the runs of columns that each one walks.

A tile is `size` consecutive token rows of the sequence, or fewer. It may span latents that see
different columns: it walks the runs that any of its rows sees, and the kernel masks what a row
does not see. Sliding windows differ by a latent from one row of the table to the next, so tiles
that ignore latents waste less than tiles that each leave part of their rows empty. Where to cut is
a shortest path through the rows, by an estimate of the work.

The same tables serve both directions: rows are queries and columns keys in the forward pass and in
dQ, rows are keys and columns their readers in dK and dV.
"""

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

MOST_RUNS = 8
"""Tables with rows of more runs are left to other kernels."""

_BLOCK = 64
"""Columns a kernel takes at a time, near enough for an estimate."""

_MASKED = 0.3
"""What masking a block costs, in blocks."""

_TILE = (2.0, 8.0, 32.0)
"""What beginning and ending a tile costs, in blocks; more where there would be too many tiles."""

Runs = tuple[tuple[int, int], ...]
"""Columns a latent sees, as runs [from, to) of latents, ascending."""


class _Walk(NamedTuple):
    """The columns of a tile, in latents.

    Attributes:
        runs: (start, stop, inner, outer) of each run: all rows see [inner, outer) of it.
        limits: what each latent of the tile sees of each run, [from, to).
    """

    runs: tuple[tuple[int, int, int, int], ...]
    limits: tuple[tuple[tuple[int, int], ...], ...]

    def blocks(self, S: int) -> int:
        """Blocks of columns."""
        return sum(-(-(stop - start) * S // _BLOCK) for start, stop, _, _ in self.runs)

    def cost(self, S: int) -> float:
        """An estimate of the time, in blocks, besides beginning and ending."""
        whole = 0
        for start, _, inner, outer in self.runs:
            first, last = -(-(inner - start) * S // _BLOCK), (outer - start) * S // _BLOCK
            whole += max(0, last - first)
        return (1 + _MASKED) * self.blocks(S) - _MASKED * whole


def row_runs(table: Bool[Tensor, "rows columns"]) -> list[Runs]:
    """The runs of every row. `table` lies on the CPU."""
    edges = torch.nn.functional.pad(table.to(torch.int8), (1, 1)).diff(dim=1)
    found: list[list[int]] = [[] for _ in range(len(table))]
    for row, column in edges.nonzero().tolist():
        found[row].append(column)
    return [tuple(zip(at[::2], at[1::2], strict=True)) for at in found]


def _walk(latents: Sequence[Runs], most: int) -> _Walk | None:
    """The walk of a tile over these latents.

    None where it would take more than `most` runs, or a latent would see two pieces of one.
    """
    union: list[list[int]] = []
    for start, stop in sorted(run for runs in latents for run in runs):
        if union and start <= union[-1][1]:
            union[-1][1] = max(union[-1][1], stop)
        else:
            union.append([start, stop])
    if len(union) > most:
        return None
    limits = []
    for runs in latents:
        seen = [(0, 0)] * len(union)
        for start, stop in runs:
            at = next(i for i, run in enumerate(union) if start < run[1])
            if seen[at] != (0, 0):
                return None
            seen[at] = (start, stop)
        limits.append(tuple(seen))
    runs = []
    for at, (start, stop) in enumerate(union):
        inner, outer = max(seen[at][0] for seen in limits), min(seen[at][1] for seen in limits)
        runs.append((start, stop, inner, outer))
    return _Walk(tuple(runs), tuple(limits))


Tile = tuple[int, int, _Walk]
"""First row, last row + 1, and the columns."""


def _cut(latents: Sequence[Runs], S: int, size: int, most: int, overhead: float) -> list[Tile]:
    """Tiles that cover all rows at the least cost, each of which counts `overhead` besides."""
    T = len(latents)
    edges = [i * S for i in range(1, T + 1) if i == T or latents[i] != latents[i - 1]]
    walks: dict[tuple[int, int], _Walk | None] = {}
    # Cheapest way to each row where a tile may begin: cost, where its last tile began, its walk.
    ways: dict[int, tuple[float, int, _Walk | None]] = {0: (0.0, 0, None)}
    ahead, at = [0], 0
    while at < T * S:
        at = heapq.heappop(ahead)
        near = edges[bisect_right(edges, at) : bisect_left(edges, at + size)]
        for end in (*near, min(at + size, T * S)):
            span = at // S, -(-end // S)
            if span not in walks:
                walks[span] = _walk(latents[slice(*span)], most)
            walk = walks[span]
            if walk is None:
                continue
            cost = ways[at][0] + overhead + walk.cost(S)
            if end not in ways:
                heapq.heappush(ahead, end)
            if end not in ways or cost < ways[end][0]:
                ways[end] = cost, at, walk
    tiles = []
    while at > 0:
        _, before, walk = ways[at]
        assert walk is not None
        tiles.append((before, at, walk))
        at = before
    return tiles[::-1]


def tile_latents(size: int, S: int) -> int:
    """Latents of `S` rows that `size` consecutive rows may touch."""
    return (size - 2) // S + 2


def tile_runs(latents: Sequence[Runs]) -> int:
    """Runs a tile has room for: 2, 4, 8, ... so that tables that differ a little share a shape."""
    return max(2, 1 << (max(len(runs) for runs in latents) - 1).bit_length())


def window_tiles(
    table: Bool[Tensor, "rows columns"], S: int, size: int
) -> Int[Tensor, "tiles fields"]:
    """The tiles of a table of latents of `S` token rows each, the longest walks first.

    Args:
        table: row latent i sees column latent j, on the CPU.
        size: rows of a tile, at least 2.

    Returns:
        int32. A tile is its first row and its last + 1; start, stop, inner, outer of every run it
        walks (all its rows see [inner, outer)); and for every latent it touches, and every run,
        where what that latent sees of it starts, and its length. All in token rows; unused fields
        are 0. Empty tiles at the end bring tables of one size to one shape, whatever the chunks.
    """
    latents = row_runs(table)
    T, touched, most = len(table), tile_latents(size, S), tile_runs(latents)
    room = -(-9 * T * S // (8 * size)) + 4
    for overhead in _TILE:
        tiles = _cut(latents, S, size, most, overhead)
        if len(tiles) <= room:
            break
    else:
        room = T * S // size + T
    tiles.sort(key=lambda tile: -tile[2].blocks(S))
    rows = [_fields(tile, S, most, touched) for tile in tiles]
    rows += [[0] * (2 + 4 * most + 2 * touched * most)] * (room - len(rows))
    return torch.tensor(rows, dtype=torch.int32)


def _fields(tile: Tile, S: int, most: int, touched: int) -> list[int]:
    first, last, walk = tile
    unused = most - len(walk.runs)
    fields = [edge * S for run in walk.runs for edge in run] + [0] * (4 * unused)
    for seen in walk.limits:
        for start, stop in seen:
            fields += [start * S, (stop - start) * S]
        fields += [0] * (2 * unused)
    return [first, last, *fields] + [0] * (2 * most * (touched - len(walk.limits)))


@lru_cache(maxsize=256)
def placed_tiles(
    content: bytes, shape: tuple[int, int], S: int, size: int, device: torch.device
) -> Int[Tensor, "tiles fields"]:
    """`window_tiles` on a device; a roll-out's tables repeat, and are built and sent once.

    Args:
        content: the table, a byte for each entry, row by row.
    """
    table = torch.frombuffer(bytearray(content), dtype=torch.bool).view(shape)
    return window_tiles(table, S, size).to(device)
