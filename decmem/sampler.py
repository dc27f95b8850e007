"""The sampler: denoises a chunk behind a bank, and writes clean chunks into it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from decmem import flow
from decmem.engine import Branches, Engine, Row, engine_key, serves, writer_of
from decmem.errors import UserError
from decmem.guidance_pair import GuidancePair, Velocity
from decmem.memory import Bank, Lens, Recall, bank_plan, joint_plan
from decmem.memory.stable import Stable
from decmem.model import Conditions, WorldModel
from decmem.model.conditioning import camera_centres
from decmem.model.world_model import Context

_MOST_ROWS = 16
"""Worlds of one pass."""

_NOISE_STREAM = 0x9E3779B97F4A7C15  # keeps the noise of neighbouring seeds apart


@dataclass(frozen=True)
class Running:
    """How chunks are computed where the model leaves a choice; what stands here is the paper's way.

    Args:
        retrieve_until: denoising steps that retrieve; the lists of the last of them serve all
            later steps. None retrieves in every step.
        share_lists: guidance's branch without actions reads the lists of the other.
        bank_dtype: of stored keys and values, None for that of the activations.
        room, limit: latents the bank has room for at first, and at most (None: no limit); beside
            them a chunk passes through once more where one pass computes both branches of guidance.
        graphs: "auto" records the denoising step as CUDA graphs on a GPU; "eager" runs the same
            code without recording, anywhere; "off" does neither.
        pair: two processes share out the branches of guidance; None computes both in one pass.

    Raises:
        UserError: for no step that retrieves, and for lists shared between two processes.
    """

    retrieve_until: int | None = None
    share_lists: bool = False
    bank_dtype: torch.dtype | None = None
    room: int = 64
    limit: int | None = None
    graphs: Literal["auto", "eager", "off"] = "auto"
    pair: GuidancePair | None = None

    def __post_init__(self) -> None:
        if self.retrieve_until is not None and self.retrieve_until < 1:
            problem = f"{self.retrieve_until} steps"
            raise UserError("retrieve_until", problem, "Retrieve in at least 1")
        if self.share_lists and self.pair is not None:
            problem = "the branches of guidance are computed by two processes"
            raise UserError("share_lists", problem, "Leave it out, or start one process")


class Chunk(NamedTuple):
    """A chunk of one world behind its bank: noise to denoise, or clean latents to write."""

    bank: Bank
    conditions: Conditions
    latents: Float[Tensor, "1 T C h w"]


@dataclass
class Sampler:
    """A model with the settings it is sampled with. Nothing of it is traced for gradients, whoever
    calls: with a trace the operations round differently, and one past gives one bank.

    Args:
        times: of the Euler solver, from 1 to 0. guidance: strength of action guidance or None.
        dtype: of activations. recall: how the global memory is read. running: how it is computed.

    Raises:
        UserError: for a pair of processes without guidance.
    """

    model: WorldModel
    times: list[float]
    guidance: float | None
    dtype: torch.dtype
    recall: Recall
    running: Running = field(default_factory=Running)

    def __post_init__(self) -> None:
        if self.running.pair is not None:
            self.running.pair.require(self.guidance)

    def new_bank(self, anchor: Float[Tensor, "B 3"]) -> Bank:
        """An empty bank as this sampler stores it.

        Raises:
            UserError: as `Bank`.
        """
        run = self.running
        room = run.room if run.limit is None else min(run.room, run.limit)
        room += (self._branches().count - 1) * self.model.config.chunk
        return self.model.new_bank(anchor, run.bank_dtype or self.dtype, room, run.limit)

    def new_stable(self, latents: int) -> Stable:
        """Room for worlds that are dreamt together (`generate_together`): so many latents in all,
        a chunk behind each world's last included.

        Raises:
            UserError: as `Bank`.
        """
        dtype, passing = self.running.bank_dtype or self.dtype, self.model.config.chunk
        return Stable(self.model.new_bank(torch.zeros(1, 3), dtype, latents), passing)

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device

    @property
    def write_chunk(self) -> int:
        """Latents that see each other in the write pass."""
        return self.model.config.reading.reach.write_chunk or self.model.config.chunk

    @property
    def piece(self) -> int:
        """Latents of one parallel write pass: whole chunks, for one that was cut in two would
        see less of itself."""
        chunk = self.write_chunk
        return max(1, (64 if self.device.type == "cuda" else 16) // chunk) * chunk

    def noise(self, seeds: Sequence[int], index: Sequence[int]) -> Float[Tensor, "B T C h w"]:
        """The noise of these latents in these worlds: a function of seed and index alone."""
        config = self.model.config
        shape = (config.latent_channels, *config.latent_size)

        def draw(seed: int, i: int) -> Tensor:
            mixed = (seed * _NOISE_STREAM + i) % 2**63
            return torch.randn(shape, generator=torch.Generator().manual_seed(mixed))

        worlds = [torch.stack([draw(seed, i) for i in index]) for seed in seeds]
        return torch.stack(worlds).to(self.device)

    @torch.no_grad()
    def generate(
        self,
        bank: Bank,
        conditions: Conditions,
        noise: Float[Tensor, "B T C h w"],
        lens: Lens | None = None,
        owed: tuple[Tensor, Conditions] | None = None,
    ) -> Float[Tensor, "B T C h w"]:
        """Denoises one chunk behind the history; nothing of it is committed.

        A `lens` watches the last step, where the picture is all but there. Clean latents that are
        still `owed` to the bank are written along with the first step: one pass for two.
        """
        self._keep_near(bank, conditions)
        B, T = noise.shape[:2]
        begun = None if owed is None else self._write_and_begin(bank, owed, conditions, noise)
        context = self._context(bank, conditions, T)
        branches = self._branches()
        reach = self.model.config.reading.reach
        plan = joint_plan(reach, bank.length, 0, self.write_chunk, T, branches.count)
        engine = self._engine(bank, context, noise)
        until = self.running.retrieve_until

        def velocity(z: Tensor, t: float) -> Tensor:
            step = self.times.index(t)
            if step == 0 and begun is not None:
                return begun
            watched = lens if step == len(self.times) - 2 else None
            anew = until is None or step < until
            if engine is not None and watched is None:
                return engine.velocity(bank, z, t, engine.branches.finds(anew))
            if engine is not None and not anew and engine.branches.found:
                branches.kept, branches.found = engine.branches.kept, True
            at = torch.full((B, T), t, device=self.device)
            return branches.velocity(z, at, context, plan, bank, branches.finds(anew), watched)

        return flow.solve(self._guided(velocity), noise, self.times)

    @torch.no_grad()
    def generate_together(
        self, stable: Stable, chunks: Sequence[Chunk]
    ) -> list[Float[Tensor, "1 T C h w"]]:
        """What `generate` gives for each of these chunks of different worlds.

        One pass computes all that can go together: chunks of one size, of worlds that have a stall
        and a history that fills the window. Without an engine, and for others, it is one by one.
        """
        T, branches = chunks[0].latents.shape[1], self._branches().count
        groups = self._company(stable, chunks, T, branches)
        # What goes alone goes first: it may run into the limit of its history.
        made = {i: self.generate(*chunks[i]) for i in _rest(chunks, groups)}
        for group in groups:
            latents = self._generate_rows(stable, [chunks[i] for i in group])
            made.update(zip(group, latents, strict=True))
        return [made[i] for i in range(len(chunks))]

    @torch.no_grad()
    def write_together(self, stable: Stable, chunks: Sequence[Chunk]) -> None:
        """`write` for each of these clean chunks of different worlds, in one pass for those that
        were denoised in one."""
        each = min(self.write_chunk, chunks[0].latents.shape[1])
        groups = self._company(stable, chunks, each, 1)
        for i in _rest(chunks, groups):
            self.write(chunks[i].bank, chunks[i].latents, chunks[i].conditions)
        for group in groups:
            self._write_rows(stable, [chunks[i] for i in group])

    def _company(
        self, stable: Stable, chunks: Sequence[Chunk], window_of: int, branches: int
    ) -> list[list[int]]:
        """Which chunks share a pass, in groups. The window is that of `window_of` latents."""
        shape = chunks[0].latents.shape

        def joins(bank: Bank, latents: Tensor) -> bool:
            layer, T = bank.layers[0], shape[1]
            return (
                stable.stall(bank) is not None
                and latents.shape == shape
                and serves(self.model, bank.length, window_of)
                and (layer.limit is None or bank.length + T <= layer.limit)
                and bank.length + branches * T <= layer.room
            )

        if self._graphs == "off":
            return []
        together = [i for i, chunk in enumerate(chunks) if joins(chunk.bank, chunk.latents)]
        groups = [
            together[first : first + _MOST_ROWS] for first in range(0, len(together), _MOST_ROWS)
        ]
        return [group for group in groups if len(group) > 1]

    def _generate_rows(self, stable: Stable, chunks: Sequence[Chunk]) -> list[Tensor]:
        for bank, conditions, _ in chunks:
            self._keep_near(bank, conditions)
        contexts = [self._context(one.bank, one.conditions, one.latents.shape[1]) for one in chunks]
        rows, noise = _rows(stable, chunks, contexts)
        branches, capture = self._branches(), self._graphs == "auto"
        key = engine_key(branches, stable.whole, stable.widest, noise, capture)
        engine = stable.engines.get(len(rows))
        if not isinstance(engine, Engine) or engine.key != key:
            stable.engines.pop(len(rows), None)
            beside = next(iter(stable.engines.values()), None)
            engine = stable.engines[len(rows)] = Engine(
                branches, stable.whole, stable.widest, rows, noise, capture,
                beside if isinstance(beside, Engine) else None,
            )  # fmt: skip
        engine.begin(rows)
        until = self.running.retrieve_until

        def velocity(z: Tensor, t: float) -> Tensor:
            anew = until is None or self.times.index(t) < until
            return engine.velocity(stable.whole, z, t, engine.branches.finds(anew))

        made = flow.solve(self._guided(velocity), noise, self.times)
        return list(made[: len(chunks)].split(1))

    def _write_rows(self, stable: Stable, chunks: Sequence[Chunk]) -> None:
        contexts = [self.model.context(one.conditions, one.bank) for one in chunks]
        rows, clean = _rows(stable, chunks, contexts)
        engine = stable.engines.get(len(rows))
        if not self._written_at_desk(engine, stable.whole, stable.widest, rows, clean):
            for bank, known, latents in chunks:
                self.write(bank, latents, known)
            return
        for bank, known, _ in chunks:
            bank.commit(known.cameras, known.lens, known.time)

    def _written_at_desk(
        self, engine: object, whole: Bank, room: int, rows: Sequence[Row], clean: Tensor
    ) -> bool:
        """Stages clean chunks as a recorded pass, where there is an engine for such chunks."""
        branches = Branches(self.model, None, self.dtype, self.recall)
        writer = writer_of(engine, branches, whole, room, rows, clean, self.write_chunk)
        if writer is not None:
            writer.write(whole, clean)
        return writer is not None

    @property
    def _graphs(self) -> Literal["auto", "eager", "off"]:
        """How an engine would run here; graphs are for a GPU alone."""
        wanted = self.running.graphs
        return "off" if wanted == "auto" and self.device.type != "cuda" else wanted

    def _context(self, bank: Bank, conditions: Conditions, chunk: int) -> Context:
        """Of these latents; under guidance the last `chunk` follow once more, without actions. In
        the second process of a pair they come without actions the only time."""
        pair = self.running.pair
        if self.guidance is None or (pair is not None and pair.steered):
            return self.model.context(conditions, bank)
        again = conditions[-chunk:]
        both = self.model.context(conditions.then(again) if pair is None else conditions, bank)
        nobody = torch.zeros(len(conditions.lens), dtype=torch.bool, device=self.device)
        unsteered = self.model.context(again, bank, nobody)
        features = torch.cat((both.features[:, :-chunk], unsteered.features), 1)
        return replace(both, features=features)

    def _branches(self) -> Branches:
        """Those of a pass: one where a pair shares them out."""
        run = self.running
        guidance = self.guidance if run.pair is None else None
        share, keep = run.share_lists and guidance is not None, run.retrieve_until is not None
        return Branches(self.model, guidance, self.dtype, self.recall, share, keep)

    def _guided(self, velocity: Velocity) -> Velocity:
        """The velocity of the branches of a pass, completed by the other process of a pair."""
        pair, strength = self.running.pair, self.guidance
        return velocity if pair is None or strength is None else pair.guided(velocity, strength)

    def _engine(
        self, bank: Bank, context: Context, noise: Float[Tensor, "B T C h w"]
    ) -> Engine | None:
        """The bank's engine with this chunk laid out; None where there is none to be had."""
        T = noise.shape[1]
        if self._graphs == "off" or not serves(self.model, bank.length, T):
            return None
        branches, capture = self._branches(), self._graphs == "auto"
        bank.reserve(bank.length + branches.count * T, (branches.count - 1) * T)
        engine, room, rows = bank.engine, bank.layers[0].room, [Row(bank, 0, context)]
        key = engine_key(branches, bank, room, noise, capture)
        if not isinstance(engine, Engine) or engine.key != key:
            bank.engine = None  # its memory is free before the next one's is taken
            engine = bank.engine = Engine(branches, bank, room, rows, noise, capture)
        engine.begin(rows)
        return engine

    def _write_and_begin(
        self,
        bank: Bank,
        owed: tuple[Tensor, Conditions],
        conditions: Conditions,
        noise: Float[Tensor, "B T C h w"],
    ) -> Float[Tensor, "B T C h w"]:
        """Writes what is owed and gives the first velocity of the chunk behind it."""
        latents, known = owed
        clean, T = latents.shape[1], noise.shape[1]
        branches, reach = self._branches(), self.model.config.reading.reach
        plan = joint_plan(reach, bank.length, clean, self.write_chunk, T, branches.count)
        at = torch.full(noise.shape[:2], self.times[0], device=self.device)
        context = self._context(bank, known.then(conditions), T)
        begun = branches.velocity(noise, at, context, plan, bank, owed=latents)
        bank.commit(known.cameras, known.lens, known.time)
        return begun

    @torch.no_grad()
    def write(
        self, bank: Bank, latents: Float[Tensor, "B T C h w"], conditions: Conditions
    ) -> None:
        """The write pass: clean latents through the model, their keys and values into the bank.

        Many latents go in pieces, each a parallel pass: the same bank in bounded working memory.
        """
        reach, chunk = self.model.config.reading.reach, self.write_chunk
        for start in range(0, latents.shape[1], self.piece):
            part = slice(start, start + self.piece)
            clean, known = latents[:, part].to(self.dtype), conditions[part]
            B, T = clean.shape[:2]
            context = self.model.context(known, bank)
            bank.reserve(bank.length + T)
            room, rows = bank.layers[0].room, [Row(bank, 0, context)]
            if (
                self._graphs == "off"
                or not serves(self.model, bank.length, min(chunk, T))
                or not self._written_at_desk(bank.engine, bank, room, rows, clean)
            ):
                plan = bank_plan(reach, bank.length, T, chunk, writes=True)
                still = torch.zeros(B, T, device=self.device)
                self.model(clean, still, context, plan, bank, self.recall)
            bank.commit(known.cameras, known.lens, known.time)

    def _keep_near(self, bank: Bank, conditions: Conditions) -> None:
        """Moves the bank's anchor along once a world has walked half the trusted reach away."""
        reach = self.model.config.position.reach
        here = camera_centres(conditions.cameras[:, 0]).cpu()
        far = (here - bank.anchor).norm(dim=-1) > reach / 2
        if reach and bool(far.any()):
            bank.rebase(torch.where(far[:, None], here, bank.anchor))


def _rest(chunks: Sequence[Chunk], groups: list[list[int]]) -> list[int]:
    return sorted(set(range(len(chunks))).difference(*groups))


def _rows(
    stable: Stable, chunks: Sequence[Chunk], contexts: list[Context]
) -> tuple[list[Row], Float[Tensor, "rows T C h w"]]:
    """The rows of a pass and their latents; idle ones, up to a power of two, repeat the first."""
    rows = []
    for chunk, context in zip(chunks, contexts, strict=True):
        stall = stable.stall(chunk.bank)
        assert stall is not None
        rows.append(Row(chunk.bank, stall.start, context))
    idle = (1 << (len(rows) - 1).bit_length()) - len(rows)
    latents = [chunk.latents for chunk in chunks]
    return rows + rows[:1] * idle, torch.cat(latents + latents[:1] * idle)
