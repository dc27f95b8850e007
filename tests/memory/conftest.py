"""What the tests of the memories share: cameras on a walk, and one pass of one layer."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decmem.memory import Memory, Plan, PositionConfig, Recall, TokenLayout
from decmem.memory.bank import LayerBank
from decmem.memory.base import Reading
from decmem.memory.coding import heads_last
from decmem.memory.position import make_position


def look(x: float, y: float, z: float, yaw: float, pitch: float = 0.0) -> Tensor:
    """World-to-camera, fp64; angles in degrees, yaw 0 looks along -z, pitch positive up."""
    sy, cy = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
    sp, cp = math.sin(math.radians(pitch)), math.cos(math.radians(pitch))
    rotation = torch.tensor(
        [[cy, 0, sy], [sy * sp, -cp, -cy * sp], [sy * cp, sp, -cy * cp]], dtype=torch.float64
    )
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = -rotation @ torch.tensor([x, y, z], dtype=torch.float64)
    return matrix


@pytest.fixture(scope="session")
def walk() -> Callable[..., Tensor]:
    """Cameras of two worlds (B, T, 4, 4) that wander near a point."""

    def made(latents: int, at: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Tensor:
        worlds = [
            [
                look(at[0] + 0.4 * t, at[1] + 0.1 * b, at[2] - 0.3 * t * b, 25 * t - 40 * b, 5 * b)
                for t in range(latents)
            ]
            for b in range(2)
        ]
        return torch.stack([torch.stack(world) for world in worlds])

    return made


LENS = torch.tensor([1.4, 2.1, 0.0, 0.0])


@pytest.fixture(scope="session")
def reading(walk: Callable[..., Tensor]) -> Callable[..., Reading]:
    """One pass of a layer with random features and projections, two worlds, two heads."""

    def made(
        position: PositionConfig,
        layout: TokenLayout,
        plan: Plan,
        latents: int,
        time: Tensor | None = None,
        bank: LayerBank | None = None,
        recall: Recall = Recall(),
    ) -> Reading:
        generator = torch.Generator().manual_seed(3)
        D, N = position.head_dim, layout.tokens

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        time = torch.arange(latents) if time is None else time
        rotations = make_position(
            position,
            walk(latents).float(),
            LENS.expand(2, latents, 4),
            time,
            layout.coordinates,
            layout.grid,
        )
        qkv = torch.cat([heads_last(normal(2, 2, latents, N, D)) for _ in "qkv"], dim=-1)
        features = normal(2, latents, N, 2 * D)
        return Reading(features, qkv, None, rotations, plan, time, bank, recall)

    return made


@pytest.fixture(scope="session")
def wake() -> Callable[[Memory], Memory]:
    """Fills the parameters of a memory with small random values."""

    def woken(memory: Memory) -> Memory:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in memory.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return memory

    return woken


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
