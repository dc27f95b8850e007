"""A past as the model itself would have painted it, to learn to live with its own mistakes."""

import torch
from jaxtyping import Float
from torch import Tensor

from decmem import flow
from decmem.memory import training_plan
from decmem.model import Conditions, WorldModel

_LEAST_TIME = 0.5
"""Chunks are painted from times above this: most of a picture is the model's own."""


@torch.no_grad()
def dreamt_history(
    model: WorldModel,
    clean: Float[Tensor, "B T C h w"],
    conditions: Conditions,
    chunk: int,
    draw: torch.Generator,
    dtype: torch.dtype,
    generations: int = 1,
    shift: float = 1.0,
) -> Float[Tensor, "B T C h w"]:
    """`clean`, but from some chunk on, another one in each clip, painted by the model.

    A generation paints all chunks in one step of one parallel pass. In the first, each stands
    behind a true past: what a roll-out sees of itself in its first seconds. In every later one it
    stands behind the paintings of the one before, so that mistakes feed on mistakes as they do in
    a roll-out. As there, a chunk keeps its noise and its time. It is painted from the truth with
    noise at first, and then from its own last painting with that noise, as a sampler's last step
    is: the truth does not hold it back for ever.

    The first quarter of a clip always stays true, as the memory that a walk begins with is.

    Args:
        shift: moves the times, [0.5, 1], towards noise (`flow.shift_time`). With that of sampling
            they lie where a roll-out of two steps takes its steps.
    """
    B, T = clean.shape[:2]
    chunks, device = T // chunk, clean.device
    first = torch.rand(B, 1, generator=draw, device=device) * 0.75 + 0.25
    painted = torch.arange(chunks, device=device) >= first * chunks
    painted = painted.repeat_interleave(chunk, 1)[:, :, None, None, None]
    t = _LEAST_TIME + (1 - _LEAST_TIME) * torch.rand(B, chunks, generator=draw, device=device)
    t = flow.shift_time(t, shift).repeat_interleave(chunk, 1)
    noise = torch.randn(clean.shape, generator=draw, device=device)

    plan = training_plan(model.config.reading.reach, T, chunk)
    context = model.context(conditions, streams=2)
    times = torch.cat((torch.zeros_like(t), t), dim=1)
    past = clean
    for _ in range(generations):
        noisy = flow.interpolate(past, noise, t)
        velocity = model(torch.cat((past, noisy), dim=1).to(dtype), times, context, plan)
        past = torch.where(painted, noisy - t[:, :, None, None, None] * velocity, clean)
    return past
