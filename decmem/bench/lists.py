"""What the global memory fetches: lists watched, and lists drawn uniformly at random.

Random weights may pick the same blocks everywhere and flatter the caches of a GPU. Random lists
are their worst case: the same work, with blocks from all over the history.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from decmem.memory import KeptLists


@dataclass(eq=False)
class WatchedLists(KeptLists):
    """Takes down how many different blocks each layer fetches for one head (or for all heads where
    they share a list), and how many it is asked for."""

    distinct: list[float] = field(default_factory=list)
    listed: list[float] = field(default_factory=list)

    def __call__(self, retrieve: Callable[[], Tensor]) -> Int[Tensor, "B G Nq K"]:
        lists = retrieve()
        heads = lists.flatten(0, 1)
        filled = [head[head >= 0] for head in heads]
        self.distinct.append(sum(len(head.unique()) for head in filled) / len(heads))
        self.listed.append(sum(len(head) for head in filled) / len(heads))
        return lists


@dataclass(eq=False)
class RandomLists(KeptLists):
    """Retrieves as ever and hands out other lists: as many blocks, drawn uniformly, ascending.

    Args:
        blocks: of the history. calls: layers, which all draw their own.
        count: blocks a list may have.
    """

    blocks: int = 0
    calls: int = 1
    count: int = 1

    def __call__(self, retrieve: Callable[[], Tensor]) -> Int[Tensor, "B G Nq K"]:
        found = retrieve()
        call, self._layer = self._layer % self.calls, self._layer + 1
        if call == len(self.lists):
            draw = torch.Generator(found.device).manual_seed(call)
            chance = torch.rand(*found.shape[:3], self.blocks, generator=draw, device=found.device)
            best = chance.topk(min(self.count, self.blocks), dim=-1).indices
            self.lists.append(best.sort(-1).values.to(torch.int32))
        drawn = self.lists[call]
        # A write pass asks for one branch where a denoising pass asks for two.
        asked = found.shape[2]
        return drawn if drawn.shape[2] == asked else drawn[:, :, :asked]
