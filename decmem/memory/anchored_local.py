"""Anchored Local Memory: attention over the last latents only (section 3.3, figure 4).

The stable base of the decoupled memory: a short window keeps the distribution concentrated.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from decmem.memory.layout import TokenLayout
from decmem.ops.block_sparse import Backend
from decmem.ops.window import Tiles, WindowTable, tiled_attention, window_attention


class AnchoredLocalMemory(nn.Module):
    """Sliding-window attention; who sees whom comes as a table over latents."""

    def __init__(self, layout: TokenLayout, backend: Backend = "auto") -> None:
        super().__init__()
        self.layout = layout
        self.backend: Backend = backend
        self.counts: Tensor | None
        self.register_buffer("counts", layout.counts, persistent=False)

    def _valid(self, device: torch.device) -> Bool[Tensor, "S"] | None:
        valid = self.layout.valid_on(device)
        return None if valid is None else valid.flatten()

    def forward(
        self,
        q: Float[Tensor, "B H T S D"],
        k: Float[Tensor, "B H window S D"],
        v: Float[Tensor, "B H window S D"],
        windows: WindowTable,
        scale: float | None = None,
    ) -> Float[Tensor, "B H T S D"]:
        """o_alm. `scale`: of scores; None: D^-1/2."""
        valid = self._valid(q.device)
        return window_attention(q, k, v, windows, valid, self.backend, self.counts, scale)

    def where_it_lies(
        self,
        q: Float[Tensor, "B H T S D"],
        k: Float[Tensor, "B H room S D"],
        v: Float[Tensor, "B H room S D"],
        tiles: Tiles,
        scale: float | None = None,
    ) -> Float[Tensor, "B H T S D"]:
        """The same of an arena, of whose blocks the lists of `tiles` name those of the windows."""
        return tiled_attention(q, k, v, tiles, self.counts, scale)
