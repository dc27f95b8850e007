"""Time of block-sparse attention behind histories of some lengths, by way of computing it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from decmem.bench.clock import kernel_ms
from decmem.bench.operator_problem import (
    Attention,
    Problem,
    Results,
    dense_problem,
    fused,
    judged,
    sparse_problem,
    written_out,
)
from decmem.bench.operator_shapes import OperatorInputs, OperatorShape
from decmem.bench.operator_ways import LATE, UNPROVEN, is_dense, prepared

Pass = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward")

_BACKWARD_WORK = 2.5
"""Five products where the forward pass has two."""


@dataclass(frozen=True)
class OperatorBench:
    """What is timed: forward, then backward alone, of every shape, history and way.

    A way that fails, or is wrong, is a row that says so (`failure`) and has no speed.

    Args:
        until: when to begin no more rows, in seconds of `time.monotonic`; None is never.
        refused: why a way shall not run a shape's pass here, by (way, shape, pass).
    """

    shapes: Sequence[OperatorShape]
    histories: Sequence[int]
    ways: Sequence[str]
    device: torch.device
    dtype: torch.dtype
    repeats: int = 7
    passes: Sequence[Pass] = PASSES
    until: float | None = None
    refused: Mapping[tuple[str, str, str], str] = field(default_factory=dict)
    watch: Callable[[str, int, int], None] | None = field(default=None, compare=False)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Ways that may go wrong badly come after all others have run, slow ones last."""
        done = 0
        total = len(self.shapes) * len(self.histories) * len(self.ways) * len(self.passes)
        for stage in self._stages():
            for history in self.histories:
                for shape in self.shapes:
                    for row in self._side_by_side(stage, shape, history):
                        yield row
                        done += 1
                        if self.watch is not None:
                            text = f"{row['backend']}, {shape.name}, {history} latents"
                            self.watch(text, done, total)

    def _stages(self) -> list[list[str]]:
        safe = [way for way in self.ways if way not in UNPROVEN + LATE]
        unproven = [way for way in self.ways if way in UNPROVEN]
        return [stage for stage in (safe, unproven, [w for w in self.ways if w in LATE]) if stage]

    def _side_by_side(
        self, ways: Sequence[str], shape: OperatorShape, history: int
    ) -> Iterator[dict[str, Any]]:
        """The rows of some ways, on the same inputs."""
        x: OperatorInputs | None = None
        known: dict[bool, _Known] = {}
        if any(way in LATE for way in ways):
            # After a few shapes PyTorch's compiler gives up on new ones.
            torch.compiler.reset()
        for way in ways:
            for which in self.passes:
                row = self._head(way, which, shape, history)
                failure = self.refused.get((way, shape.name, which))
                if failure is None and self.until is not None and time.monotonic() > self.until:
                    failure = "not begun: out of time"
                if failure is not None:
                    yield row | {"failure": failure}
                    continue
                try:
                    x = x or shape.inputs(history, self.device, self.dtype)
                    dense = is_dense(way)
                    make = dense_problem if dense else sparse_problem
                    if dense not in known:
                        known.clear()  # One at a time: they are large.
                        known[dense] = _Known.of(make, x, shape)
                    row |= self._measured(prepared(way, x), which, known[dense])
                except torch.OutOfMemoryError:
                    row["failure"] = "out of memory"
                except Exception as failed:
                    # A peer that cannot do this shape raises an error of its own kind.
                    row["failure"] = f"{type(failed).__name__}: {failed}".splitlines()[0][:200]
                yield row
                _tidy(self.device)

    def _head(self, way: str, which: Pass, shape: OperatorShape, history: int) -> dict[str, Any]:
        gpu = self.device.type == "cuda"
        return {
            "op": "dense" if is_dense(way) else "sgm",
            "backend": way,
            "shape": shape.name,
            "history": history,
            "pass": which,
            "dtype": str(self.dtype).removeprefix("torch."),
            "worlds": shape.worlds,
            "heads": shape.heads,
            "head_dim": shape.head_dim,
            "block_slots": shape.slots,
            "block_tokens": list(shape.tokens),
            "listed": shape.listed,
            "device": torch.cuda.get_device_name(self.device) if gpu else "cpu",
            "ms": None,
            "tflops": None,
            "error": None,
            "error_of_pytorch": None,
            "failure": None,
        }

    def _measured(self, attention: Attention, which: Pass, known: "_Known") -> dict[str, Any]:
        """Errors, then time: only of what is right."""
        problem = known.problem
        leaves, grad = problem.leaves, problem.grad
        back = which == "backward"
        if back:
            out = attention(*leaves)
            got = problem.part([out.detach(), *torch.autograd.grad(out, leaves, grad)])[1:]
            del out
        else:
            with torch.no_grad():
                got = problem.part([attention(*leaves)])
        part = slice(1, None) if back else slice(0, 1)
        verdict = judged(got, [usual[part] for usual in known.usual], known.truth[part])
        del got
        found: dict[str, Any] = {
            "error": float(f"{verdict.error:.3e}"),
            "error_of_pytorch": float(f"{verdict.of_pytorch:.3e}"),
        }
        if not verdict.good:
            return found | {"failure": "wrong: more than twice the error of PyTorch"}
        ms = self._backward_ms(attention, problem) if back else self._forward_ms(attention, leaves)
        flop = problem.flop * (_BACKWARD_WORK if back else 1)
        return found | {"ms": round(ms, 4), "tflops": float(f"{flop / ms / 1e9:.4g}")}

    def _forward_ms(self, attention: Attention, leaves: Results) -> float:
        def work() -> None:
            with torch.no_grad():
                attention(*leaves)

        try:
            return kernel_ms(work, self.device, repeats=self.repeats)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            # Some work cannot be captured in a graph.
            return kernel_ms(work, self.device, repeats=self.repeats, graph=False)

    def _backward_ms(self, attention: Attention, problem: Problem) -> float:
        out = attention(*problem.leaves)

        def back() -> None:
            torch.autograd.grad(out, problem.leaves, problem.grad, retain_graph=True)

        # Autograd goes back on the stream of the forward pass, where nothing is captured.
        return kernel_ms(back, self.device, repeats=self.repeats, graph=False)


@dataclass(frozen=True)
class _Known:
    """A problem, the truth of its part, and what PyTorch makes of that part in the same dtype."""

    problem: Problem
    truth: Results
    usual: tuple[Results, Results]

    @classmethod
    def of(
        cls,
        make: Callable[[OperatorInputs, OperatorShape], Problem],
        x: OperatorInputs,
        shape: OperatorShape,
    ) -> "_Known":
        problem = make(x, shape)
        usual = [problem.truth(x.q.dtype, plain) for plain in (written_out, fused)]
        return cls(problem, problem.truth(torch.float64, written_out), (usual[0], usual[1]))


def _tidy(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
