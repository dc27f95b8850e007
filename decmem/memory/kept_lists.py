"""Lists of retrieved blocks kept from one pass to the next: an option, off in the reproduction.

The paper retrieves anew in every layer, denoising step and branch of guidance.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from jaxtyping import Int
from torch import Tensor


@dataclass(eq=False)
class KeptLists:
    """What the layers of one chunk retrieved, layer by layer in the order of their calls.

    A pass begins with `start`: `find` True retrieves anew, False reads what the last finding pass
    kept. Kept tensors stay where they are, so that CUDA graphs find them.
    """

    lists: list[Int[Tensor, "B G Nq K"]] = field(default_factory=list)
    find: bool = True
    _layer: int = 0

    def start(self, find: bool) -> "KeptLists":
        """Begins a pass."""
        self.find, self._layer = find, 0
        return self

    def __call__(self, retrieve: Callable[[], Tensor]) -> Int[Tensor, "B G Nq K"]:
        """The next layer's lists."""
        layer, self._layer = self._layer, self._layer + 1
        if not self.find:
            return self.lists[layer]
        found = retrieve()
        if layer == len(self.lists):
            self.lists.append(found.clone())
        elif self.lists[layer].shape == found.shape:
            self.lists[layer].copy_(found)
        else:
            self.lists[layer] = found.clone()
        return self.lists[layer]
