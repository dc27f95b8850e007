"""Tensor functions without project types: block-sparse and window attention, retrieval, positions.

`select_blocks`, `block_sparse_attention` and `decoupled_attention` are a public API, usable without
the rest of decmem; docs/operators.md shows how.
"""

from decmem.ops.block_sparse import block_sparse_attention, decoupled_attention
from decmem.ops.selection import pool_blocks, select_blocks
from decmem.ops.window import WindowTable, window_attention

__all__ = [
    "WindowTable",
    "block_sparse_attention",
    "decoupled_attention",
    "pool_blocks",
    "select_blocks",
    "window_attention",
]
