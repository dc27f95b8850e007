"""How the tokens of a latent are stored: block by block, padded to one capacity."""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decmem.errors import UserError
from decmem.memory.packing import Packing
from decmem.ops.window_blocks import tile_rows, token_rows


def _edges(length: int, parts: int) -> list[int]:
    """Boundaries of `parts` runs whose lengths differ by at most one, longer ones first."""
    size, rest = divmod(length, parts)
    edges = [0]
    for part in range(parts):
        edges.append(edges[-1] + size + (part < rest))
    return edges


@dataclass(frozen=True)
class TokenLayout:
    """Splits a token grid into `blocks` = (rows, columns) non-overlapping blocks (figure 1c).

    All blocks get the same number of slots: the largest block's tokens, rounded up to a multiple
    of 16 where blocks differ. 22 x 40 tokens in 2 x 3 blocks hold 154, 143 or 143 of 160 slots.
    """

    grid: tuple[int, int]
    blocks: tuple[int, int] = (2, 3)

    def __post_init__(self) -> None:
        if any(b < 1 or b > g for b, g in zip(self.blocks, self.grid, strict=True)):
            raise UserError(
                "blocks",
                f"{self.blocks} blocks do not fit a grid of {self.grid} tokens",
                "Use at most one block per token in each direction",
            )

    @cached_property
    def _members(self) -> list[list[int]]:
        rows, columns = (_edges(g, b) for g, b in zip(self.grid, self.blocks, strict=True))
        return [
            [y * self.grid[1] + x for y in range(top, bottom) for x in range(left, right)]
            for top, bottom in itertools.pairwise(rows)
            for left, right in itertools.pairwise(columns)
        ]

    @property
    def M(self) -> int:
        """Blocks of a latent."""
        return self.blocks[0] * self.blocks[1]

    @cached_property
    def P(self) -> int:
        """Token slots of a block."""
        sizes = {len(m) for m in self._members}
        return sizes.pop() if len(sizes) == 1 else -(-max(sizes) // 16) * 16

    @property
    def S(self) -> int:
        """Token slots of a latent."""
        return self.M * self.P

    @property
    def tokens(self) -> int:
        """Tokens of a latent."""
        return self.grid[0] * self.grid[1]

    @cached_property
    def slots(self) -> Int[Tensor, "S"]:
        """Raster index of the token in each slot; padding repeats the block's first token."""
        return torch.tensor([i for m in self._members for i in m + [m[0]] * (self.P - len(m))])

    @cached_property
    def counts(self) -> Int[Tensor, "M"] | None:
        """Tokens of each block, which come first in its slots, or None when they fill them all."""
        counts = [len(m) for m in self._members]
        if min(counts) == self.P:
            return None
        return torch.tensor(counts, dtype=torch.int32, device="cpu")

    @cached_property
    def valid(self) -> Bool[Tensor, "M P"] | None:
        """Slots that hold a token, or None when all do."""
        if self.counts is None:
            return None
        return torch.arange(self.P, device="cpu") < self.counts[:, None]

    @cached_property
    def order(self) -> Int[Tensor, "tokens"]:
        """Raster index of each token, block by block."""
        return torch.tensor([i for members in self._members for i in members])

    @cached_property
    def raster(self) -> Int[Tensor, "tokens"]:
        """Where each token lies block by block, in raster order."""
        return self.order.argsort()

    @cached_property
    def packing(self) -> Packing | None:
        """Between tokens block by block and slots; None where they are the same."""
        if self.valid is None:
            return None
        return Packing(self.raster[self.slots], self.valid.flatten().nonzero().flatten())

    @cached_property
    def coordinates(self) -> Int[Tensor, "S 2"]:
        """(row, column) of each slot on the token grid."""
        return torch.stack((self.slots // self.grid[1], self.slots % self.grid[1]), dim=-1)

    @cached_property
    def token_coordinates(self) -> Int[Tensor, "tokens 2"]:
        """(row, column) of each token, block by block."""
        return torch.stack((self.order // self.grid[1], self.order % self.grid[1]), dim=-1)

    @cached_property
    def _copies(self) -> dict[tuple[str, torch.device], Tensor]:
        return {}

    def _placed(self, name: str, table: Tensor, device: torch.device) -> Tensor:
        """A table on a device: copied there once, since a copy from the host stops CUDA graphs."""
        if table.device == device:
            return table
        if torch.compiler.is_compiling():
            return table.to(device)
        if (name, device) not in self._copies:
            self._copies[name, device] = table.to(device)
        return self._copies[name, device]

    def valid_on(self, device: torch.device) -> Bool[Tensor, "M P"] | None:
        """`valid` on a device."""
        return None if self.valid is None else self._placed("valid", self.valid, device)

    def coordinates_on(self, device: torch.device) -> Int[Tensor, "S 2"]:
        """`coordinates` on a device."""
        return self._placed("coordinates", self.coordinates, device)

    def token_coordinates_on(self, device: torch.device) -> Int[Tensor, "tokens 2"]:
        """`token_coordinates` on a device."""
        return self._placed("token_coordinates", self.token_coordinates, device)

    def packing_on(self, device: torch.device) -> Packing | None:
        """`packing` on a device."""
        packing = self.packing
        if packing is None:
            return None
        return Packing(
            self._placed("spread", packing.spread, device),
            self._placed("kept", packing.kept, device),
        )

    def rows_inside_on(self, device: torch.device, latents: int) -> Int[Tensor, "tiles rows 2"]:
        """Tiles of so many latents' tokens, for `decmem.ops.window.attention_inside`."""
        name = f"rows inside {latents}"
        if (name, device) not in self._copies:
            kept = torch.arange(self.S) if self.packing is None else self.packing.kept
            each = tile_rows(latents * self.S)
            rows = token_rows([1] * latents, kept, self.S, each, side_by_side=True)
            self._copies[name, device] = rows.to(device)
        return self._copies[name, device]

    def arrange(self, x: Float[Tensor, "*batch tokens C"]) -> Float[Tensor, "*batch tokens C"]:
        """Raster order to block order."""
        return x.index_select(-2, self._placed("order", self.order, x.device))

    def restore(self, x: Float[Tensor, "*batch tokens C"]) -> Float[Tensor, "*batch tokens C"]:
        """Block order to raster order."""
        return x.index_select(-2, self._placed("raster", self.raster, x.device))
