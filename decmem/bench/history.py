"""A bank of random history: what a long roll-out would have written, without dreaming it."""

import math

import torch

from decmem.memory import Bank
from decmem.memory.quantised import FP8
from decmem.model import Conditions, WorldModel

_PIECE = 32
"""Latents written at a time, so that filling needs little memory beside the bank."""


def wandering(model: WorldModel, first: int, latents: int) -> Conditions:
    """Conditions of latents `first` onwards of a slow walk in a circle, looking ahead; B = 1."""
    frame = torch.arange(4 * first, 4 * (first + latents), dtype=torch.float64)
    turn = frame * (2 * math.pi / 600)
    cos, sin = turn.cos(), turn.sin()
    zero, one = torch.zeros_like(turn), torch.ones_like(turn)
    rotation = torch.stack((cos, zero, sin, zero, one, zero, -sin, zero, cos), -1).view(-1, 3, 3)
    centre = 20 * torch.stack((sin, zero, cos), -1)
    world_to_camera = torch.eye(4, dtype=torch.float64).repeat(len(frame), 1, 1)
    world_to_camera[:, :3, :3] = rotation
    world_to_camera[:, :3, 3:] = -rotation @ centre[..., None]
    height, width = model.config.size
    lens = torch.tensor([1.43, 1.43 * width / height, 0.0, 0.0])
    return Conditions(
        torch.zeros(1, latents, 4, model.config.actions),
        world_to_camera.view(1, latents, 4, 4, 4),
        lens.expand(1, latents, 4),
        torch.arange(first, first + latents),
    ).to(model.head.weight.device)


def random_bank(
    model: WorldModel, latents: int, dtype: torch.dtype, room: int | None = None
) -> Bank:
    """A bank of `latents` latents of one world, its keys and values drawn at random.

    Keys have unit RMS, as queries and keys have after their norms. Retrieval from such a bank
    finds no favourites: it reads blocks scattered over all history, the caches' worst case.
    """
    bank = model.new_bank(torch.zeros(1, 3), dtype, room or latents)
    device = model.head.weight.device
    draw = torch.Generator(device).manual_seed(0)
    drawn = torch.bfloat16 if dtype == FP8 else dtype
    for start in range(0, latents, _PIECE):
        count = min(_PIECE, latents - start)
        for layer in bank.layers:
            _, H, _, S, D = layer.keys.shape
            shape = (1, H, count, S, D)
            k, v = (
                torch.randn(shape, generator=draw, device=device, dtype=drawn) for _ in range(2)
            )
            layer.stage(k, v, model.layout)
        known = wandering(model, start, count)
        bank.commit(known.cameras, known.lens, known.time)
    return bank
