"""A past as the model itself would have painted it, to learn to live with its own mistakes."""

import torch
from jaxtyping import Float
from torch import Tensor

from decmem import flow
from decmem.memory import training_plan
from decmem.model import Conditions, WorldModel

_LEAST_TIME = 0.5
"""Chunks are painted in one step from times above this: most of a picture is the model's own."""


@torch.no_grad()
def dreamt_history(
    model: WorldModel,
    clean: Float[Tensor, "B T C h w"],
    conditions: Conditions,
    chunk: int,
    draw: torch.Generator,
    dtype: torch.dtype,
) -> Float[Tensor, "B T C h w"]:
    """`clean`, but from some chunk on, another one in each clip, painted by the model in one step.

    All chunks are painted in one parallel pass, each behind a true past: what a roll-out sees of
    itself in its first seconds. The first quarter of a clip always stays true, as the memory that
    a walk begins with is.
    """
    B, T = clean.shape[:2]
    chunks, device = T // chunk, clean.device
    first = torch.rand(B, 1, generator=draw, device=device) * 0.75 + 0.25
    painted = torch.arange(chunks, device=device) >= first * chunks
    t = _LEAST_TIME + (1 - _LEAST_TIME) * torch.rand(B, chunks, generator=draw, device=device)
    t = t.repeat_interleave(chunk, 1)
    noise = torch.randn(clean.shape, generator=draw, device=device)
    noisy = flow.interpolate(clean, noise, t)

    plan = training_plan(model.config.reading.reach, T, chunk)
    context = model.context(conditions, streams=2)
    latents = torch.cat((clean, noisy), dim=1).to(dtype)
    velocity = model(latents, torch.cat((torch.zeros_like(t), t), dim=1), context, plan)
    dream = noisy - t[:, :, None, None, None] * velocity
    return torch.where(painted.repeat_interleave(chunk, 1)[:, :, None, None, None], dream, clean)
