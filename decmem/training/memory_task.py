"""Learning the world: teacher forcing on [clean | noisy], all chunks of a clip in parallel."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from decmem import flow
from decmem.experiment import MemoryTraining
from decmem.memory import training_plan
from decmem.memory.surface import depth_loss
from decmem.model import Conditions, WorldModel
from decmem.training.dreamt_history import dreamt_history
from decmem.training.latent_cache import LatentCache
from decmem.training.seeds import device_generator, host_generator
from decmem.training.trainer import Task


class Losses(NamedTuple):
    """Per clip, noisy stream and chunk the squared error of the velocity; over all tokens and
    layers the misfit of the depths they assumed, and the last layer's mean error of log depth."""

    velocity: Float[Tensor, "B streams chunks"]
    depth: Float[Tensor, ""] | None = None
    depth_error: Float[Tensor, ""] | None = None


def flow_matching_loss(
    model: WorldModel,
    config: flow.FlowConfig,
    training: MemoryTraining,
    clean: Float[Tensor, "B T C h w"],
    conditions: Conditions,
    chunk: int,
    draw: torch.Generator,
    dtype: torch.dtype,
    depths: Float[Tensor, "B T tokens 2"] | None = None,
    past: Float[Tensor, "B T C h w"] | None = None,
) -> Losses:
    """Squared error of the velocity (eq. 1) per clip, noisy stream and chunk, fp32.

    `past` is what chunks are shown of the clip instead of `clean`, such as `dreamt_history`.
    With `depths` (mean and variance of each patch's log depth) also what the layers' surface
    groups assumed of them, clean and noisy tokens alike.

    Every noisy chunk has its own time; its history is the clean stream, which is itself disturbed
    a little in most clips so that the model bears its own errors (told as clean, t = 0).
    """
    B, T = clean.shape[:2]
    streams = training.noisy_streams
    chunks = T // chunk
    device = clean.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw, device=device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device)

    disturbed = uniform(B, 1) < training.history_noised
    level = uniform(B, chunks) * training.history_noise * disturbed
    past = clean if past is None else past
    history = flow.interpolate(past, normal(*clean.shape), level.repeat_interleave(chunk, 1))

    t = flow.training_times(config, (B, streams * chunks), draw, device)
    t = t.repeat_interleave(chunk, 1)  # (B, streams T)
    noise = normal(B, streams * T, *clean.shape[2:])
    data = clean.repeat(1, streams, 1, 1, 1)
    noisy = flow.interpolate(data, noise, t)

    steered = uniform(B) >= training.drop_actions
    plan = training_plan(model.config.reading.reach, T, chunk, streams)
    context = model.context(conditions, steered=steered, streams=1 + streams)
    latents = torch.cat((history, noisy), dim=1).to(dtype)
    times = torch.cat((torch.zeros(B, T, device=device), t), dim=1)
    estimates: list[Tensor] | None = None if depths is None else []
    velocity = model(latents, times, context, plan, depths=estimates)
    error = (velocity - (noise - data)).square().mean((2, 3, 4))
    error = error.view(B, streams, chunks, chunk).mean(-1)
    if depths is None or not estimates:
        return Losses(error)
    mean, variance = model.layout.arrange(depths).repeat(1, 1 + streams, 1, 1).unbind(-1)
    misfit = torch.stack([depth_loss(e, mean, variance).mean() for e in estimates]).mean()
    return Losses(error, misfit, (estimates[-1][..., 0].detach() - mean).abs().mean())


class MemoryTask(Task):
    """Clips from a latent cache: short ones first, then whole walks."""

    network: WorldModel

    def __init__(
        self,
        model: WorldModel,
        cache: LatentCache,
        config: MemoryTraining,
        flow_config: flow.FlowConfig,
        seed: int,
        rank: int,
    ) -> None:
        super().__init__()
        self.network = model
        self.cache = cache
        self.config = config
        self.flow_config = flow_config
        self.seed, self.rank = seed, rank
        self.device = cache.latents.device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        model.recompute = config.recompute
        if config.compile and self.device.type == "cuda":
            model.compile_blocks()

    def forward(self, step: int, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        draw = host_generator(self.seed, self.rank, step)
        walks, T = self.cache.latents.shape[:2]
        short = progress < config.short_until
        length = min(config.short_latents, T) if short else T
        batch = config.batch * T // length
        walk = torch.randint(walks, (batch,), generator=draw)
        start = torch.randint(T - length + 1, (batch,), generator=draw)
        sizes = self.network.config.chunk_sizes
        # Larger chunks cost no more and are what roll-outs mostly use.
        weight = torch.tensor([float(s) for s in sizes])
        chunk = sizes[int(torch.multinomial(weight, 1, generator=draw))]
        clean, conditions = self.cache.clips(walk, start, length)
        depths = None
        if config.depth_weight:
            depths = self.cache.patch_depths(walk, start, length)
        dreams = not short and bool(torch.rand((), generator=draw) < config.history_dreamt)
        noise = device_generator(self.seed, self.rank, step, self.device)
        past = None
        if dreams:
            # The last draw from the host: with one generation the step is what it was before.
            most = config.history_generations
            generations = 1 + int(torch.randint(most, (), generator=draw))
            past = dreamt_history(
                self.network,
                clean,
                conditions,
                chunk,
                noise,
                self.dtype,
                generations,
                config.history_shift,
            )
        losses = flow_matching_loss(
            self.network,
            self.flow_config,
            config,
            clean,
            conditions,
            chunk,
            noise,
            self.dtype,
            depths,
            past,
        )
        loss = losses.velocity
        with torch.no_grad():
            # What memory is worth: late chunks have more of the past to draw on than early ones.
            quarter = max(1, loss.shape[2] // 4)
            figures = {
                "early": loss[:, :, :quarter].mean(),
                "late": loss[:, :, -quarter:].mean(),
            }
        total = loss.mean()
        if losses.depth is not None and losses.depth_error is not None:
            figures |= {"velocity": total.detach(), "depth_error": losses.depth_error}
            total = total + config.depth_weight * losses.depth
        return total, figures
