"""Rectified flow: the straight path from data to noise, its times, its solver, its guidance.

z_t = (1 - t) z_0 + t eps, and the model predicts v = eps - z_0 (eq. 1).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from decmem.errors import UserError


@dataclass(frozen=True)
class FlowConfig:
    """Times of training and sampling.

    Args:
        mean, spread: training times are sigmoid(normal(mean, spread)).
        shift: t -> shift t / (1 + (shift - 1) t), towards the noisy end; 1 leaves times alone.
        sampling_shift: the same for the times of sampling; None takes `shift`.
    """

    mean: float = 0.0
    spread: float = 1.0
    shift: float = 2.0
    sampling_shift: float | None = None


def shift_time(t: Float[Tensor, "*shape"], shift: float) -> Float[Tensor, "*shape"]:
    """Moves times towards noise, keeping 0 and 1."""
    return shift * t / (1 + (shift - 1) * t)


def training_times(
    config: FlowConfig, shape: tuple[int, ...], generator: torch.Generator, device: torch.device
) -> Float[Tensor, "..."]:
    """Random times of training, one per entry of `shape`; drawn where the generator lives."""
    normal = torch.randn(shape, generator=generator, device=generator.device).to(device)
    return shift_time(torch.sigmoid(config.mean + config.spread * normal), config.shift)


def interpolate(
    data: Float[Tensor, "B T C h w"], noise: Float[Tensor, "B T C h w"], t: Float[Tensor, "B T"]
) -> Float[Tensor, "B T C h w"]:
    """z_t on the straight path."""
    t = t[:, :, None, None, None]
    return (1 - t) * data + t * noise


def sampling_times(config: FlowConfig, steps: int) -> list[float]:
    """Times of an Euler solver from 1 to 0, `steps` + 1 of them."""
    if steps < 1:
        raise UserError("steps", f"{steps} denoising steps", "Use at least 1")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    shift = config.shift if config.sampling_shift is None else config.sampling_shift
    return shift_time(t, shift).tolist()


def solve(
    velocity: Callable[[Tensor, float], Tensor],
    noise: Float[Tensor, "B T C h w"],
    times: list[float],
) -> Float[Tensor, "B T C h w"]:
    """Integrates dz/dt = v from pure noise to data by Euler steps; the state stays fp32."""
    z = noise.float()
    for now, later in itertools.pairwise(times):
        z = z + (later - now) * velocity(z, now).float()
    return z


def guide(
    conditional: Float[Tensor, "*shape"], unconditional: Float[Tensor, "*shape"], strength: float
) -> Float[Tensor, "*shape"]:
    """Action guidance: v = v_uncond + s (v_cond - v_uncond) (eq. 14)."""
    return unconditional + strength * (conditional - unconditional)
