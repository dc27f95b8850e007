"""Attention of latents over windows of other latents, given as a table of who sees whom."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decmem.ops.block_sparse import Backend, block_sparse_attention, choose_backend
from decmem.ops.untraced import untraced
from decmem.ops.window_blocks import (
    WindowBlocks,
    block_size,
    key_blocks,
    span_lists,
    tile_lists,
    tile_rows,
    token_rows,
    window_blocks,
)
from decmem.ops.window_launches import Launches, choose_launches
from decmem.ops.window_tiles import MOST_RUNS, placed_tiles, row_runs


@dataclass(frozen=True)
class Span:
    """Query latents [first, last) that see the same key latents: `keys`, ascending."""

    first: int
    last: int
    keys: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        return self.keys[-1] - self.keys[0] + 1 == len(self.keys)


def spans(table: Bool[Tensor, "Tq Tk"]) -> tuple[Span, ...]:
    """Runs of equal rows of the table. `table` lies on the CPU."""
    rows = [tuple(row.nonzero().flatten().tolist()) for row in table]
    found: list[Span] = []
    for i, keys in enumerate(rows):
        if found and found[-1].keys == keys:
            found[-1] = Span(found[-1].first, i + 1, keys)
        else:
            found.append(Span(i, i + 1, keys))
    return tuple(found)


class WindowTable:
    """Who sees whom, with the forms the backends want of it, each made once.

    Args:
        table: (Tq, Tk) bool on the CPU; query latent i sees key latent j. No empty row.
    """

    def __init__(self, table: Bool[Tensor, "Tq Tk"]) -> None:
        self.table = table
        self.spans = spans(table)
        self.few_runs = all(
            len(runs) <= MOST_RUNS for side in (table, table.T) for runs in row_runs(side)
        )
        self._forms: dict[object, object] = {}

    def lists(self, device: torch.device) -> list[tuple[Span, int, Tensor]]:
        """Runs of consecutive spans of one length: (first span, spans in the run, key lists).

        Lists are (spans, K) int32, -1 where a window is short.
        """
        if ("lists", device) not in self._forms:
            runs: list[list[Span]] = []
            for span in self.spans:
                length = span.last - span.first
                if runs and runs[-1][0].last - runs[-1][0].first == length:
                    runs[-1].append(span)
                else:
                    runs.append([span])
            made = []
            for run in runs:
                most = max(len(s.keys) for s in run)
                rows = [list(s.keys) + [-1] * (most - len(s.keys)) for s in run]
                made.append((run[0], len(run), torch.tensor(rows, dtype=torch.int32).to(device)))
            self._forms["lists", device] = made
        return self._forms["lists", device]  # pyright: ignore[reportReturnType]

    def rows(self, device: torch.device) -> Int[Tensor, "Tq K"]:
        """Key latents of every query latent, -1 where fewer; one shape for windows that differ a
        little, so that compiled code serves them all."""
        if ("rows", device) not in self._forms:
            most = max(8, 1 << (int(self.table.sum(1).max()) - 1).bit_length())
            keys = torch.where(self.table, torch.arange(self.table.shape[1]), 2**30)
            keys = torch.nn.functional.pad(keys, (0, most), value=2**30)
            keys = keys.sort(1).values[:, :most]
            keys = torch.where(keys < 2**30, keys, -1)
            self._forms["rows", device] = keys.to(device, torch.int32)
        return self._forms["rows", device]  # pyright: ignore[reportReturnType]

    def tiles(self, launches: Launches, S: int, device: torch.device) -> list[Tensor]:
        """Tiles of latents of `S` tokens for the window kernels: of the forward pass, and where
        gradients are on, of dQ, and of dK and dV. Needs `few_runs`."""
        sizes = [launches.forward.rows]
        if torch.is_grad_enabled():
            sizes += [launches.query_gradient.rows, launches.key_gradient.rows]
        made = []
        for i, size in enumerate(sizes):
            form = ("tiles", i == 2, size, S, device)
            if form not in self._forms:
                table = (self.table.T if i == 2 else self.table).contiguous()
                content = table.numpy().tobytes()
                self._forms[form] = placed_tiles(content, tuple(table.shape), S, size, device)
            made.append(self._forms[form])
        return made

    def tile_lists(
        self, tokens: int, rows: int, blocks: int, device: torch.device
    ) -> Int[Tensor, "1 1 tiles K"] | None:
        """As the function; sent to the device once, for a copy from the host stops CUDA graphs."""
        form = ("tile_lists", tokens, rows, blocks, device)
        if form not in self._forms:
            lists = tile_lists(self.table, tokens, rows, blocks)
            self._forms[form] = None if lists is None else lists.to(device)
        return self._forms[form]  # pyright: ignore[reportReturnType]

    def hopper_lists(
        self, q: Float[Tensor, "B H Tq S D"], counts: Int[Tensor, " M"] | None
    ) -> Int[Tensor, "1 1 tiles K"] | None:
        """`tile_lists` of queries that lie like `q`, and of blocks with such `counts`."""
        S = q.shape[3]
        rows, size = tile_rows(q.shape[2] * S), block_size(S, counts)
        return self.tile_lists(S, rows, S // size, q.device) if rows and size else None

    def prepare(
        self, q: Float[Tensor, "B H Tq S D"], counts: Int[Tensor, " M"] | None = None
    ) -> None:
        """Makes what `window_attention` will ask for with queries like these and such `counts`."""
        if choose_backend("auto", q) == "triton":
            if self.few_runs:
                self.tiles(choose_launches(q), q.shape[3], q.device)
                self.hopper_lists(q, counts)
            else:
                self.rows(q.device)


def window_attention(
    q: Float[Tensor, "B H Tq S D"],
    k: Float[Tensor, "#B H Tk S D"],
    v: Float[Tensor, "#B H Tk S D"],
    windows: WindowTable,
    valid: Bool[Tensor, "S"] | None = None,
    backend: Backend = "auto",
    counts: Int[Tensor, " M"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H Tq S D"]:
    """Tokens of query latent i attend densely to all tokens of the key latents its window holds.

    `valid` marks the token slots of a latent that hold a token. `k` and `v` may have more latents
    than the table has columns (a bank's spare room); those are never read. Keys of one world may
    serve the queries of many. `counts` may say what `valid` says block by block: how many tokens
    each of the M equal blocks of a latent holds, where they come first. Then the block-sparse
    kernels for Hopper GPUs do the work on the way there where windows suit their tiles. `scale`
    defaults to D^-1/2.
    """
    S, Tk = q.shape[3], windows.table.shape[1]
    if k.shape[0] < q.shape[0]:
        k, v = (x.expand(q.shape[0], -1, -1, -1, -1) for x in (k, v))
    slots = None if valid is None else valid[None]
    asked, backend = backend, choose_backend(backend, q)
    kernels = backend == "hopper" or (asked == "auto" and backend == "triton")
    kernels = kernels and (valid is None or counts is not None)
    if kernels:
        blocks = _for_hopper(q, k[:, :, :Tk], v[:, :, :Tk], windows, counts)
        if blocks is not None:
            return block_sparse_attention(*blocks, scale, backend="hopper").view_as(q)
    if backend == "triton" and windows.few_runs:
        from decmem.ops import window_kernels

        if k.shape[2] > Tk:
            k, v = k[:, :, :Tk], v[:, :, :Tk]
        launches = choose_launches(q)
        tiles = windows.tiles(launches, S, q.device)
        lists = windows.hopper_lists(q, counts) if kernels else None
        return window_kernels.window_attention(
            q, k, v, tiles, valid, launches, scale, lists, counts
        )
    if backend == "triton":
        rows = windows.rows(q.device)[None, None]
        return block_sparse_attention(q, k, v, rows, slots, scale, backend)
    few = len(windows.spans) == 1 or not q.is_cuda
    if backend == "gather" and few and all(span.contiguous for span in windows.spans):
        if len(windows.spans) == 1:
            return _attend_slice(q, k, v, windows.spans[0], valid, scale)
        if untraced(q):
            out = torch.empty_like(q)  # laid out like the queries, which joining pieces is not
            for span in windows.spans:
                out[:, :, span.first : span.last] = _attend_slice(q, k, v, span, valid, scale)
            return out
        parts = [_attend_slice(q, k, v, span, valid, scale) for span in windows.spans]
        return torch.cat(parts, dim=2)
    # Latents that see the same keys are gathered for once.
    pieces = []
    for first, count, lists in windows.lists(q.device):
        size = first.last - first.first
        part = q[:, :, first.first : first.first + count * size]
        grouped = part.unflatten(2, (count, size)).flatten(3, 4)
        out = block_sparse_attention(grouped, k, v, lists[None, None], slots, scale, backend)
        pieces.append(out.unflatten(3, (size, S)).flatten(2, 3))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


class Tiles(NamedTuple):
    """Tiles of queries that read windows where these lie: `lists` of the blocks that each sees, and
    its `rows` (`window_blocks.token_rows`), None where tiles are slots side by side."""

    lists: Int[Tensor, "1 1 tiles K"]
    rows: Int[Tensor, "tiles rows 2"] | None

    @classmethod
    def of_tokens(
        cls, windows: WindowTable, kept: Int[Tensor, "tokens"], slots: int, rows: int, blocks: int
    ) -> "Tiles":
        """Tiles of `rows` tokens and no padding; `kept` are those of a latent's `slots` that hold
        one, and `blocks` of keys a latent has."""
        lengths = [span.last - span.first for span in windows.spans]
        seen = windows.table[[span.first for span in windows.spans]]
        return cls(
            span_lists(seen, lengths, len(kept), rows, blocks),
            token_rows(lengths, kept, slots, rows, side_by_side=False),
        )

    def on(self, device: torch.device) -> "Tiles":
        return Tiles(self.lists.to(device), None if self.rows is None else self.rows.to(device))


def hopper_tiles(
    q: Float[Tensor, "B H Tq S D"],
    k: Float[Tensor, "B H room S D"],
    windows: WindowTable,
    counts: Int[Tensor, " M"] | None,
    kept: Int[Tensor, "tokens"] | None,
) -> Tiles | None:
    """What `tiled_attention` reads for such windows if their latents come first in `k`; None where
    the kernels for Hopper GPUs do not serve. `kept`: the slots that hold tokens; None: all do."""
    if choose_backend("auto", q) != "triton":
        return None
    blocks = _for_hopper(q, k, k, windows, counts)
    if blocks is None:
        return None
    if kept is None:
        return Tiles(blocks.lists, None)
    S, size, rows = q.shape[3], blocks.k.shape[3], blocks.q.shape[3]
    return Tiles.of_tokens(windows, kept.cpu(), S, rows, S // size).on(q.device)


def tiled_attention(
    q: Float[Tensor, "B H Tq S D"],
    k: Float[Tensor, "B H room S D"],
    v: Float[Tensor, "B H room S D"],
    tiles: Tiles,
    counts: Int[Tensor, " M"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H Tq S D"]:
    """`window_attention` where the keys lie, by the kernels for Hopper GPUs: lists say which
    blocks of `k` and `v` each tile of queries sees. `counts` and `scale` as there. Slots of which
    the tiles have no row hold anything."""
    if tiles.rows is None:
        blocks = window_blocks(q, k, v, tiles.lists, counts)
        return block_sparse_attention(*blocks, scale, backend="hopper").view_as(q)
    from decmem.ops.sparse_kernels import rows_attention

    keys, values = key_blocks(k, v, counts)
    out = rows_attention(
        q.flatten(2, 3), keys, values, tiles.lists, counts, tiles.rows, scale=scale
    )
    return out.view_as(q)


def tiled_near_and_far(
    q: Float[Tensor, "B H Tq S D"],
    k: Float[Tensor, "B H room S D"],
    v: Float[Tensor, "B H room S D"],
    tiles: Tiles,
    lists: Int[Tensor, "#B G Nq K"],
    counts: Int[Tensor, " M"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H Tq S D"], Float[Tensor, "B H Tq S D"]] | None:
    """`tiled_attention`, and that of the latents' M blocks over their `lists`, the second where the
    first leaves the GPU idle; None where kernels do not do both."""
    if counts is None or tiles.rows is None or not lists.shape[-1] or k.dtype != q.dtype:
        return None
    from decmem.ops.sparse_kernels import hopper_obstacle, near_and_far_attention

    keys, values = key_blocks(k, v, counts)
    blocks = q.unflatten(3, (len(counts), -1)).flatten(2, 3)
    if hopper_obstacle(blocks, keys, counts, lists) is not None:
        return None
    near, far = near_and_far_attention(
        q.flatten(2, 3), keys, values, tiles.lists, tiles.rows, lists, counts, scale
    )
    return near.view_as(q), far.view_as(q)


@functools.cache
def _alone(latents: int) -> WindowTable:
    """Every latent sees itself only: attention inside latents as a window."""
    return WindowTable(torch.eye(latents, dtype=torch.bool))


def hopper_serves_inside(q: Float[Tensor, "B H T S D"], counts: Int[Tensor, " M"] | None) -> bool:
    """Whether `attention_inside` takes queries, keys and values like these."""
    # Asked first: compilers cannot follow how the table is made.
    if torch.compiler.is_compiling() or choose_backend("auto", q) != "triton":
        return False
    return _for_hopper(q, q, q, _alone(q.shape[2]), counts) is not None


@functools.cache
def _lists_inside(
    latents: int, tokens: int, rows: int, blocks: int, device: torch.device
) -> Int[Tensor, "1 1 tiles K"]:
    """Sent to the device once, for a copy from the host stops CUDA graphs."""
    alone = torch.eye(latents, dtype=torch.bool)
    return span_lists(alone, [1] * latents, tokens, rows, blocks).to(device)


def attention_inside(
    q: Float[Tensor, "B H T S D"],
    k: Float[Tensor, "B H T S D"],
    v: Float[Tensor, "B H T S D"],
    counts: Int[Tensor, " M"] | None,
    rows: Int[Tensor, "tiles rows 2"],
    tokens: int,
) -> Float[Tensor, "B T tokens H D"]:
    """Tokens attend to those of their own latent, by the kernels for Hopper GPUs, without
    gradients; heads last.

    Args:
        counts: as of `window_attention`.
        rows: where each tile's queries and results lie (`window_blocks.token_rows`, every latent a
            span, side by side).
        tokens: of a latent.
    """
    from decmem.ops.sparse_kernels import rows_attention

    T = q.shape[2]
    keys, values = key_blocks(k, v, counts)
    lists = _lists_inside(T, tokens, rows.shape[1], keys.shape[2] // T, q.device)
    out = rows_attention(q.flatten(2, 3), keys, values, lists, counts, rows, T * tokens)
    return out.unflatten(1, (T, tokens))


def _for_hopper(
    q: Tensor, k: Tensor, v: Tensor, windows: WindowTable, counts: Tensor | None
) -> WindowBlocks | None:
    """The blocks that the kernels for Hopper GPUs take, where they serve: the window kernels have
    the faster gradients, and compilers cannot follow the choice."""
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if learning or torch.compiler.is_compiling():
        return None
    lists = windows.hopper_lists(q, counts)
    if lists is None:
        return None
    from decmem.ops.sparse_kernels import hopper_obstacle

    blocks = window_blocks(q, k, v, lists, counts)
    obstacle = hopper_obstacle(blocks.q, blocks.k, blocks.valid, blocks.lists)
    return blocks if obstacle is None else None


def _attend_slice(
    q: Tensor, k: Tensor, v: Tensor, span: Span, valid: Tensor | None, scale: float | None
) -> Tensor:
    """A span whose keys lie side by side: no gathering, the slice itself is attended to."""
    part = q[:, :, span.first : span.last]
    seen = slice(span.keys[0], span.keys[-1] + 1)
    mask = None if valid is None else valid.repeat(len(span.keys))[None]
    keys, values = (x[:, :, seen].flatten(2, 3) for x in (k, v))
    out = F.scaled_dot_product_attention(part.flatten(2, 3), keys, values, mask, scale=scale)
    return out.unflatten(2, part.shape[2:4])
