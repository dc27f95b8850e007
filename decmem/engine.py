"""A chunk's velocity again and again, as CUDA graphs where they run.

Under guidance both branches are one pass, the chunk twice behind one history; and so are chunks of
several worlds, whose histories lie in one bank (`decmem.memory.stable`) and may differ in length.
A graph records shapes and addresses. So chunks are worked on at a desk (`decmem.memory.arena`):
the arena has its room, the window a place of its own, and a tensor on the device says how long the
histories are. The same code runs without capture, on any device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from decmem import flow
from decmem.memory import Bank, KeptLists, Lens, Plan, Recall
from decmem.memory.arena import Desk
from decmem.memory.plan import desk_plan, window_before
from decmem.memory.surface import Sight
from decmem.model import WorldModel
from decmem.model.world_model import Context
from decmem.ops.rotary import Rotation
from decmem.ops.window import Tiles, hopper_tiles
from decmem.ops.window_blocks import block_size, placed_lists


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
    ) -> Float[Tensor, "B predicted C h w"]:
        """Guided velocity of `z` at times `at`; a `lens` watches the branch with actions.

        Clean latents `owed` to the bank are written in passing; such a pass keeps no lists.
        """
        latents, times = [z] * self.count, [at] * self.count
        if owed is not None:
            latents, times = [owed, *latents], [at.new_zeros(owed.shape[:2]), *times]
        kept = self.kept.start(find) if self.keep and owed is None else self.recall.kept
        recall = replace(self.recall, lens=lens, kept=kept, shared=self.share)
        worlds = len(z) // plan.rows  # rows lie side by side, as if they were latents of one world
        given = (torch.cat(x, 1) for x in (latents, times))
        both, when = (x.reshape(worlds, -1, *x.shape[2:]) for x in given)
        v = self.model(both.to(self.dtype), when, context, plan, bank, recall)
        v = v.reshape(len(z), v.shape[1] // plan.rows, *v.shape[2:])
        if self.guidance is None:
            return v
        steered, free = v.chunk(2, dim=1)
        return flow.guide(steered, free, self.guidance)


def serves(model: WorldModel, history: int, chunk: int) -> bool:
    """Whether an engine can work on a chunk behind so many latents: its window has to be full."""
    near = window_before(model.config.reading.reach, chunk)
    return near is not None and history >= near


class Row(NamedTuple):
    """A chunk at work: the bank it stands behind, the slot where this begins in the arenas that are
    read, and what steers the chunk."""

    bank: Bank
    first: int
    context: Context


class Engine:
    """Computes velocities at fixed addresses, while the arenas it reads stay where they are.

    Args:
        branches: what is computed. whole: the bank that is read. room: slots of its longest run.
        rows: as many and of such shapes as are to come: one of a bank of its own (and any number of
            worlds in step), or several of runs of `whole`, with a world each.
        noise: of the shape to come, a world of `whole` or a row each. capture: record CUDA graphs.
        beside: another engine that never computes at the same time: graphs share their memory.
        writes: latents that see each other in a write pass; 0 for an engine that denoises.
    """

    def __init__(
        self,
        branches: Branches,
        whole: Bank,
        room: int,
        rows: Sequence[Row],
        noise: Float[Tensor, "B T C h w"],
        capture: bool,
        beside: "Engine | None" = None,
        writes: int = 0,
    ) -> None:
        self.branches = branches
        self.capture = capture
        model, device = branches.model, noise.device
        reach, M = model.config.reading.reach, model.layout.M
        T = noise.shape[1]
        near = window_before(reach, min(writes, T) or T)
        assert near is not None
        self.writer: Engine | None = None
        self.key = engine_key(branches, whole, room, noise, capture)
        self.z = torch.empty_like(noise, dtype=torch.float32)
        self.at = torch.empty(noise.shape[:2], device=device)
        self.context = _joined(rows, near)
        self.T, self.near = branches.count * T, near

        def whole_numbers(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.long, device=device)

        self.first, self.length = whole_numbers(len(rows)), whole_numbers(len(rows))
        self.seen = whole_numbers(len(rows) * near)
        self.slots = whole_numbers(len(rows) * self.T)
        self.blocks = whole_numbers(len(rows) * self.T * M)
        # What is neither written nor retrieved need not lie beside the history.
        kept = bool(writes) or reach.own_candidates
        own = (self.slots, self.blocks) if kept else (None, None)
        self.plan = desk_plan(reach, T, branches.count, room, self.first, self.length, writes)
        self.windows = self._windows_in(whole, len(rows)) if kept else None
        B, H, _, S, D = whole.layers[0].keys.shape
        reached = 0 if self.windows is not None else len(rows) * (near + self.T)
        shape = (B, H, reached, S, D)
        k, v = (torch.empty(shape, dtype=branches.dtype, device=device) for _ in range(2))
        tiles = self.windows
        placed = None if tiles is None else tiles._replace(lists=tiles.lists.clone())
        self.desk = Desk(self.seen, *own, k, v, placed)
        self.graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = None if beside is None else beside.pool
        if capture and self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()

    def _windows_in(self, whole: Bank, rows: int) -> Tiles | None:
        """Tiles that read windows in the arenas, their lists counted from what these reach on; None
        where they are fetched first."""
        model, stored = self.branches.model, whole.layers[0].keys
        if whole.dtype != self.branches.dtype or not model.config.position.global_time:
            return None
        B, H, _, S, D = stored.shape
        q = stored.new_empty(B, H, rows * self.T, S, D)
        packing = model.layout.packing
        kept = None if packing is None else packing.kept
        return hopper_tiles(q, stored, self.plan.windows, model.layout.counts, kept)

    def begin(self, rows: Sequence[Row]) -> None:
        """Lays out chunks: what steers them, and their places in the arenas."""
        first = torch.tensor([row.first for row in rows])
        length = torch.tensor([row.bank.length for row in rows])
        ends, M = (first + length)[:, None], rows[0].bank.layout.M
        self.first.copy_(first)
        self.length.copy_(length)
        self.seen.copy_((ends + torch.arange(-self.near, 0)).flatten())
        self.slots.copy_((ends + torch.arange(self.T)).flatten())
        self.blocks.copy_((ends * M + torch.arange(self.T * M)).flatten())
        if self.windows is not None:
            layout = rows[0].bank.layout
            blocks = layout.S // block_size(layout.S, layout.counts)
            reached = torch.cat((self.seen, self.slots))
            assert self.desk.tiles is not None
            self.desk.tiles.lists.copy_(placed_lists(self.windows.lists, reached, blocks))
        given = _joined(rows, self.near)
        for place, part in zip(_tensors(self.context), _tensors(given), strict=True):
            place.copy_(part)
        self.branches.found = False

    def velocity(
        self, whole: Bank, z: Float[Tensor, "B T C h w"], t: float, find: bool
    ) -> Float[Tensor, "B predicted C h w"]:
        """Guided velocity of `z` at time `t`; valid until the next call."""
        self.z.copy_(z)
        self.at.fill_(t)
        if not self.capture:
            return self._run(whole, find)
        if find not in self.graphs:
            self._record(whole, find)
        graph, out = self.graphs[find]
        graph.replay()
        return out

    @torch.no_grad()
    def _run(self, whole: Bank, find: bool) -> Tensor:
        try:
            for layer in whole.layers:
                layer.desk = self.desk
            return self.branches.velocity(self.z, self.at, self.context, self.plan, whole, find)
        finally:
            for layer in whole.layers:
                layer.desk = None

    def write(self, whole: Bank, latents: Float[Tensor, "B T C h w"]) -> None:
        """Stages clean latents behind the histories: what an engine is for that `writes`."""
        self.velocity(whole, latents, 0.0, True)

    def _record(self, whole: Bank, find: bool) -> None:
        # Twice before: kernels are compiled, and libraries take their working memory.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._run(whole, find)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # A server decodes on other threads meanwhile: what they call is no business of the capture.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            out = self._run(whole, find)
        self.graphs[find] = (graph, out)


def engine_key(
    branches: Branches, whole: Bank, room: int, noise: Float[Tensor, "B T C h w"], capture: bool
) -> tuple:
    """What an engine was made for; another key needs another engine."""
    return (
        id(branches.model),
        branches.guidance,
        branches.dtype,
        branches.recall,
        branches.share,
        branches.keep,
        tuple(noise.shape),
        capture,
        (room, whole.layers[0].keys.data_ptr()),
    )


def writer_of(
    engine: object,
    branches: Branches,
    whole: Bank,
    room: int,
    rows: Sequence[Row],
    latents: Float[Tensor, "B T C h w"],
    writes: int,
) -> Engine | None:
    """What writes chunks like those that `engine` denoises, laid out for these; None where that is
    none, or was made for other arenas or chunks."""
    if not isinstance(engine, Engine) or engine.z.shape != latents.shape:
        return None
    key = engine_key(branches, whole, room, latents, engine.capture)
    if key[-1] != engine.key[-1]:
        return None
    if engine.writer is None or engine.writer.key != key:
        engine.writer = None
        engine.writer = Engine(branches, whole, room, rows, latents, engine.capture, engine, writes)
    engine.writer.begin(rows)
    return engine.writer


def _joined(rows: Sequence[Row], near: int) -> Context:
    """One context of all rows' latents, with the times of what their windows reach in front of
    their own. Only differences of time matter there, and every row counts from its own start."""
    contexts = [row.context for row in rows]
    times = [row.context.key_time[row.bank.length - near :] for row in rows]
    times = [time - time[0] for time in times]
    positions = [one.position for one in contexts]
    first = positions[0]
    sights = [one.sight for one in positions if one.sight is not None]
    position = first._replace(
        projection=torch.cat([one.projection for one in positions], 2),
        unprojection=torch.cat([one.unprojection for one in positions], 2),
        time=Rotation(*(torch.cat(x) for x in zip(*(p.time for p in positions), strict=True))),
        space=Rotation(*(x.clone() for x in first.space)),
        sight=Sight(*(torch.cat(x, 1) for x in zip(*sights, strict=True))) if sights else None,
    )
    return Context(
        torch.cat([one.features for one in contexts], 1),
        position,
        torch.cat([time[:near] for time in times] + [time[near:] for time in times]),
    )


def _tensors(part: object) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, Context):
        return _tensors((part.features, part.position, part.key_time))
    return [x for one in part for x in _tensors(one)] if isinstance(part, tuple) else []
