"""Decoupled memory (section 3.4): o = o_alm + G * o_sgm."""

import torch
from torch import Tensor, nn

from decmem.memory.anchored_local import AnchoredLocalMemory
from decmem.memory.base import Memory, MemoryConfig, Reading, heads_first
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

    def gate_values(self, reading: Reading) -> Tensor:
        """G, (B, H, T, S, D) or (B, H, T, S, 1): a sigmoid of the present's features."""
        weight, bias = (p.to(reading.features.dtype) for p in (self.gate.weight, self.gate.bias))
        gate = torch.sigmoid(nn.functional.linear(reading.features, weight, bias))
        return heads_first(gate, 1 if self.config.gate_per_head else self.position.head_dim)

    def read(self, reading: Reading, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        local_q, local_k, seen = self.window(reading, q, k)
        o_alm = self.anchored_local(local_q, local_k, v[:, :, seen], reading.plan.windows)
        if not reading.recall.global_memory:
            return self.decode(reading, o_alm)
        candidates = reading.plan.block_candidates(self.layout.M, q.device)
        if reading.bank is None:
            pooled = self.sparse_global.pool(k[:, :, : candidates.shape[1] // self.layout.M])
        else:
            pooled = reading.bank.pooled[:, :, : candidates.shape[1]]
        lists = self.sparse_global.retrieve(q, pooled, candidates, reading.recall.retrieved)
        o_sgm = self.sparse_global(q, k, v, lists)
        # Equation 3, after R_cs: the gate sees both branches in the frame of the present.
        local = self.decode(reading, o_alm)
        gated = self.gate_values(reading) * self.decode(reading, o_sgm)
        if reading.recall.lens is not None:
            reading.recall.lens.watch(self.layout, lists, local, gated)
        return local + gated
