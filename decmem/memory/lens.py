"""The memory lens: which blocks a pass retrieved, and how much of what it read came from them."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decmem.memory.layout import TokenLayout


@dataclass
class Lens:
    """Watches one pass, layer by layer. Without one nothing of this is computed.

    Attributes:
        lists: retrieved blocks of each layer, (B, H, T * M, K), -1 where empty.
        strength: share of the global memory of each layer, (B, T, M) in [0, 1]: norm of G o_sgm
            over the sum of the norms of both branches, mean over heads, per block of the grid.
    """

    lists: list[Int[Tensor, "B H Nq K"]] = field(default_factory=list)
    strength: list[Float[Tensor, "B T M"]] = field(default_factory=list)

    def watch(
        self,
        layout: TokenLayout,
        lists: Int[Tensor, "B G Nq K"],
        local: Float[Tensor, "B H T S D"],
        gated: Float[Tensor, "B H T S D"],
    ) -> None:
        """Takes down one layer: its lists, o_alm, and G o_sgm."""
        heads = local.shape[1]
        self.lists.append(lists.expand(-1, heads, -1, -1).cpu())
        near, far = (_norms(layout, branch) for branch in (local, gated))
        self.strength.append((far / (near + far).clamp(min=1e-12)).mean(1).cpu())

    def counts(self, blocks: int, known: int, layer: int | None = None) -> Int[Tensor, "B M N"]:
        """How often each block of a latent (M of them) read each of the `known` remembered blocks.

        Summed over the latents of the pass, its heads, and all layers where `layer` is None.
        """
        chosen = self.lists if layer is None else self.lists[layer : layer + 1]
        total = torch.zeros(len(chosen[0]), blocks, known + 1, dtype=torch.long)
        for lists in chosen:
            asked = lists.long().unflatten(2, (-1, blocks)).movedim(3, 1).flatten(2)
            # Empty slots are -1: they fall into the spare column, which is cut off.
            index = torch.where(asked >= 0, asked, known)
            total.scatter_add_(2, index, torch.ones_like(index))
        return total[:, :, :known]

    def strengths(self, layer: int | None = None) -> Float[Tensor, "B T M"]:
        """`strength` of one layer, or its mean over layers."""
        return torch.stack(self.strength).mean(0) if layer is None else self.strength[layer]


def _norms(layout: TokenLayout, x: Float[Tensor, "B H T S D"]) -> Float[Tensor, "B H T M"]:
    """Norm over the tokens and channels of each block; padding does not count."""
    squares = x.float().square().sum(-1).unflatten(3, (layout.M, layout.P))
    if layout.valid is not None:
        squares = squares * layout.valid.to(x.device)
    return squares.sum(-1).sqrt()
