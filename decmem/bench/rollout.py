"""Time per chunk of a roll-out, by the length of its history."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from decmem import flow
from decmem.bench.clock import median_ms
from decmem.bench.history import random_bank, wandering
from decmem.codec import DecoderStream
from decmem.experiment import Experiment
from decmem.memory import MemoryName, Recall
from decmem.sampler import Sampler
from decmem.world.version import FPS


@dataclass(frozen=True)
class RolloutBench:
    """What is timed: one chunk, all denoising steps and the write pass, behind `history` latents.

    Args:
        memories: decoupled, dense or window, side by side.
        steps, guidance, chunk: of the sampler; None takes the preset's.
        with_codec: decode the chunk to frames inside the clock.
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

    @torch.no_grad()
    def rows(self, watch: Callable[[str, int, int], None] | None = None) -> Iterator[dict]:
        """One row per memory and history; histories take turns, so that a machine that slows
        down slows all of them."""
        done, total = 0, len(self.memories) * len(self.histories)
        for memory in self.memories:
            for history in self.histories:
                yield self._row(memory, history)
                done += 1
                if watch is not None:
                    watch(f"{memory}, {history} latents", done, total)

    def _row(self, memory: MemoryName, history: int) -> dict[str, Any]:
        experiment = self.experiment.with_memory(memory)
        config = experiment.model
        torch.manual_seed(0)
        model = experiment.build_model().eval().requires_grad_(False).to(self.device)
        steps = self.steps or experiment.sampler.steps
        chunk = self.chunk or config.chunk
        times = flow.sampling_times(experiment.flow, steps)
        sampler = Sampler(model, times, self.guidance, self.dtype, Recall())
        bank = random_bank(model, history, self.dtype, history + chunk)
        steering = wandering(model, history, chunk)
        noise = sampler.noise([0], steering.time.tolist())
        codec = experiment.build_codec().eval().to(self.device) if self.with_codec else None
        stream = DecoderStream()

        def one_chunk() -> None:
            latents = sampler.generate(bank, steering, noise)
            sampler.write(bank, latents, steering)
            if codec is not None:
                codec.decode(latents, stream)
            bank.truncate(history)

        ms = median_ms(one_chunk, self.device, repeats=self.repeats)
        gpu = self.device.type == "cuda"
        return {
            "preset": experiment.name,
            "memory": memory,
            "steps": steps,
            "guidance": self.guidance,
            "chunk": chunk,
            "history": history,
            "device": torch.cuda.get_device_name(self.device) if gpu else "cpu",
            "gpu_count": 1 if gpu else 0,
            "dtype": str(self.dtype).removeprefix("torch."),
            "gemm_dtype": str(self.dtype).removeprefix("torch."),
            "bank_dtype": str(self.dtype).removeprefix("torch."),
            "retrieval": "every_step" if memory == "decoupled" else None,
            "lists": "own" if memory == "decoupled" else None,
            "ms_per_chunk": round(ms, 3),
            "fps": round(4 * chunk / ms * 1000, 3),
            "times_real_time": round(4 * chunk / ms * 1000 / FPS, 3),
            "bytes_per_latent": bank.bytes_per_latent,
            "covers": "dit+codec" if self.with_codec else "dit",
        }
