"""Muon for the layers' matrices, AdamW for everything else."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz coefficients with the steepest slope at zero (Jordan et al., "Muon").
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices (roughly) of a stack (N, rows, columns).

    bf16 on GPUs, fp32 elsewhere: five iterations are self-correcting.
    """
    y = x.bfloat16() if x.is_cuda else x.float()
    tall = y.shape[1] > y.shape[2]
    if tall:
        y = y.mT
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = _A * y + (_B * gram + _C * gram @ gram) @ y
    return (y.mT if tall else y).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is orthogonalised, for matrices.

    torch.optim.Muon does one matrix at a time, some 2,500 kernel launches a step for this model;
    here all matrices of one shape go through Newton-Schulz together. A parameter three times as
    tall as wide (fused q, k, v) counts as three square matrices.

    Args:
        params: 2D parameters. lr: step in units of spectral norm. momentum: Nesterov's.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads: list[Any] = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            directions = torch._foreach_lerp(grads, buffers, group["momentum"])
            by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
            for i, p in enumerate(params):
                by_shape[p.shape[0], p.shape[1]].append(i)
            for (rows, columns), members in by_shape.items():
                parts = 3 if rows == 3 * columns else 1
                stack = torch.stack([directions[i] for i in members])
                turned = orthogonalise(stack.view(-1, rows // parts, columns)).view_as(stack)
                scale = max(1.0, rows / parts / columns) ** 0.5
                for i, update in zip(members, turned.unbind(), strict=True):
                    params[i].add_(update, alpha=-group["lr"] * scale)


class Optimisers:
    """The optimisers of a module, stepped and stored together.

    Args:
        module: 2D weights of its `blocks` go to Muon when `muon_lr` is given, the rest to AdamW.
    """

    def __init__(self, module: nn.Module, adam_lr: float, muon_lr: float | None = None) -> None:
        matrices, rest = [], []
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            # Scales computed from time, gains and read-outs of a number or two are not maps
            # between features of one kind.
            layer = "blocks." in name and p.dim() == 2 and "norm" not in name and min(p.shape) > 2
            (matrices if layer and muon_lr is not None else rest).append(p)
        fused = bool(rest) and rest[0].is_cuda
        self.all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        ]
        if matrices:
            assert muon_lr is not None
            self.all.append(Muon(matrices, lr=muon_lr))
        self.peaks = [o.param_groups[0]["lr"] for o in self.all]

    def set_rate(self, factor: float) -> None:
        """Learning rates as a factor of their peaks."""
        for optimiser, peak in zip(self.all, self.peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * factor

    def step(self) -> None:
        for optimiser in self.all:
            optimiser.step()

    def zero_grad(self) -> None:
        for optimiser in self.all:
            optimiser.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All state as flat named tensors."""
        flat: dict[str, Tensor] = {}
        for i, optimiser in enumerate(self.all):
            for index, entry in optimiser.state_dict()["state"].items():
                for key, value in entry.items():
                    flat[f"{i}.{index}.{key}"] = torch.as_tensor(value)
        return flat

    def load_state(self, flat: dict[str, Tensor]) -> None:
        """Restores what `state` gave."""
        for i, optimiser in enumerate(self.all):
            whole = optimiser.state_dict()
            params = [p for group in optimiser.param_groups for p in group["params"]]
            entries: dict[int, dict[str, Tensor]] = defaultdict(dict)
            for name, value in flat.items():
                which, index, key = name.split(".")
                if int(which) != i:
                    continue
                p = params[int(index)]
                # In the layout of the parameter, as it was: fused AdamW refuses another.
                alike = key != "step"
                entries[int(index)][key] = torch.empty_like(p).copy_(value) if alike else value
            whole["state"] = dict(entries)
            optimiser.load_state_dict(whole)


def rate(progress: float, step: int, warmup: int, decay_from: float) -> float:
    """Factor of the peak rate: linear warm-up, constant, then linear to zero at progress 1."""
    rising = min(1.0, (step + 1) / max(1, warmup))
    falling = min(1.0, (1.0 - progress) / max(1e-9, 1.0 - decay_from))
    return rising * max(0.0, falling)
