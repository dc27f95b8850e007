"""The fastest launches of the window kernels on this GPU, tried side by side.

python benchmarks/tune_window.py [--seconds 60] [--workers 12] [--presets pocket paper]

Each of the three kernels is timed alone, at the shape of a training step, for every chunk size
the preset trains with; the times are weighted as training draws the sizes. Processes of their own
compile all launches first, and run them once, so that one that fails there is only a line in the
table. Output is checked against the definition, and every launch against the first. The winners
belong in decmem/ops/window_launches.py.
"""

import argparse
import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from decmem.bench.clock import median_device_ms
from decmem.bench.window import WindowShape, worst_error
from decmem.ops.window import window_attention
from decmem.ops.window_launches import Launch, Launches, choose_launches
from decmem.presets import PRESETS

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
KERNELS = Launches._fields
PRODUCTS = {"forward": 2, "query_gradient": 3, "key_gradient": 4}

CANDIDATES: dict[str, dict[str, list[tuple[int, ...]]]] = {
    "pocket": {
        "forward": [
            (128, 64, 8, 3, 128), (128, 64, 8, 2, 128), (128, 64, 8, 4, 128), (128, 64, 8, 3, 0),
            (64, 64, 4, 3, 128), (64, 64, 4, 3, 168), (64, 64, 4, 2, 128), (64, 128, 4, 2, 0),
            (64, 128, 4, 3, 0), (128, 128, 8, 2, 0), (128, 128, 8, 3, 0), (128, 32, 8, 3, 128),
            (128, 32, 8, 4, 128), (128, 64, 4, 3, 0),
        ],
        "query_gradient": [
            (64, 64, 4, 3, 168), (64, 64, 4, 3, 128), (64, 64, 4, 2, 128), (64, 64, 4, 2, 168),
            (128, 64, 8, 3, 128), (128, 64, 8, 2, 128), (128, 64, 8, 3, 0), (128, 32, 8, 3, 128),
            (128, 32, 8, 2, 128), (64, 32, 4, 3, 128), (64, 32, 4, 4, 128),
        ],
        "key_gradient": [
            (64, 64, 4, 3, 0), (64, 64, 4, 2, 0), (64, 64, 4, 2, 168), (64, 64, 4, 3, 168),
            (64, 32, 4, 3, 0), (64, 32, 4, 2, 168), (64, 32, 4, 3, 168), (128, 64, 8, 2, 0),
            (128, 64, 8, 3, 0), (128, 32, 8, 2, 0), (128, 32, 8, 3, 128), (64, 128, 8, 2, 0),
        ],
    },
    "paper": {
        "forward": [
            (128, 64, 8, 3, 128), (128, 64, 8, 2, 128), (128, 64, 8, 3, 0), (64, 64, 4, 3, 0),
            (64, 64, 4, 3, 168), (64, 64, 4, 2, 168), (128, 128, 8, 2, 0), (128, 32, 8, 3, 128),
        ],
        "query_gradient": [
            (128, 32, 8, 2, 128), (128, 32, 8, 3, 128), (64, 64, 4, 3, 0), (64, 64, 4, 2, 168),
            (128, 64, 8, 3, 0), (64, 32, 4, 3, 168), (64, 32, 4, 3, 0),
        ],
        "key_gradient": [
            (64, 64, 4, 2, 0), (64, 64, 4, 3, 0), (64, 32, 4, 3, 0), (64, 32, 4, 2, 168),
            (128, 32, 8, 2, 0), (128, 32, 8, 3, 0),
        ],
    },
}  # fmt: skip

WRONG = 16.0
"""Roundings of the largest value by which two right launches stay apart."""


@dataclass
class Trial:
    """A launch of a kernel: what became of it. `weighted` is in milliseconds."""

    preset: str
    kernel: str
    launch: Launch
    compiled: float | None = None
    times: dict[int, float] = field(default_factory=dict)
    weighted: float | None = None
    failure: str = ""

    @property
    def name(self) -> str:
        rows, columns, warps, stages, registers = self.launch
        return f"{rows:>3}x{columns:<3} w{warps} s{stages} r{registers or '-'}"


