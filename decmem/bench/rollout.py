"""Time per chunk of a roll-out, by the length of its history."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from decmem import flow
from decmem.bench.clock import median_ms
from decmem.bench.history import random_bank, wandering
from decmem.bench.lists import RandomLists, WatchedLists
from decmem.codec import DecoderStream, SideDecoder
from decmem.errors import UserError
from decmem.experiment import Experiment
from decmem.memory import Bank, MemoryName, Recall
from decmem.model import Conditions, WorldModel
from decmem.sampler import Running, Sampler


@dataclass(frozen=True)
class RolloutBench:
    """What is timed: one chunk, all denoising steps and the write pass, behind `history` latents.

    Args:
        memories: decoupled, dense or window, side by side.
        steps, guidance, chunk: of the sampler; None takes the preset's steps and chunk, and no
            guidance.
        with_codec: decode the chunk to frames inside the clock, as `Session` does: on a GPU beside
            the write pass.
        running: how chunks are computed; the room of its bank is the benchmark's business. With a
            `pair` both processes make the same calls, and either's rows tell of both.
        random_lists: one more row for each history of the decoupled memory, with uniformly random
            lists.
        gemm_dtype: of the blocks' matrix products; None: of the activations.
    """

    experiment: Experiment
    device: torch.device
    dtype: torch.dtype
    histories: Sequence[int]
    memories: Sequence[MemoryName] = ("decoupled", "dense")
    steps: int | None = None
    guidance: float | None = None
    chunk: int | None = None
    with_codec: bool = False
    repeats: int = 7
    running: Running = field(default_factory=Running)
    random_lists: bool = False
    gemm_dtype: torch.dtype | None = None

    @torch.no_grad()
    def rows(
        self, watch: Callable[[str, int, int], None] | None = None
    ) -> Iterator[tuple[dict[str, Any] | None, dict[str, Any]]]:
        """One row per memory and history, and what else was seen while it was timed.

        A history that the device has no room for has no row, and says so.
        """
        plan: list[tuple[MemoryName, bool, int]] = [
            (memory, random, history)
            for memory in self.memories
            for random in ((False, True) if self.random_lists else (False,))
            for history in self.histories
            if memory == "decoupled" or not random
        ]
        model, built = None, None
        for done, (memory, random, history) in enumerate(plan):
            if model is None or built != memory:
                model, built = self._model(memory), memory
            try:
                yield self._row(model, memory, history, random)
            except (UserError, torch.OutOfMemoryError) as failure:
                reason = str(failure).splitlines()[0]
                yield None, {"memory": memory, "history": history, "failure": reason}
            if watch is not None:
                lists = ", random lists" if random else ""
                watch(f"{memory}{lists}, {history} latents", done + 1, len(plan))

    def _model(self, memory: MemoryName) -> WorldModel:
        torch.manual_seed(0)
        with torch.device(self.device):
            model = WorldModel(self.experiment.with_memory(memory).model)
        model.to(self.device).eval().requires_grad_(False)
        model.hold_weights(self.dtype, self.gemm_dtype)
        return model

    @property
    def latents(self) -> int:
        """Of a chunk."""
        return self.chunk or self.experiment.model.chunk

    def _sampler(self, model: WorldModel, history: int, random: bool) -> Sampler:
        steps = self.steps or self.experiment.sampler.steps
        branches = 1 if self.guidance is None or self.running.pair is not None else 2
        room = history + branches * self.latents
        recall = Recall(retrieved=self.experiment.sampler.retrieved)
        run = dataclasses.replace(self.running, room=room)
        if random:
            # Both branches draw their own, and every step selects before it is given them.
            run = dataclasses.replace(run, retrieve_until=None, share_lists=False)
            config = model.config
            drawn = RandomLists(
                blocks=history * model.layout.M,
                calls=config.layers,
                count=recall.retrieved or config.reading.retrieved,
            )
            recall = dataclasses.replace(recall, kept=drawn)
        times = flow.sampling_times(self.experiment.flow, steps)
        return Sampler(model, times, self.guidance, self.dtype, recall, run)

    def _row(
        self, model: WorldModel, memory: MemoryName, history: int, random: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        sampler = self._sampler(model, history, random)
        stored = self.running.bank_dtype or self.dtype
        bank = random_bank(model, history, stored, sampler.running.room)
        steering = wandering(model, history, self.latents)
        noise = sampler.noise([0], steering.time.tolist())
        codec = self.experiment.build_codec().eval().to(self.device) if self.with_codec else None
        decoder = None if codec is None else SideDecoder(codec, self.device)
        stream = DecoderStream()

        def one_chunk() -> None:
            latents = sampler.generate(bank, steering, noise)
            finished = None if decoder is None else decoder.begin(latents, stream)
            sampler.write(bank, latents, steering)
            if finished is not None:
                finished()
            bank.truncate(history)

        ms = median_ms(one_chunk, self.device, repeats=self.repeats)
        decoupled, run = memory == "decoupled", sampler.running
        until, steps = run.retrieve_until, len(sampler.times) - 1
        reused = until is not None and until < steps
        retrieval = "random" if random else "reused" if reused else "every_step"
        shared = run.share_lists and self.guidance is not None
        row = {
            "preset": self.experiment.name,
            "memory": memory,
            "steps": steps,
            "guidance": self.guidance,
            "history": history,
            "device": torch.cuda.get_device_name(self.device) if gpu else "cpu",
            "gpu_count": (1 if run.pair is None else run.pair.place.world) if gpu else 0,
            "parallel": None if run.pair is None else "guidance",
            "dtype": _name(self.dtype),
            "gemm_dtype": _name(self.gemm_dtype or self.dtype),
            "bank_dtype": _name(stored),
            "retrieval": retrieval if decoupled else None,
            "lists": ("shared" if shared else "own") if decoupled else None,
            "ms_per_chunk": round(ms, 3),
            "fps": round(4 * self.latents / ms * 1000, 3),
            "bytes_per_latent": bank.bytes_per_latent,
            "covers": "dit+codec" if self.with_codec else "dit",
        }
        seen = {
            "memory": memory,
            "history": history,
            "retrieval": row["retrieval"],
            "engine": None if bank.engine is None else run.graphs,
            "bank_bytes": bank.allocated_bytes,
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if gpu else None,
        }
        if decoupled:
            seen |= self._fetched(sampler, bank, steering)
        return row, seen

    def _fetched(self, sampler: Sampler, bank: Bank, steering: Conditions) -> dict[str, Any]:
        """Blocks that a branch of one pass fetches: mean over layers, the fewest and the most."""
        chosen = sampler.recall.kept
        if isinstance(chosen, RandomLists):
            one_branch = slice(self.latents * bank.layout.M)
            drawn = [lists[:, :, one_branch] for lists in chosen.lists]
            distinct = [
                sum(len(head.unique()) for head in lists.flatten(0, 1)) / lists.shape[1]
                for lists in drawn
            ]
            listed = drawn[0].shape[-1] * drawn[0].shape[-2]
        else:
            watched = WatchedLists()
            once = dataclasses.replace(
                sampler,
                times=sampler.times[:1] + sampler.times[-1:],
                guidance=None,
                recall=Recall(kept=watched),
                running=Running(graphs="off"),
            )
            once.generate(bank, steering, sampler.noise([0], steering.time.tolist()))
            distinct, listed = watched.distinct, max(watched.listed)
        return {
            "blocks": bank.length * bank.layout.M,
            "listed_blocks": listed,
            "distinct_blocks": {
                "mean": round(sum(distinct) / len(distinct), 1),
                "fewest": round(min(distinct), 1),
                "most": round(max(distinct), 1),
            },
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
