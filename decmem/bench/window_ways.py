"""Ways to attend over windows, for comparison: what one would do without a kernel of one's own."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from decmem.ops import block_sparse_attention, window_attention
from decmem.ops.window import WindowTable

Way = Literal["window", "block_sparse", "unfolded", "flex"]
"""`window_attention`; block-sparse attention over latents as blocks; windows copied out side by
side and given to PyTorch's attention; FlexAttention, compiled."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

_FLEX_BLOCK = 128


def prepared(way: Way, windows: WindowTable, valid: Tensor | None, q: Tensor) -> Attention:
    """Attention of queries like `q` this way, with all tables made."""
    if way == "window":
        return lambda q, k, v: window_attention(q, k, v, windows, valid)
    if way == "block_sparse":
        lists = windows.rows(q.device)[None, None]
        slots = None if valid is None else valid[None]
        return lambda q, k, v: block_sparse_attention(q, k, v, lists, slots)
    if way == "unfolded":
        return _unfolded(windows, valid, q.device)
    return _flex(windows, valid, q.shape[3], q.device)


def _unfolded(windows: WindowTable, valid: Tensor | None, device: torch.device) -> Attention:
    """Spans of one length and one number of keys go to PyTorch's attention together."""
    groups: dict[tuple[int, int], list] = {}
    for span in windows.spans:
        groups.setdefault((span.last - span.first, len(span.keys)), []).append(span)
    plans = []
    for spans in groups.values():
        rows = torch.tensor([range(s.first, s.last) for s in spans], device=device)
        keys = torch.tensor([s.keys for s in spans], device=device)
        mask = None if valid is None else valid.repeat(keys.shape[1])[None]
        plans.append((rows, keys, mask))
    order = torch.cat([rows.flatten() for rows, _, _ in plans]).argsort()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, H, _, S, D = q.shape
        pieces = []
        for rows, keys, mask in plans:
            ours, theirs, values = (
                x.index_select(2, at.flatten()).view(B, H * len(at), -1, D)
                for x, at in ((q, rows), (k, keys), (v, keys))
            )
            out = F.scaled_dot_product_attention(ours, theirs, values, mask)
            pieces.append(out.view(B, H, -1, S, D))
        return torch.cat(pieces, 2).index_select(2, order)

    return attention


def _flex(windows: WindowTable, valid: Tensor | None, S: int, device: torch.device) -> Attention:
    mask = latent_block_mask(windows.table.to(device), valid, S)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys, values = (x.flatten(2, 3) for x in (q, k, v))
        out = compiled(queries, keys, values, block_mask=mask)
        assert isinstance(out, Tensor)
        return out.view_as(q)

    return attention


def latent_block_mask(
    table: Bool[Tensor, "Tq Tk"], valid: Bool[Tensor, "S"] | None, S: int
) -> BlockMask:
    """FlexAttention's mask of a table of latents, without the mask of all tokens."""
    some, every = (_by_block(table, S, how) for how in (torch.amax, torch.amin))
    if valid is not None:
        # Columns with padding in them need the mask everywhere.
        columns = _by_block(valid.repeat(table.shape[1])[None], 1, torch.amin, rows=False)
        every = every & columns

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = table[query // S, key // S]
        return seen if valid is None else seen & valid[key % S]

    partial, whole = (some & ~every)[None, None], every[None, None]
    return BlockMask.from_kv_blocks(
        _count(partial), _indices(partial), _count(whole), _indices(whole),
        BLOCK_SIZE=_FLEX_BLOCK, mask_mod=visible,
        seq_lengths=(table.shape[0] * S, table.shape[1] * S),
    )  # fmt: skip


def _by_block(
    table: Bool[Tensor, "rows columns"], S: int, how: Callable[..., Tensor], rows: bool = True
) -> Bool[Tensor, "row_blocks column_blocks"]:
    """A table of latents of `S` tokens as one of blocks of tokens: any or all of their entries."""
    for axis in (0, 1) if rows else (1,):
        tokens = table.shape[axis] * S
        first = torch.arange(0, tokens, _FLEX_BLOCK, device=table.device)
        last = (first + _FLEX_BLOCK).clamp(max=tokens) - 1
        most = int((last // S - first // S).max()) + 1
        at = first[:, None] // S + torch.arange(most, device=table.device)
        at = torch.minimum(at, last[:, None] // S)
        table = how(table.index_select(axis, at.flatten()).unflatten(axis, at.shape), axis + 1)
    return table


def _count(blocks: Bool[Tensor, "1 1 rows columns"]) -> Int[Tensor, "1 1 rows"]:
    return blocks.sum(-1).to(torch.int32)


def _indices(blocks: Bool[Tensor, "1 1 rows columns"]) -> Int[Tensor, "1 1 rows columns"]:
    """Columns that are set come first, ascending."""
    return (~blocks).to(torch.int8).argsort(dim=-1, stable=True).to(torch.int32)