class Step:
    """Tensors of a training step of one chunk size, and the kernels to run on them.

    `small` is one clip of two heads: the same code, sooner run.
    """

    def __init__(self, preset: str, chunk: int, small: bool = False) -> None:
        training = PRESETS[preset].memory_training
        self.shape = WindowShape(PRESETS[preset], training.latents, clips_of(preset), chunk)
        self.windows = self.shape.windows
        self.valid = self.shape.valid(DEVICE)
        if small:
            model = PRESETS[preset].model
            shape = (1, 2, len(self.windows.table), model.layout.S, model.position.head_dim)
            self.tensors = tuple(torch.randn(4, *shape, device=DEVICE, dtype=DTYPE))
        else:
            self.tensors = self.shape.inputs(DEVICE, DTYPE)
        self.saved: tuple[Tensor, Tensor, Tensor] | None = None

    def tiles(self, kernel: str, launch: Launch) -> Tensor:
        q = self.tensors[0]
        with torch.enable_grad():
            made = self.windows.tiles(Launches(launch, launch, launch), q.shape[3], q.device)
        return made[KERNELS.index(kernel)]

    def work(self, kernel: str, launch: Launch) -> Callable[[], tuple[Tensor, ...]]:
        """One run of a kernel."""
        from decmem.ops import window_kernels

        q, k, v, grad = (x.detach() for x in self.tensors)
        words = None if self.valid is None else window_kernels.valid_words(self.valid)
        tiles = self.tiles(kernel, launch)
        if kernel == "forward":
            return lambda: window_kernels.forward(q, k, v, tiles, words, launch)
        out, lse, stats = self.saved or (grad, *self._blank_statistics(q))
        if kernel == "query_gradient":
            return lambda: window_kernels.query_gradient(
                q, k, v, tiles, words, launch, out, lse, grad
            )
        return lambda: window_kernels.key_gradient(q, k, v, tiles, words, launch, stats, grad)

    @staticmethod
    def _blank_statistics(q: Tensor) -> tuple[Tensor, Tensor]:
        lse = torch.full(q.shape[:4], 20.0, device=q.device)
        return lse, torch.stack((lse, torch.zeros_like(lse)), -1)

    def save(self) -> None:
        """Output and statistics, as the launches in use give them."""
        launches = choose_launches(self.tensors[0])
        out, lse = self.work("forward", launches.forward)()
        self.saved = (out, lse, lse)
        _, stats = self.work("query_gradient", launches.query_gradient)()
        self.saved = (out, lse, stats)


def clips_of(preset: str) -> int:
    """Of a step on one GPU: the paper's 64 are spread over many."""
    return 1 if preset == "paper" else PRESETS[preset].memory_training.batch


def compile_share(share: list[tuple[int, str, str, Launch]], done: Any) -> None:
    """In a process of its own: compiles and runs each launch once, and tells what became of it."""
    steps: dict[str, Step] = {}
    for index, preset, kernel, launch in share:
        began = time.monotonic()
        if preset not in steps:
            # What fails here says nothing of the launch: it is left to be tried by the parent.
            steps[preset] = Step(preset, max(PRESETS[preset].model.chunk_sizes), small=True)
        failure = ""
        try:
            steps[preset].work(kernel, launch)()
            torch.cuda.synchronize()
        except Exception as error:
            failure = first_line(error)
        done.put((index, time.monotonic() - began, failure))


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:90]


def compile_all(trials: list[Trial], workers: int, until: float) -> None:
    """Compiles side by side. What is not back in time is left to be compiled when it is timed."""
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    work = [(i, t.preset, t.kernel, t.launch) for i, t in enumerate(trials)]
    processes = [
        context.Process(target=compile_share, args=(work[w::workers], done), daemon=True)
        for w in range(min(workers, len(work)))
    ]
    for process in processes:
        process.start()
    missing = len(trials)
    while missing and time.monotonic() < until:
        try:
            index, seconds, failure = done.get(timeout=0.5)
        except queue.Empty:
            if not any(process.is_alive() for process in processes):
                break
            continue
        missing -= 1
        trials[index].compiled, trials[index].failure = seconds, failure
        if failure:
            say(f"  {trials[index].kernel} {trials[index].name}: {failure}")
    for process in processes:
        process.terminate()


