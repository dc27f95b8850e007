"""A forward step of `tiny` with fixed inputs gives the numbers it gave before."""

from collections.abc import Callable

import pytest
import torch

from decmem.memory import training_plan
from decmem.model import ModelConfig, WorldModel
from decmem.presets import TINY

# Velocity of the first noisy latent, channel 0, first row of cells; then its mean square.
GOLDEN = [-0.23097, -0.38749, -0.5322, 0.29953, -0.67033, 0.74422]
GOLDEN_SQUARE = 0.74436

MESSAGE = """the forward step of `tiny` gives other numbers than before.
If the mathematics was meant to change, put these into {file}:
GOLDEN = {row}
GOLDEN_SQUARE = {square}
and say in the commit what changed. Weights trained before will not fit any more, and the shipped
ones must be trained again. If nothing was meant to change, this is a bug."""


@torch.no_grad()
def test_golden_step(
    awake: Callable[[ModelConfig], WorldModel], clip: Callable[..., tuple]
) -> None:
    model, data = awake(TINY.model), clip(TINY.model, 8, batch=1)
    x, t = data.sequence()
    plan = training_plan(TINY.model.reading.reach, 8, 4)
    velocity = model(x, t, model.context(data.conditions, streams=2), plan)
    row, square = velocity[0, 0, 0, 0, :6], velocity.square().mean().item()
    told = MESSAGE.format(
        file=__file__, row=[round(v, 5) for v in row.tolist()], square=round(square, 5)
    )
    assert row.tolist() == pytest.approx(GOLDEN, abs=2e-4), told
    assert square == pytest.approx(GOLDEN_SQUARE, abs=2e-4), told
