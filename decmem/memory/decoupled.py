"""Decoupled memory (section 3.4): o = o_alm + G * o_sgm."""

from torch import Tensor, nn

from decmem.memory.anchored_local import AnchoredLocalMemory
from decmem.memory.base import Memory, MemoryConfig, Reading
from decmem.memory.coding import Coded, heads_first, opened
from decmem.memory.layout import TokenLayout
from decmem.memory.lens import Lens
from decmem.memory.packing import spread
from decmem.memory.position import PositionConfig
from decmem.memory.sparse_global import SparseGlobalMemory
from decmem.ops.fp8 import Fp8Rows
from decmem.ops.window import tiled_near_and_far


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

    def read(self, reading: Reading, coded: Coded, k: Tensor, v: Tensor) -> Tensor | Fp8Rows:
        if not reading.recall.global_memory:
            return self.result(reading, self.near(self.anchored_local, reading, coded, k, v))
        lists = self._lists(reading, coded, k)
        o_alm, o_sgm = self._branches(reading, coded, k, v, lists)
        gate = self.gate_logits(reading)
        if reading.recall.lens is not None:
            self._watch(reading, reading.recall.lens, lists, o_alm, o_sgm, gate)
        return self.result(reading, o_alm, o_sgm, gate)

    def _branches(
        self, reading: Reading, coded: Coded, k: Tensor, v: Tensor, lists: Tensor
    ) -> tuple[Tensor, Tensor]:
        """o_alm and o_sgm, not decoded; side by side where windows are read in the bank."""
        bank, scales = reading.bank, (None, None)
        if bank is not None and bank.desk is not None and bank.desk.tiles is not None:
            counts, tiles = self.sparse_global.counts, bank.desk.tiles
            both = tiled_near_and_far(coded.q, k, v, tiles, lists, counts, coded.scale)
            if both is not None:
                return both
        if bank is not None and k.dtype != coded.k.dtype:
            scales = (bank.key_scale, bank.value_scale)
        o_alm = self.near(self.anchored_local, reading, coded, k, v)
        return o_alm, self.sparse_global(coded.q, k, v, lists, *scales, scale=coded.scale)

    def _lists(self, reading: Reading, coded: Coded, k: Tensor) -> Tensor:
        """What every block of the pass reads: (B, G, Nq, K)."""
        recall = reading.recall

        def retrieve() -> Tensor:
            return self._retrieved(reading, coded, k)

        return retrieve() if recall.kept is None else recall.kept(retrieve)

    def _retrieved(self, reading: Reading, coded: Coded, k: Tensor) -> Tensor:
        plan, recall, M = reading.plan, reading.recall, self.layout.M
        candidates = plan.block_candidates(M, k.device)
        if reading.bank is None:
            pooled = self.sparse_global.pool(k[:, :, : candidates.shape[-1] // M])
        else:
            pooled = reading.bank.pooled
            if plan.cursor is not None and plan.rows > 1:
                pooled = plan.cursor.runs_of(pooled, M)
            pooled = pooled[:, :, : candidates.shape[-1]]
        q, shared = plan.by_row(coded.q), recall.shared and plan.unsteered > 0
        if shared:
            q = q[:, :, : -plan.unsteered]
            candidates = candidates[..., : q.shape[2] * M, :]
        lists = self.sparse_global.retrieve(q, pooled, candidates, recall.retrieved)
        if shared:
            lists = plan.lists_for_all(lists, M)
        if plan.cursor is not None and plan.rows > 1:
            lists = plan.cursor.in_arena(lists, M)
        return lists

    def _watch(
        self,
        reading: Reading,
        lens: Lens,
        lists: Tensor,
        o_alm: Tensor,
        o_sgm: Tensor,
        gate: Tensor,
    ) -> None:
        """Shows the lens all but the unsteered latents."""
        heads, D = o_alm.shape[1], self.position.head_dim
        steered = o_alm.shape[2] - reading.plan.unsteered
        packing = self.layout.packing_on(o_alm.device)
        local, far = (
            spread(heads_first(self.decode(reading, o), D), packing, 3) for o in (o_alm, o_sgm)
        )
        gated = spread(opened(gate, heads), packing, 3) * far
        lists = lists[:, :, : steered * self.layout.M]
        lens.watch(self.layout, lists, local[:, :, :steered], gated[:, :, :steered])
