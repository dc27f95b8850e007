"""The one place that decides how a fresh model starts."""

import math

import torch
from torch import nn

from decmem.memory.decoupled import DecoupledMemory
from decmem.memory.surface import SurfaceDepth
from decmem.model.block import Block, HeadGain
from decmem.model.linear import Linear, ScaledNorm
from decmem.model.world_model import WorldModel


@torch.no_grad()
def initialise(model: WorldModel, seed: int = 0) -> None:
    """Fills every parameter. Residual branches and the head start at zero: the model is silent.

    Gates start at one half everywhere, so that both memories learn from the first step.
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(weight: torch.Tensor, std: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            fill(module.weight, 1 / math.sqrt(module.in_features))
            if module.bias is not None:
                module.bias.zero_()
    for module in model.modules():
        if isinstance(module, ScaledNorm):
            module.weight.fill_(1.0)
            module.scale.weight.zero_()
        elif isinstance(module, HeadGain):
            module.gain.fill_(1.0)
        elif isinstance(module, DecoupledMemory):
            module.gate.weight.zero_()
        elif isinstance(module, SurfaceDepth):
            module.readout.weight.zero_()
        elif isinstance(module, Block):
            for branch in (module.spatial.out, module.spatiotemporal.out, module.ffn.down):
                assert isinstance(branch, Linear)
                branch.weight.zero_()
    model.head.weight.zero_()
    if model.place is not None:
        fill(model.place, 0.02)
