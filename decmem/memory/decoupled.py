"""Decoupled memory (section 3.4): o = o_alm + G * o_sgm."""

from torch import Tensor, nn

from decmem.memory.anchored_local import AnchoredLocalMemory
from decmem.memory.base import Memory, MemoryConfig, Reading
from decmem.memory.coding import Coded, heads_first, opened
from decmem.memory.layout import TokenLayout
from decmem.memory.position import PositionConfig
from decmem.memory.sparse_global import SparseGlobalMemory


class DecoupledMemory(Memory):
    """Sparse global and anchored local memory on the same queries, keys and values."""

    def __init__(
        self, config: MemoryConfig, position: PositionConfig, layout: TokenLayout, width: int
    ) -> None:
        super().__init__(config, position, layout)
        self.sparse_global = SparseGlobalMemory(layout, config.retrieved, config.per_head)
        self.anchored_local = AnchoredLocalMemory(layout)
        gates = width // position.head_dim if config.gate_per_head else width
        self.gate = nn.Linear(width, gates)

    def gate_logits(self, reading: Reading) -> Tensor:
        """What G is the sigmoid of, (B, T, S, channels or heads): the present's features decide."""
        weight, bias = (p.to(reading.features.dtype) for p in (self.gate.weight, self.gate.bias))
        return nn.functional.linear(reading.features, weight, bias)

    def read(self, reading: Reading, coded: Coded, k: Tensor, v: Tensor) -> Tensor:
        o_alm = self.anchored_local(*self.window(reading, coded, k, v), reading.plan.windows)
        if not reading.recall.global_memory:
            return self.decode(reading, o_alm)
        candidates = reading.plan.block_candidates(self.layout.M, k.device)
        if reading.bank is None:
            pooled = self.sparse_global.pool(k[:, :, : candidates.shape[1] // self.layout.M])
        else:
            pooled = reading.bank.pooled[:, :, : candidates.shape[1]]

        def retrieve() -> Tensor:
            count = reading.recall.retrieved
            return self.sparse_global.retrieve(coded.q, pooled, candidates, count)

        lists = retrieve() if reading.recall.kept is None else reading.recall.kept(retrieve)
        o_sgm = self.sparse_global(coded.q, k, v, lists)
        gate = self.gate_logits(reading)
        if reading.recall.lens is not None:
            heads, D = k.shape[1], self.position.head_dim
            local, far = (heads_first(self.decode(reading, o), D) for o in (o_alm, o_sgm))
            reading.recall.lens.watch(self.layout, lists, local, opened(gate, heads) * far)
        return self.decode(reading, o_alm, o_sgm, gate)
