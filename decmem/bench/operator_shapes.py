"""Shapes at which block-sparse attention is timed, and random inputs of these shapes."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class OperatorInputs(NamedTuple):
    """What every way gets, and the gradient of the output."""

    q: Float[Tensor, "B H Nq P D"]
    k: Float[Tensor, "B H Nk P D"]
    v: Float[Tensor, "B H Nk P D"]
    lists: Int[Tensor, "B H Nq K"]
    valid: Int[Tensor, " period"] | None
    grad: Float[Tensor, "B H Nq P D"]


@dataclass(frozen=True)
class OperatorShape:
    """One layer of a pass over one chunk.

    Args:
        worlds: B; two where a guidance pair runs side by side.
        slots: capacity P of a block, in tokens.
        tokens: of the blocks in turn; they come first in their block.
        blocks: of one latent.
        chunk: latents whose tokens ask.
        listed: key blocks that a query block reads, each head by a list of its own.
    """

    name: str
    worlds: int
    heads: int
    head_dim: int
    slots: int
    tokens: tuple[int, ...]
    blocks: int
    chunk: int
    listed: int

    def inputs(self, history: int, device: torch.device, dtype: torch.dtype) -> OperatorInputs:
        """Normal numbers and ascending lists of random blocks of `history` latents, the same each
        time. The gradient is zero where a query block has no token."""
        draw = torch.Generator(device).manual_seed(0)
        B, H, P, D = self.worlds, self.heads, self.slots, self.head_dim
        Nq, Nk = self.blocks * self.chunk, self.blocks * history
        q, k, v, grad = (
            torch.randn(B, H, n, P, D, generator=draw, device=device, dtype=dtype)
            for n in (Nq, Nk, Nk, Nq)
        )
        rank = torch.rand(B, H, Nq, Nk, generator=draw, device=device)
        lists = rank.topk(min(self.listed, Nk)).indices.sort(-1).values.to(torch.int32)
        slot = torch.arange(P, device=device)
        grad *= (slot < self._counts(Nq, device)[:, None])[..., None]
        valid = None
        if self.tokens != (P,):
            valid = torch.tensor(self.tokens, dtype=torch.int32, device=device)
        return OperatorInputs(q, k, v, lists, valid, grad)

    def _counts(self, blocks: int, device: torch.device) -> Int[Tensor, " N"]:
        counts = torch.tensor(self.tokens, device=device)
        return counts[torch.arange(blocks, device=device) % len(counts)]

    def present(self, blocks: int, device: torch.device) -> Int[Tensor, " tokens"]:
        """Which of the slots of so many blocks hold a token."""
        slot = torch.arange(self.slots, device=device)
        return (slot < self._counts(blocks, device)[:, None]).flatten().nonzero().flatten()

    def flop(self, x: OperatorInputs) -> int:
        """Of the forward pass over the lists, counting tokens only."""
        asking = self._counts(x.q.shape[2], x.q.device)
        read = self._counts(x.k.shape[2], x.q.device)[x.lists.long()].sum(-1)
        return 4 * self.head_dim * int((asking * read).sum())


SHAPES = {
    shape.name: shape
    for shape in (
        # 22 x 40 tokens in 2 x 3 blocks.
        OperatorShape("paper", 2, 24, 72, 160, (154, 143, 143), 6, 4, 80),
        OperatorShape("wide", 2, 18, 96, 192, (192,), 6, 4, 80),
        # What other libraries are written for.
        OperatorShape("peer", 2, 24, 128, 128, (128,), 6, 4, 92),
        OperatorShape("small", 2, 2, 24, 16, (14, 13), 2, 2, 3),
    )
}
"""By name. `small` is for processors without a GPU."""
