"""One chunk's velocity again and again, as CUDA graphs where they run.

Under guidance both branches are one pass, the chunk twice behind one history.
A graph records shapes and addresses. So the chunk is worked on at a desk (`decmem.memory.arena`):
the arena has its room, the window a place of its own, and a tensor on the device says how long the
history is. The same code runs without capture, on any device.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decmem import flow
from decmem.memory import Bank, KeptLists, Lens, Plan, Recall
from decmem.memory.arena import Desk
from decmem.memory.plan import desk_plan, window_before
from decmem.model import WorldModel
from decmem.model.world_model import Context


@dataclass
class Branches:
    """Velocity under guidance: what a denoising step asks for. Both branches are one pass of the
    model, the chunk twice behind one history, with its actions and without.

    Args:
        guidance: strength, None for one branch. dtype: of activations.
        share: the branch without actions reads the lists of the other.
        keep: lists may outlast a step.
    """

    model: WorldModel
    guidance: float | None
    dtype: torch.dtype
    recall: Recall
    share: bool = False
    keep: bool = False
    kept: KeptLists = field(init=False, default_factory=KeptLists)
    found: bool = field(init=False, default=False)

    @property
    def count(self) -> int:
        """Branches of a pass."""
        return 1 if self.guidance is None else 2

    def finds(self, anew: bool) -> bool:
        """Whether the next step retrieves: where nothing is kept it has to."""
        anew = anew or not self.found
        self.found = True
        return anew

    def velocity(
        self,
        z: Float[Tensor, "B T C h w"],
        at: Float[Tensor, "B T"],
        context: Context,
        plan: Plan,
        bank: Bank,
        find: bool = True,
        lens: Lens | None = None,
        owed: Float[Tensor, "B clean C h w"] | None = None,
    ) -> Float[Tensor, "B T C h w"]:
        """Guided velocity of `z` at times `at`; a `lens` watches the branch with actions.

        Clean latents `owed` to the bank are written in passing; such a pass keeps no lists.
        """
        latents, times = [z] * self.count, [at] * self.count
        if owed is not None:
            latents, times = [owed, *latents], [at.new_zeros(owed.shape[:2]), *times]
        kept = self.kept.start(find) if self.keep and owed is None else self.recall.kept
        recall = replace(self.recall, lens=lens, kept=kept, shared=self.share)
        given = torch.cat(latents, 1).to(self.dtype), torch.cat(times, 1)
        v = self.model(*given, context, plan, bank, recall)
        if self.guidance is None:
            return v
        steered, free = v.chunk(2, dim=1)
        return flow.guide(steered, free, self.guidance)


def serves(model: WorldModel, history: int, chunk: int) -> bool:
    """Whether an engine can work on a chunk behind so many latents: its window has to be full."""
    near = window_before(model.config.reading.reach, chunk)
    return near is not None and history >= near


class Engine:
    """Computes velocities at fixed addresses, for one bank while its arenas stay where they are.

    Args:
        branches: what is computed. bank: whose arenas are read; with room for the chunk.
        context, noise: of the shapes to come. capture: record CUDA graphs.
    """

    def __init__(
        self,
        branches: Branches,
        bank: Bank,
        context: Context,
        noise: Float[Tensor, "B T C h w"],
        capture: bool,
    ) -> None:
        self.branches = branches
        self.capture = capture
        model, T, device = branches.model, noise.shape[1], noise.device
        reach, M = model.config.reading.reach, model.layout.M
        near = window_before(reach, T)
        assert near is not None
        self.near = near
        self.key = engine_key(branches, bank, noise, capture)
        self.z = torch.empty_like(noise, dtype=torch.float32)
        self.at = torch.empty(noise.shape[:2], device=device)
        self.context = _twin(context, bank.length, near)
        self.length = torch.zeros(1, dtype=torch.long, device=device)
        passing = branches.count * T
        self.slots, self.blocks = (
            torch.zeros(n, dtype=torch.long, device=device) for n in (passing, passing * M)
        )
        # What nobody retrieves need not lie beside the history.
        place = (self.slots, self.blocks) if reach.own_candidates else (None, None)
        self.desks = []
        for layer in bank.layers:
            B, H, _, S, D = layer.keys.shape
            shape = (B, H, near + passing, S, D)
            k, v = (torch.empty(shape, dtype=branches.dtype, device=device) for _ in range(2))
            self.desks.append(Desk(*place, k, v))
        self.plan = desk_plan(reach, T, branches.count, bank.layers[0].room, self.length)
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if capture else None

    def begin(self, bank: Bank, context: Context) -> None:
        """Lays out a chunk: its steering, its place in the arenas, and what its window reaches."""
        length, M = bank.length, bank.layout.M
        torch.arange(length, length + len(self.slots), out=self.slots)
        torch.arange(length * M, length * M + len(self.blocks), out=self.blocks)
        self.length.fill_(length)
        for layer, desk in zip(bank.layers, self.desks, strict=True):
            near = layer.read(slice(length - self.near, length), self.branches.dtype)
            for place, part in zip((desk.keys, desk.values), near, strict=True):
                place[:, :, : self.near] = part
        given = _twin(context, length, self.near)
        for place, part in zip(_tensors(self.context), _tensors(given), strict=True):
            place.copy_(part)
        self.branches.found = False

    def velocity(
        self, bank: Bank, z: Float[Tensor, "B T C h w"], t: float, find: bool
    ) -> Float[Tensor, "B T C h w"]:
        """Guided velocity of `z` at time `t`; valid until the next call."""
        self.z.copy_(z)
        self.at.fill_(t)
        if not self.capture:
            return self._run(bank, find)
        if find not in self.graphs:
            self._record(bank, find)
        graph, out = self.graphs[find]
        graph.replay()
        return out

    @torch.no_grad()
    def _run(self, bank: Bank, find: bool) -> Tensor:
        try:
            for layer, desk in zip(bank.layers, self.desks, strict=True):
                layer.desk = desk
            return self.branches.velocity(self.z, self.at, self.context, self.plan, bank, find)
        finally:
            for layer in bank.layers:
                layer.desk = None

    def _record(self, bank: Bank, find: bool) -> None:
        # Twice before: kernels are compiled, and libraries take their working memory.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._run(bank, find)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # A server decodes on other threads meanwhile: what they call is no business of the capture.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out = self._run(bank, find)
        self.graphs[find] = (graph, out)


def engine_key(
    branches: Branches, bank: Bank, noise: Float[Tensor, "B T C h w"], capture: bool
) -> tuple:
    """What an engine was made for; another key needs another engine."""
    first = bank.layers[0]
    return (
        id(branches.model),
        branches.guidance,
        branches.dtype,
        branches.recall,
        branches.share,
        branches.keep,
        tuple(noise.shape),
        capture,
        first.room,
        first.keys.data_ptr(),
    )


def _twin(context: Context, length: int, near: int) -> Context:
    """A copy that knows the times of what the window reaches only."""
    key_time = context.key_time[length - near :]
    return Context(context.features.clone(), _clone(context.position), key_time.clone())


def _clone(part: Any) -> Any:
    """Tensors in named tuples, copied."""
    if isinstance(part, Tensor):
        return part.clone()
    return None if part is None else type(part)(*(_clone(one) for one in part))


def _tensors(part: object) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, Context):
        return _tensors((part.features, part.position, part.key_time))
    return [x for one in part for x in _tensors(one)] if isinstance(part, tuple) else []
