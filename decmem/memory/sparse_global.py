"""Sparse Global Memory: every block of the present reads the k blocks of the past it needs most.

Section 3.3 and figure 4 of the paper. The cost of a chunk is bounded by k, not by the length of
its history; only the pooled scores grow with it.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from decmem.memory.layout import TokenLayout
from decmem.ops.block_sparse import Backend, block_sparse_attention
from decmem.ops.selection import pool_blocks, select_blocks


class SparseGlobalMemory(nn.Module):
    """Retrieval of blocks over all history, then attention inside what was retrieved.

    Args:
        layout: how a latent's tokens are split into blocks.
        retrieved: k, blocks read by each query block.
        per_head: every head keeps its own list; else scores are summed over heads.
    """

    def __init__(
        self,
        layout: TokenLayout,
        retrieved: int,
        per_head: bool,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.layout = layout
        self.retrieved = retrieved
        self.per_head = per_head
        self.backend: Backend = backend
        self.counts: Tensor | None
        self.register_buffer("counts", layout.counts, persistent=False)

    def blocks(self, x: Float[Tensor, "B H T S D"]) -> Float[Tensor, "B H N P D"]:
        """Latents as the blocks they are stored in."""
        return x.unflatten(3, (self.layout.M, self.layout.P)).flatten(2, 3)

    def pool(self, x: Float[Tensor, "B H T S D"]) -> Float[Tensor, "B H N D"]:
        """Compress: the mean over a block's tokens."""
        return pool_blocks(self.blocks(x), self.layout.valid_on(x.device))

    def retrieve(
        self,
        q: Float[Tensor, "B H T S D"],
        pooled_keys: Float[Tensor, "B H Nk D"],
        candidates: Bool[Tensor, "Nq Nk"] | Bool[Tensor, "B 1 Nq Nk"],
        retrieved: int | None = None,
    ) -> Int[Tensor, "B G Nq K"]:
        """Sparse retrieval: the context C_i of every query block."""
        k = self.retrieved if retrieved is None else retrieved
        return select_blocks(self.pool(q), pooled_keys, candidates, k, self.per_head)

    def forward(
        self,
        q: Float[Tensor, "B H T S D"],
        k: Float[Tensor, "B H pool S D"],
        v: Float[Tensor, "B H pool S D"],
        lists: Int[Tensor, "B G Nq K"],
        k_scale: Float[Tensor, "B H pool S 1"] | None = None,
        v_scale: Float[Tensor, "B H pool S 1"] | None = None,
        scale: float | None = None,
    ) -> Float[Tensor, "B H T S D"]:
        """o_sgm over the retrieved lists. Empty lists (the very first chunk) read zeros.

        Keys and values in 8 bits come with their scales. `scale`: of scores; None: D^-1/2.
        """
        out = block_sparse_attention(
            self.blocks(q),
            self.blocks(k),
            self.blocks(v),
            lists,
            valid=self.counts,
            scale=scale,
            backend=self.backend,
            k_scale=None if k_scale is None else self.blocks(k_scale),
            v_scale=None if v_scale is None else self.blocks(v_scale),
        )
        return out.unflatten(2, (-1, self.layout.M)).flatten(3, 4)
