"""Blocks of the model compile to one graph each and give what they give uncompiled.

The backend is `eager`, which needs no C++ compiler: what is tested is the capture.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from decmem.memory import Reach, training_plan
from decmem.model import Conditions, ModelConfig, WorldModel, initialise
from decmem.presets import TINY

LATENTS = 8
SMALL = dataclasses.replace(TINY.model, layers=1)
CONFIGS = {
    "tiny": TINY.model,
    "ragged": dataclasses.replace(SMALL, size=(48, 80)),
    "paper-like": dataclasses.replace(
        SMALL,
        reading=dataclasses.replace(
            TINY.model.reading,
            reach=Reach(window=4, window_includes_chunk=True, own_candidates=True),
            per_head=True,
        ),
        position=dataclasses.replace(TINY.model.position, global_time=True),
    ),
    "dense": dataclasses.replace(SMALL, memory="dense"),
}


def new_model(config: ModelConfig) -> WorldModel:
    """Random parameters everywhere: a fresh model is silent."""
    model = WorldModel(config)
    initialise(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def inputs(config: ModelConfig) -> tuple[Tensor, Tensor, Conditions]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(
        1, 2 * LATENTS, config.latent_channels, *config.latent_size, generator=generator
    )
    t = torch.rand(1, 2 * LATENTS, generator=generator)
    cameras = torch.eye(4, dtype=torch.float64).repeat(1, LATENTS, 4, 1, 1)
    cameras[..., 0, 3] = torch.arange(LATENTS * 4).view(LATENTS, 4) * 0.3
    actions = torch.randn(1, LATENTS, 4, config.actions, generator=generator)
    lens = torch.tensor([1.4, 2.1, 0.0, 0.0]).expand(1, LATENTS, 4)
    return x, t, Conditions(actions, cameras, lens, torch.arange(LATENTS))


def run(model: WorldModel, chunk: int) -> tuple[Tensor, list[Tensor]]:
    """Velocity, and the gradients of all parameters."""
    x, t, conditions = inputs(model.config)
    plan = training_plan(model.config.reading.reach, LATENTS, chunk)
    velocity = model(x, t, model.context(conditions, streams=2), plan)
    return velocity.detach(), list(
        torch.autograd.grad(velocity.square().mean(), list(model.parameters()))
    )


# Dynamo looks at .grad of a block's input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_compiled_blocks_equal_eager_ones(config: ModelConfig) -> None:
    torch.compiler.reset()
    eager, compiled = new_model(config), new_model(config)
    for block in compiled.blocks:
        block.compile(backend="eager", fullgraph=True, dynamic=False)
    for chunk in (4, 2):
        (velocity, gradients), (expected, wanted) = run(compiled, chunk), run(eager, chunk)
        torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)
        for got, want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
