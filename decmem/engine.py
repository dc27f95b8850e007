"""One chunk's velocity again and again: both branches of guidance, as CUDA graphs where they run.

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

Finds = tuple[bool, bool]
"""Which of the two branches retrieve in a pass; the others read kept lists."""


@dataclass
class Branches:
    """Velocity with actions and, under guidance, without: what a denoising step asks for.

    Args:
        guidance: strength, None for one branch. dtype: of activations.
        share: the second branch reads the lists of the first.
        keep: lists may outlast a step.
    """

    model: WorldModel
    guidance: float | None
    dtype: torch.dtype
    recall: Recall
    share: bool = False
    keep: bool = False
    kept: tuple[KeptLists, KeptLists] = field(init=False)
    found: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        first = KeptLists()
        self.kept = (first, first if self.share else KeptLists())

    def finds(self, anew: bool, begun: bool = False) -> Finds:
        """Who retrieves in the next step: both if `anew` or where nothing is kept, but the second
        branch not where it shares. A first velocity that was `begun` in passing kept no lists."""
        anew = anew or begun or not self.found
        self.found = not begun
        return (anew, anew and (begun or not self.share))

    def velocity(
        self,
        z: Float[Tensor, "B T C h w"],
        at: Float[Tensor, "B T"],
        contexts: tuple[Context, Context | None],
        plan: Plan,
        bank: Bank,
        finds: Finds = (True, True),
        begun: Float[Tensor, "B T C h w"] | None = None,
        lens: Lens | None = None,
    ) -> Float[Tensor, "B T C h w"]:
        """Guided velocity of `z` at times `at`; a `lens` watches the first branch."""
        z = z.to(self.dtype)
        steered, free = contexts
        v = begun
        if v is None:
            v = self.model(z, at, steered, plan, bank, self._recall(0, finds, lens))
        if free is None or self.guidance is None:
            return v
        other = self.model(z, at, free, plan, bank, self._recall(1, finds, None))
        return flow.guide(v, other, self.guidance)

    def _recall(self, branch: int, finds: Finds, lens: Lens | None) -> Recall:
        if not self.keep and not self.share:
            return replace(self.recall, lens=lens)
        return replace(self.recall, lens=lens, kept=self.kept[branch].start(finds[branch]))


def serves(model: WorldModel, history: int, chunk: int) -> bool:
    """Whether an engine can work on a chunk behind so many latents: its window has to be full."""
    near = window_before(model.config.reading.reach, chunk)
    return near is not None and history >= near


class Engine:
    """Computes velocities at fixed addresses, for one bank while its arenas stay where they are.

    Args:
        branches: what is computed. bank: whose arenas are read; with room for the chunk.
        contexts, noise: of the shapes to come. capture: record CUDA graphs.
    """

    def __init__(
        self,
        branches: Branches,
        bank: Bank,
        contexts: tuple[Context, Context | None],
        noise: Float[Tensor, "B T C h w"],
        capture: bool,
    ) -> None:
        self.branches = branches
        self.capture = capture
        model, T, device = branches.model, noise.shape[1], noise.device
        reach, M = model.config.reading.reach, model.layout.M
        near = window_before(reach, T)
        assert near is not None
        self.near, self.own_candidates = near, reach.own_candidates
        self.key = engine_key(branches, bank, noise, capture)
        self.z = torch.empty_like(noise, dtype=torch.float32)
        self.at = torch.empty(noise.shape[:2], device=device)
        self.contexts = _twins(contexts, bank, near)
        self.reachable = torch.zeros(1, dtype=torch.long, device=device)
        slots, blocks = (torch.zeros(n, dtype=torch.long, device=device) for n in (T, T * M))
        self.desks = []
        for layer in bank.layers:
            B, H, _, S, D = layer.keys.shape
            shape = (B, H, near + T, S, D)
            k, v = (torch.empty(shape, dtype=branches.dtype, device=device) for _ in range(2))
            self.desks.append(Desk(slots, blocks, k, v))
        self.plan = desk_plan(reach, T, bank.layers[0].room, self.reachable)
        self.graphs: dict[Finds, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if capture else None

    def begin(self, bank: Bank, contexts: tuple[Context, Context | None]) -> None:
        """Lays out a chunk: its steering, its place in the arenas, and what its window reaches."""
        length, M = bank.length, bank.layout.M
        slots, blocks = self.desks[0].slots, self.desks[0].blocks
        T = len(slots)
        slots.copy_(torch.arange(length, length + T))
        blocks.copy_(torch.arange(length * M, (length + T) * M))
        self.reachable.fill_(length + T if self.own_candidates else length)
        for layer, desk in zip(bank.layers, self.desks, strict=True):
            near = layer.read(slice(length - self.near, length), self.branches.dtype)
            for place, part in zip((desk.keys, desk.values), near, strict=True):
                place[:, :, : self.near] = part
        for mine, given in zip(self.contexts, _twins(contexts, bank, self.near), strict=True):
            for place, part in zip(_tensors(mine), _tensors(given), strict=True):
                place.copy_(part)
        self.branches.found = False

    def velocity(
        self, bank: Bank, z: Float[Tensor, "B T C h w"], t: float, finds: Finds
    ) -> Float[Tensor, "B T C h w"]:
        """Guided velocity of `z` at time `t`; valid until the next call."""
        self.z.copy_(z)
        self.at.fill_(t)
        if not self.capture:
            return self._run(bank, finds)
        if finds not in self.graphs:
            self._record(bank, finds)
        graph, out = self.graphs[finds]
        graph.replay()
        return out

    @torch.no_grad()
    def _run(self, bank: Bank, finds: Finds) -> Tensor:
        try:
            for layer, desk in zip(bank.layers, self.desks, strict=True):
                layer.desk = desk
            return self.branches.velocity(self.z, self.at, self.contexts, self.plan, bank, finds)
        finally:
            for layer in bank.layers:
                layer.desk = None

    def _record(self, bank: Bank, finds: Finds) -> None:
        # Twice before: kernels are compiled, and libraries take their working memory.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._run(bank, finds)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # A server decodes on other threads meanwhile: what they call is no business of the capture.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out = self._run(bank, finds)
        self.graphs[finds] = (graph, out)


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


def _twins(
    contexts: tuple[Context, Context | None], bank: Bank, near: int
) -> tuple[Context, Context | None]:
    """Copies that know the times of what the window reaches only."""
    steered, free = (None if one is None else _twin(one, bank.length, near) for one in contexts)
    assert steered is not None
    return steered, free


def _twin(context: Context, length: int, near: int) -> Context:
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
