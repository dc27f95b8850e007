"""Window and dense attention: the local branch alone, with a short or an endless window."""

from torch import Tensor

from decmem.memory.anchored_local import AnchoredLocalMemory
from decmem.memory.base import Memory, MemoryConfig, Reading
from decmem.memory.coding import Coded
from decmem.memory.layout import TokenLayout
from decmem.memory.position import PositionConfig
from decmem.ops.fp8 import Fp8Rows


class WindowMemory(Memory):
    """Attention over the plan's windows and nothing else.

    With `Reach.window=None` this is dense attention, the first training stage of the paper.
    """

    def __init__(
        self, config: MemoryConfig, position: PositionConfig, layout: TokenLayout, width: int
    ) -> None:
        super().__init__(config, position, layout)
        self.local = AnchoredLocalMemory(layout)

    def read(self, reading: Reading, coded: Coded, k: Tensor, v: Tensor) -> Tensor | Fp8Rows:
        return self.result(reading, self.near(self.local, reading, coded, k, v))
