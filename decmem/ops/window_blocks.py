"""A window that all queries share, as block-sparse attention with one list for all.

What every latent of a chunk reads is then the same, and tiles of queries need not end where blocks
of tokens do: cut anew, the 3,840 slots of the paper's chunk are 20 tiles of 192 rows, where blocks
of 160 would leave a sixth of every tile empty.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
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
    lists: Int[Tensor, "1 1 Nq Nk"]
    valid: Int[Tensor, " M"] | None


def window_blocks(
    q: Float[Tensor, "B H Tq S D"],
    k: Float[Tensor, "B H Tk S D"],
    v: Float[Tensor, "B H Tk S D"],
    counts: Int[Tensor, " M"] | None,
) -> WindowBlocks | None:
    """Attention of all of `q` over all of `k`, or None where nothing divides the slots evenly.

    `counts`: tokens of each of the M equal blocks of a latent, that come first in their block. The
    result has the shape of the blocks of queries; `view_as(q)` gives it that of `q`.
    """
    slots = q.shape[2] * q.shape[3]
    rows = next((n for n in _ROWS if slots % n == 0), 0)
    sizes = _KEYS if counts is None else (q.shape[3] // len(counts),)
    size = next((n for n in sizes if q.shape[3] % n == 0), 0)
    if not (rows and size):
        return None
    keys, values = (x.unflatten(3, (-1, size)).flatten(2, 3) for x in (k, v))
    lists = _everything(slots // rows, keys.shape[2], q.device)
    return WindowBlocks(q.flatten(2, 3).unflatten(2, (-1, rows)), keys, values, lists, counts)


@lru_cache(maxsize=64)
def _everything(readers: int, blocks: int, device: torch.device) -> Int[Tensor, "1 1 Nq Nk"]:
    """Lists of all blocks; sent once, since a copy from the host stops CUDA graphs."""
    lists = torch.arange(blocks, dtype=torch.int32).expand(1, 1, readers, -1)
    return lists.contiguous().to(device)
