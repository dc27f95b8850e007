"""Time of attention over windows at the shapes of training, by way of computing it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from decmem.bench.clock import median_device_ms
from decmem.bench.window_ways import Attention, Way, prepared
from decmem.experiment import Experiment
from decmem.memory import training_plan
from decmem.ops.window import WindowTable


@dataclass(frozen=True)
class WindowShape:
    """One training step of one layer: `clips` of `latents` each, and their noisy streams."""

    experiment: Experiment
    latents: int
    clips: int
    chunk: int

    @property
    def windows(self) -> WindowTable:
        reach = self.experiment.model.reading.reach
        streams = self.experiment.memory_training.noisy_streams
        return training_plan(reach, self.latents, self.chunk, streams).windows

    def valid(self, device: torch.device) -> Tensor | None:
        valid = self.experiment.model.layout.valid
        return None if valid is None else valid.flatten().to(device)

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """q, k, v and the gradient of the output, normal."""
        model, T = self.experiment.model, len(self.windows.table)
        shape = (self.clips, model.heads, T, model.layout.S, model.position.head_dim)
        draw = torch.Generator(device).manual_seed(0)
        q, k, v, grad = (
            torch.randn(shape, generator=draw, device=device, dtype=dtype) for _ in range(4)
        )
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad

    @property
    def flop(self) -> int:
        """Of the forward pass, counting tokens that exist and see each other."""
        model = self.experiment.model
        pairs = int(self.windows.table.sum()) * model.layout.tokens**2
        return 4 * self.clips * model.heads * model.position.head_dim * pairs


@dataclass(frozen=True)
class WindowBench:
    """What is timed: forward, and forward with backward, of each shape in each way.

    A way that fails, or is wrong, is a row that says so and has no times.
    """

    shapes: Sequence[WindowShape]
    device: torch.device
    dtype: torch.dtype
    ways: Sequence[Way] = ("window", "block_sparse", "unfolded", "flex")
    repeats: int = 7
    watch: Callable[[str, int, int], None] | None = field(default=None, compare=False)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each shape and way; the ways of a shape follow one another."""
        done, total = 0, len(self.shapes) * len(self.ways)
        for shape in self.shapes:
            for way in self.ways:
                yield self._row(shape, way)
                done += 1
                if self.watch is not None:
                    self.watch(f"{way}, chunks of {shape.chunk}", done, total)

    def _row(self, shape: WindowShape, way: Way) -> dict[str, Any]:
        row: dict[str, Any] = {
            "preset": shape.experiment.name,
            "latents": shape.latents,
            "clips": shape.clips,
            "chunk": shape.chunk,
            "way": way,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        try:
            q, k, v, grad = shape.inputs(self.device, self.dtype)
            valid = shape.valid(self.device)
            attention = prepared(way, shape.windows, valid, q)
            worst = worst_error(attention, shape.windows, valid, (q, k, v, grad))
            row["error_in_roundings"] = round(worst, 2)
            if not worst < _WRONG:
                return row | {"failure": f"wrong by {worst:.3g} roundings"}

            def both() -> None:
                torch.autograd.grad(attention(q, k, v), (q, k, v), grad)

            with torch.no_grad():
                forward = median_device_ms(
                    lambda: attention(q, k, v), self.device, repeats=self.repeats
                )
            backward = median_device_ms(both, self.device, repeats=self.repeats)
        except Exception as failure:
            # Out of memory, or a peer that cannot do this shape: each raises errors of its own.
            lines = str(failure).splitlines() or [type(failure).__name__]
            return row | {"failure": lines[0][:200]}
        return row | {
            "forward_ms": round(forward, 4),
            "forward_backward_ms": round(backward, 4),
            "forward_tflops": round(shape.flop / forward / 1e9, 1),
            # The backward pass has five products where the forward pass has two.
            "forward_backward_tflops": round(3.5 * shape.flop / backward / 1e9, 1),
        }


_WRONG = 16.0
"""Roundings of the largest value; attention in 16 bits is off by two or three."""


def worst_error(
    attention: Attention,
    windows: WindowTable,
    valid: Tensor | None,
    tensors: tuple[Tensor, ...],
) -> float:
    """Largest error of output and gradients, in roundings of the largest true value.

    The truth is computed in fp32 for the first head of the first world: for the readers of a few
    key latents, whose dK and dV are then complete.
    """
    q, k, v, grad = tensors
    out = attention(q, k, v)
    got = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]
    del out
    table, S = windows.table, q.shape[3]
    busiest = int(table.sum(0).argmax())
    columns = torch.tensor([busiest, table.shape[1] - 1]).unique()
    rows = table[:, columns].any(1).nonzero().flatten()
    seen = table[rows].any(0).nonzero().flatten()
    tokens = torch.ones(S, dtype=torch.bool) if valid is None else valid.cpu()
    mask = torch.kron(table[rows][:, seen], tokens.expand(S, S)).to(q.device)

    def part(x: Tensor, latents: Tensor) -> Tensor:
        return x[0, 0, latents.to(x.device)].detach().float()

    ours, keys, values = (
        part(x, at).flatten(0, 1).requires_grad_() for x, at in ((q, rows), (k, seen), (v, seen))
    )
    scores = (ours @ keys.mT * q.shape[4] ** -0.5).masked_fill(~mask, float("-inf"))
    truth = scores.softmax(-1) @ values
    gradients = torch.autograd.grad(truth, (ours, keys, values), part(grad, rows).flatten(0, 1))
    whole = torch.isin(seen, columns)
    worst = 0.0
    for result, true, at, of in zip(
        got,
        (truth.detach(), *gradients),
        (rows, rows, seen[whole], seen[whole]),
        (slice(None), slice(None), whole, whole),
        strict=True,
    ):
        true = true.unflatten(0, (-1, S))[of]
        rounding = torch.finfo(q.dtype).eps * true.abs().max()
        error = float((part(result, at) - true).abs().max() / rounding)
        worst = max(worst, error if error == error else float("inf"))
    return worst
