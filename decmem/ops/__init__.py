"""Tensor functions without project types: block-sparse and window attention, retrieval, positions.

`block_sparse_attention` and `select_blocks` are a public API, usable without the rest of decmem.
"""

from decmem.ops.block_sparse import block_sparse_attention
from decmem.ops.selection import pool_blocks, select_blocks
from decmem.ops.window import WindowTable, window_attention

__all__ = [
    "WindowTable",
    "block_sparse_attention",
    "pool_blocks",
    "select_blocks",
    "window_attention",
]
