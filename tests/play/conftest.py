"""A tiny world for the tests of the live page: untrained weights, real everything else."""

from collections.abc import Callable

import pytest
import torch

from decmem.codec import Autoencoder
from decmem.model import WorldModel
from decmem.presets import TINY
from decmem.rollout import Session


@pytest.fixture(scope="session")
def parts() -> tuple[Autoencoder, WorldModel]:
    torch.manual_seed(0)
    codec, model = TINY.build_codec(), TINY.build_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Fresh branches are silent; shaken ones depend on everything they should.
        for part in (codec, model):
            for parameter in part.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return codec.eval().requires_grad_(False), model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def session(parts: tuple[Autoencoder, WorldModel]) -> Callable[..., Session]:
    """An empty session of one denoising step and one-latent chunks."""

    def made(**settings) -> Session:
        return Session(*parts, **{"steps": 1, "chunk": 1} | settings)

    return made
