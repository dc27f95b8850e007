"""Windows as block-sparse attention: tiles of queries, each with a list of what it sees.

Where latents see the same, as those of a chunk do, tiles need not end where blocks of tokens do:
cut anew, the 3,840 slots of the paper's chunk are 20 tiles of 192 rows, where blocks of 160 would
leave a sixth of every tile empty.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

_ROWS = (192, 128, 64)
"""Queries of a tile: up to three warp groups' worth, the most first."""

_KEYS = (192, 160, 128, 80, 64)
"""Keys of a block where all slots hold tokens: any size that the kernels take."""


class WindowBlocks(NamedTuple):
    """Arguments of `block_sparse_attention`."""

    q: Float[Tensor, "B H Nq Pq D"]
    k: Float[Tensor, "B H Nk Pk D"]
    v: Float[Tensor, "B H Nk Pk D"]
    lists: Int[Tensor, "1 1 Nq K"]
    valid: Int[Tensor, " M"] | None


def tile_lists(
    table: Bool[Tensor, "Tq Tk"], tokens: int, rows: int, blocks: int
) -> Int[Tensor, "1 1 tiles K"] | None:
    """Blocks that each tile of `rows` queries sees, ascending, then -1; None where a tile holds
    latents that see different ones. Latents have `tokens` slots and `blocks` blocks."""
    first = torch.arange(0, table.shape[0] * tokens, rows)
    seen = table[first // tokens]
    if not seen.equal(table[(first + rows - 1) // tokens]) or not (
        rows <= tokens or seen.repeat_interleave(rows, 0).equal(table.repeat_interleave(tokens, 0))
    ):
        return None
    return _ascending(seen.repeat_interleave(blocks, 1))


def token_rows(
    spans: Sequence[int], kept: Int[Tensor, "tokens"], slots: int, rows: int, side_by_side: bool
) -> Int[Tensor, "tiles rows 2"]:
    """Tiles of tokens and no padding, for `sparse_kernels.rows_attention`: where each row's query
    and result lie, counted over all latents, -1 where a tile has none.

    Args:
        spans: numbers of consecutive latents; no tile holds tokens of two of these.
        kept: the slot of each token of a latent. slots: of a latent.
        side_by_side: results are tokens side by side; otherwise they lie in slots, as queries do.
    """
    tokens, latent = len(kept), torch.arange(sum(spans))[:, None]
    queries = latent * slots + kept
    results = latent * tokens + torch.arange(tokens) if side_by_side else queries
    lines = torch.stack((queries, results), -1)
    whole = [part.flatten(0, 1) for part in lines.split(list(spans))]
    padded = [F.pad(part, (0, 0, 0, -len(part) % rows), value=-1) for part in whole]
    return torch.cat(padded).unflatten(0, (-1, rows)).to(torch.int32)


def span_lists(
    seen: Bool[Tensor, "spans Tk"], spans: Sequence[int], tokens: int, rows: int, blocks: int
) -> Int[Tensor, "1 1 tiles K"]:
    """Blocks that tiles of `token_rows` see, ascending, then -1. `seen`: the latents that those of
    each span see, which have so many `blocks`; `tokens` of a latent."""
    tiles = torch.tensor([-(-span * tokens // rows) for span in spans])
    return _ascending(seen.repeat_interleave(tiles, 0).repeat_interleave(blocks, 1))


def _ascending(seen: Bool[Tensor, "tiles Nk"]) -> Int[Tensor, "1 1 tiles K"]:
    places = torch.where(seen, torch.arange(seen.shape[1]), seen.shape[1])
    places = places.sort(1).values[:, : int(seen.sum(1).max())]
    return torch.where(places < seen.shape[1], places, -1).to(torch.int32)[None, None]


def placed_lists(
    lists: Int[Tensor, "1 1 tiles K"], places: Int[Tensor, "Tk"], blocks: int
) -> Int[Tensor, "1 1 tiles K"]:
    """`tile_lists` of latents that lie in these `places` of a larger tensor; latents have so many
    `blocks`."""
    there = places.to(lists.dtype)[lists.clamp(min=0) // blocks] * blocks + lists % blocks
    return torch.where(lists >= 0, there, lists)


def tile_rows(slots: int) -> int:
    """Queries of a tile, 0 where nothing divides so many."""
    return next((n for n in _ROWS if slots % n == 0), 0)


def block_size(tokens: int, counts: Int[Tensor, " M"] | None) -> int:
    """Keys of a block of latents of so many slots, 0 where nothing divides them."""
    sizes = _KEYS if counts is None else (tokens // len(counts),)
    return next((n for n in sizes if tokens % n == 0), 0)


def key_blocks(
    k: Float[Tensor, "B H Tk S D"], v: Float[Tensor, "B H Tk S D"], counts: Int[Tensor, " M"] | None
) -> tuple[Float[Tensor, "B H Nk Pk D"], Float[Tensor, "B H Nk Pk D"]]:
    """Latents of keys and values in blocks; `counts`: tokens of the blocks of a latent."""
    size = block_size(k.shape[3], counts)
    keys, values = (x.unflatten(3, (-1, size)).flatten(2, 3) for x in (k, v))
    return keys, values


def window_blocks(
    q: Float[Tensor, "B H Tq S D"],
    k: Float[Tensor, "B H Tk S D"],
    v: Float[Tensor, "B H Tk S D"],
    lists: Int[Tensor, "1 1 tiles K"],
    counts: Int[Tensor, " M"] | None,
) -> WindowBlocks:
    """Tiles of `q` that read what `lists` (`tile_lists`) name of `k` and `v`, all of them views.

    `counts`: tokens of each of the M equal blocks of a latent, that come first in their block. The
    result has the shape of the tiles; `view_as(q)` gives it that of `q`.
    """
    keys, values = key_blocks(k, v, counts)
    tiles = q.flatten(2, 3).unflatten(2, (lists.shape[2], -1))
    return WindowBlocks(tiles, keys, values, lists, counts)
