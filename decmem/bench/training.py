"""Time of a training step of the world model: forward and backward over [clean | noisy]."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from decmem.bench.clock import median_ms
from decmem.bench.history import wandering
from decmem.experiment import Experiment
from decmem.memory import Plan, training_plan
from decmem.model import Conditions, WorldModel
from decmem.model.block import Block


@dataclass(frozen=True)
class TrainBench:
    """What is timed: one step on random latents, without the optimiser.

    Args:
        clips: of `latents` latents each, a step. chunk: latents predicted together.
        dtype: of activations. compiled: whether blocks are compiled.
        recompute: whether blocks are computed again on the way back.
        peak: TFLOP/s that the device can do in this dtype, for the utilisation; None leaves it out.
    """

    experiment: Experiment
    device: torch.device
    dtype: torch.dtype
    clips: int
    latents: int
    chunk: int
    compiled: bool = False
    recompute: bool = False
    peak: float | None = None
    repeats: int = 5

    def row(self, watch: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
        """Time, rates and memory of the step."""
        streams = 1 + self.experiment.memory_training.noisy_streams
        model = self.experiment.build_model().to(self.device)
        model.recompute = self.recompute
        if self.compiled:
            model.compile_blocks()
        T, C = self.latents, model.config.latent_channels
        draw = torch.Generator(self.device).manual_seed(0)
        shape = (self.clips, streams * T, C, *model.config.latent_size)
        latents = torch.randn(shape, generator=draw, device=self.device)
        times = torch.rand(shape[:2], generator=draw, device=self.device)
        times[:, :T] = 0
        reach = model.config.reading.reach
        plan = training_plan(reach, T, self.chunk, streams - 1)
        way = wandering(model, 0, T)
        conditions = Conditions(
            way.actions.repeat(self.clips, 1, 1, 1),
            way.world_to_camera.repeat(self.clips, 1, 1, 1, 1),
            way.lens.repeat(self.clips, 1, 1),
            way.time,
        )

        def step() -> None:
            context = model.context(conditions, streams=streams)
            velocity = model(latents.to(self.dtype), times, context, plan)
            (velocity - latents[:, plan.predicted :]).square().mean().backward()
            for p in model.parameters():
                p.grad = None

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        runs = 0

        def watched() -> None:
            nonlocal runs
            step()
            runs += 1
            if watch is not None:
                watch("steps", runs, self.repeats + 2)

        ms = median_ms(watched, self.device, warmup=2, repeats=self.repeats)
        gpu = self.device.type == "cuda"
        tokens = self.clips * streams * T * model.layout.tokens
        flop = 3 * forward_flop(model, plan, self.clips)
        rate = flop / ms / 1e9
        return {
            "preset": self.experiment.name,
            "memory": model.config.memory,
            "clips": self.clips,
            "latents": T,
            "chunk": self.chunk,
            "noisy_streams": streams - 1,
            "dtype": str(self.dtype).removeprefix("torch."),
            "compiled": self.compiled,
            "recompute": self.recompute,
            "ms_per_step": round(ms, 3),
            "tokens_per_s": round(1000 * tokens / ms, 1),
            "model_tflop_per_step": round(flop / 1e12, 4),
            "model_tflops": round(rate, 3),
            "flops_utilisation": None if self.peak is None else round(rate / self.peak, 4),
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if gpu else None,
            "covers": "forward+backward",
        }


def forward_flop(model: WorldModel, plan: Plan, clips: int) -> int:
    """Floating-point operations of one pass: products of weights and of attention, of tokens that
    exist; neither padding nor norms nor positions."""
    config, layout = model.config, model.layout
    queries = len(plan.windows.table)
    tokens = clips * queries * layout.tokens
    blocks = [cast("Block", block) for block in model.blocks]
    weights = sum(linear.weight.numel() for block in blocks for linear in block.projections())
    weights += model.patchify.weight.numel()
    flop = 2 * tokens * weights
    flop += 2 * clips * (queries - plan.predicted) * layout.tokens * model.head.weight.numel()
    # Scores and mixed values: four operations a channel and pair.
    pairs = queries * layout.tokens**2  # spatial
    pairs += int(plan.windows.table.sum()) * layout.tokens**2
    if config.memory == "decoupled":
        size = layout.tokens / layout.M
        found = (plan.candidates.sum(1) * layout.M).clamp(max=config.reading.retrieved)
        pairs += int(int(found.sum()) * layout.M * size**2)
    return flop + config.layers * 4 * clips * config.width * pairs
