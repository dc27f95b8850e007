"""Exponential average of weights."""

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average of a module's parameters; young averages forget faster, so that starts do not stick.

    Args:
        decay: share of the average that one step keeps, once it is old.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.names = [n for n, _ in module.named_parameters()]
        self.values = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Takes in the weights after `step` (from 0)."""
        keep = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in module.parameters()], 1 - keep)

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values, strict=True))

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(state[name])

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchanges average and weights; twice is no change."""
        for mean, p in zip(self.values, module.parameters(), strict=True):
            held = p.detach().clone()
            p.copy_(mean)
            mean.copy_(held)
