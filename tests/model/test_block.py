"""A block by its kernels and by its definition."""

import dataclasses

import pytest
import torch
from torch import Tensor

from decmem.memory import training_plan
from decmem.model import ModelConfig
from decmem.ops import coding, norm

PLACES = [
    pytest.param("cpu", torch.float32, marks=pytest.mark.interpreter),
    pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@torch.no_grad()
def test_kernels_change_no_velocity(
    small: ModelConfig,
    awake,
    clip,
    device: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = dataclasses.replace(small, size=(32, 48), layers=1)
    model, data = awake(config).to(device), clip(config, 1)
    x, t = (part.to(device) for part in data.sequence())

    def velocity(x: Tensor) -> Tensor:
        context = model.context(data.conditions.to(device), streams=2)
        return model(x, t, context, training_plan(config.reading.reach, 1, 1))

    def serve(kernels: bool) -> None:
        for module, name in ((coding, "kernels_serve"), (norm, "bare_kernels_serve")):
            monkeypatch.setattr(module, name, lambda _: kernels)

    serve(False)
    exact, rough = velocity(x), velocity(x.to(dtype))
    serve(True)
    model.hold_weights(dtype)
    error = (velocity(x.to(dtype)) - exact).abs().max()
    assert exact.std() > 0.1
    assert error <= 2 * (rough - exact).abs().max() + 1e-4 * exact.abs().max()
