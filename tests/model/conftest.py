"""What the tests of the model share: small models that are not silent, and clips to run them on."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from decmem.memory import MemoryConfig, PositionConfig, Reach
from decmem.model import Conditions, ModelConfig, WorldModel, initialise

SMALL = ModelConfig(
    size=(64, 96),
    latent_channels=4,
    width=52,
    layers=2,
    ffn_multiple=2,
    time_width=16,
    reading=MemoryConfig(Reach(window=2, write_chunk=1), retrieved=5),
    position=PositionConfig(
        camera=8,
        space=8,
        time=4,
        surface=6,
        space_base=100.0,
        time_base=100.0,
        reach=64.0,
        global_time=False,
    ),
    chunk_sizes=(1, 2, 4),
)


@pytest.fixture(scope="session")
def small() -> ModelConfig:
    """4 x 6 tokens a latent, two heads, two layers."""
    return SMALL


@pytest.fixture(scope="session")
def awake() -> Callable[[ModelConfig], WorldModel]:
    """A model with random parameters everywhere: a freshly initialised one is silent."""

    def made(config: ModelConfig, seed: int = 0) -> WorldModel:
        model = WorldModel(config)
        initialise(model, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model.eval()

    return made


class Clip(NamedTuple):
    """Clean latents, their noised versions at times t, and the steering."""

    clean: Tensor
    noisy: Tensor
    t: Tensor
    conditions: Conditions

    def sequence(self) -> tuple[Tensor, Tensor]:
        """[clean | noisy] and its times."""
        return (
            torch.cat((self.clean, self.noisy), 1),
            torch.cat((torch.zeros_like(self.t), self.t), 1),
        )


def walked(batch: int, latents: int) -> Tensor:
    """Cameras (B, T, 4, 4, 4) of worlds that turn and wander, fp64."""
    frames = torch.arange(latents * 4, dtype=torch.float64)
    cameras = []
    for b in range(batch):
        yaw, pitch = 0.15 * frames * (b + 1), 0.3 * (frames / 5 + b).sin()
        zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
        sy, cy, sp, cp = yaw.sin(), yaw.cos(), pitch.sin(), pitch.cos()
        rotation = torch.stack((cy, zero, sy, sy * sp, -cp, -cy * sp, sy * cp, sp, -cy * cp), -1)
        rotation = rotation.unflatten(-1, (3, 3))
        centre = torch.stack((0.3 * frames, math.pi * one, -0.2 * b * frames), -1)
        camera = torch.eye(4, dtype=torch.float64).repeat(len(frames), 1, 1)
        camera[:, :3, :3] = rotation
        camera[:, :3, 3] = -(rotation @ centre[..., None])[..., 0]
        cameras.append(camera.unflatten(0, (latents, 4)))
    return torch.stack(cameras)


@pytest.fixture(scope="session")
def clip() -> Callable[..., Clip]:
    """Random latents on a walk."""

    def made(config: ModelConfig, latents: int, batch: int = 2, seed: int = 7) -> Clip:
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, latents, config.latent_channels, *config.latent_size)
        clean, noisy = (torch.randn(shape, generator=generator) for _ in range(2))
        t = torch.rand(batch, latents, generator=generator)
        actions = torch.randn(batch, latents, 4, config.actions, generator=generator)
        lens = torch.tensor([1.4, 2.1, 0.0, 0.1]).expand(batch, latents, 4)
        conditions = Conditions(actions, walked(batch, latents), lens, torch.arange(latents))
        return Clip(clean, noisy, t, conditions)

    return made


@pytest.fixture(scope="session")
def with_reach() -> Callable[..., ModelConfig]:
    """A configuration with other settings of its memory."""

    def made(config: ModelConfig, reach: Reach, **reading: int | bool) -> ModelConfig:
        return dataclasses.replace(
            config, reading=dataclasses.replace(config.reading, reach=reach, **reading)
        )

    return made


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