def measure(trials: list[Trial], preset: str, until: float, repeats: int) -> None:
    """Times every launch of a preset at all its chunk sizes, and checks it against the first."""
    chunks = PRESETS[preset].model.chunk_sizes
    # As training draws them.
    weight = {chunk: chunk / sum(chunks) for chunk in chunks}
    for chunk in sorted(chunks, reverse=True):
        step = Step(preset, chunk)
        if chunk == max(chunks):
            worst = worst_error(
                lambda q, k, v, step=step: window_attention(q, k, v, step.windows, step.valid),
                step.windows,
                step.valid,
                step.tensors,
            )
            say(f"{preset}: launches in use are off by {worst:.2f} roundings")
        step.save()
        first: dict[str, tuple[Tensor, ...]] = {}
        for trial in trials:
            if trial.preset != preset or trial.failure:
                continue
            if time.monotonic() > until:
                trial.failure = "not timed: out of time"
                continue
            try:
                work = step.work(trial.kernel, trial.launch)
                apart = distance(work(), first.setdefault(trial.kernel, work()))
                if not apart < WRONG:
                    trial.failure = f"WRONG by {apart:.3g} roundings"
                    continue
                trial.times[chunk] = median_device_ms(work, DEVICE, warmup=1, repeats=repeats)
            except Exception as error:
                trial.failure = first_line(error)
        del step, first
    for trial in trials:
        if trial.preset == preset and not trial.failure:
            trial.weighted = sum(weight[chunk] * ms for chunk, ms in trial.times.items())


def distance(results: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> float:
    """Largest difference, in roundings of bf16 of the largest value."""
    worst = 0.0
    for one, other in zip(results, others, strict=True):
        if one.dtype == torch.bfloat16:
            unit = torch.finfo(torch.bfloat16).eps * other.abs().max().float()
            apart = float((one.float() - other.float()).abs().max() / unit)
            worst = max(worst, apart if apart == apart else float("inf"))
    return worst


def table(trials: list[Trial], presets: list[str]) -> None:
    """The launches, fastest first, and the winners as they are written in the code."""
    for preset in presets:
        chunks = sorted(PRESETS[preset].model.chunk_sizes)
        clips, latents = clips_of(preset), PRESETS[preset].memory_training.latents
        flop = {c: WindowShape(PRESETS[preset], latents, clips, c).flop for c in chunks}
        say(f"\n{preset}, {latents} latents, {clips} clips; ms (TFLOP/s) in chunks of {chunks}")
        winners = []
        for kernel in KERNELS:
            ours = [t for t in trials if (t.preset, t.kernel) == (preset, kernel)]
            timed = sorted((t for t in ours if t.weighted), key=lambda t: t.weighted or 0)
            winners.append(timed[0].launch if timed else None)
            for trial in timed:
                cells = [
                    f"{ms:.3f} ({PRODUCTS[kernel] / 2 * flop[c] / ms / 1e9:.0f})"
                    for c, ms in sorted(trial.times.items())
                ]
                say(f"  {kernel:14} {trial.name:20} {trial.weighted:.3f} | " + "  ".join(cells))
            for trial in ours:
                if trial.failure:
                    say(f"  {kernel:14} {trial.name:20} {trial.failure}")
        say(f"  best: {', '.join(str(tuple(w)) if w else 'none' for w in winners)}")


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)))
    parser.add_argument("--presets", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device")
    began = time.monotonic()
    trials = [
        Trial(preset, kernel, Launch(*numbers))
        for preset in asked.presets
        for kernel in KERNELS
        for numbers in CANDIDATES[preset][kernel]
    ]

    def give_up() -> None:
        # A kernel that never ends cannot be stopped otherwise.
        say("\nout of time; what was measured until now:")
        table(trials, asked.presets)
        os._exit(1)

    watchdog = threading.Timer(asked.seconds, give_up)
    watchdog.daemon = True
    watchdog.start()
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {len(trials)} launches")
    compile_all(trials, asked.workers, began + 0.6 * asked.seconds)
    late = sum(t.compiled is None for t in trials)
    say(f"compiled after {time.monotonic() - began:.1f} s, {late} are missing")
    # Those compile when they are timed: last, so that they cost nobody else the time.
    order = sorted(trials, key=lambda t: t.compiled is None)
    for preset in asked.presets:
        measure(order, preset, began + 0.9 * asked.seconds, asked.repeats)
        say(f"{preset} timed after {time.monotonic() - began:.1f} s")
    watchdog.cancel()
    table(trials, asked.presets)


if __name__ == "__main__":
    main()
