"""Which tiles suit the kernels of block-sparse attention on this GPU.

python benchmarks/tune_sparse.py [--seconds 75] [--workers 14] [--only TEXT] [--out FILE.txt]

Every choice of tiles is first tried on a small input, in processes of their own: they compile it
into Triton's cache, and one that is wrong, fails or hangs is out. Then another process times the
rest at the shapes that matter, as CUDA graphs with cold caches; one that hangs there is left out
and the process begun anew. Rates count the work that was asked for, not the padding. The winners
belong in decmem/ops/sparse_tiles.py.
"""

import argparse
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decmem.bench.clock import kernel_ms
from decmem.ops import reference
from decmem.ops import sparse_backward_kernels as triton_backward
from decmem.ops import sparse_cuda_backward_kernels as cuda_backward
from decmem.ops import sparse_cuda_kernels as cuda_forward
from decmem.ops import sparse_forward_kernels as triton_forward
from decmem.ops.readers import inverse_lists
from decmem.ops.sparse_tiles import (
    CudaKeyTiles,
    CudaQueryTiles,
    CudaTiles,
    ForwardTiles,
    KeyTiles,
    QueryTiles,
)


class Shape(NamedTuple):
    """A shape that matters; `tokens` of the `P` slots of a block are counted as work."""

    B: int
    H: int
    G: int
    NQ: int
    NK: int
    P: int
    D: int
    K: int
    counts: tuple[int, ...] = ()
    chunk: int = 0  # blocks of one; lists then reach back from it

    @property
    def tokens(self) -> float:
        return sum(self.counts) / len(self.counts) if self.counts else self.P


CUDA = torch.device("cuda")
PAPER = (154, 143, 143)
WRONG = 0.02  # of the largest value: right results in bf16 do not stray so far

SHAPES = {
    "paper": Shape(1, 24, 24, 24, 1236, 160, 72, 80, PAPER),
    "pair": Shape(2, 24, 24, 24, 1236, 160, 72, 80, PAPER),
    "wide": Shape(2, 24, 24, 24, 1236, 192, 96, 80),
    "peer": Shape(2, 24, 24, 24, 1236, 128, 128, 92),
    "train": Shape(1, 24, 24, 720, 360, 160, 72, 80, PAPER, 24),
    "pocket": Shape(6, 6, 1, 1512, 504, 16, 64, 16, (), 24),
}


class Choice(NamedTuple):
    what: str
    shape: str
    tiles: Any
    split: int = 1

    @property
    def cuda(self) -> bool:
        return isinstance(self.tiles, CudaTiles | CudaQueryTiles | CudaKeyTiles)

    @property
    def name(self) -> str:
        kernels = "cuda" if self.cuda else "triton"
        split = f" split {self.split}" if self.split > 1 else ""
        return f"{self.what} {self.shape} {kernels} {tuple(self.tiles)}{split}"


TRIED: list[tuple[str, str, type, list[tuple]]] = [
    ("forward", "pair", CudaTiles, [
        (128, 16, 3, 3, False), (96, 16, 3, 4, True), (80, 80, 3, 4, True),
    ]),
    ("forward", "wide", CudaTiles, [
        (112, 16, 3, 3, False), (96, 96, 3, 3, False), (64, 64, 3, 4, False),
    ]),
    ("forward", "peer", CudaTiles, [(128, 128, 2, 2, True), (144, 16, 2, 2, True)]),
    ("queries", "pair", CudaQueryTiles, [(64, 16, 3, 4), (48, 16, 3, 4)]),
    ("queries", "wide", CudaQueryTiles, [(48, 48, 3, 4), (32, 32, 3, 4)]),
    ("queries", "peer", CudaQueryTiles, [(64, 64, 2, 4), (64, 64, 2, 3), (32, 32, 2, 4)]),
    ("queries", "train", CudaQueryTiles, [(64, 16, 3, 4)]),
    ("keys", "pair", CudaKeyTiles, [(80, 3, 3), (80, 3, 2), (32, 3, 4)]),
    ("keys", "wide", CudaKeyTiles, [(48, 3, 3), (48, 3, 2), (32, 3, 4)]),
    ("keys", "peer", CudaKeyTiles, [(64, 2, 3), (64, 2, 2), (32, 2, 4)]),
    ("keys", "train", CudaKeyTiles, [(80, 3, 3)]),
    ("forward", "pair", ForwardTiles, [
        (64, 3, 64, 16, 4, 3), (64, 3, 64, 16, 4, 2), (64, 1, 64, 16, 4, 3),
    ]),
    ("forward", "wide", ForwardTiles, [
        (64, 1, 64, 0, 4, 3), (64, 3, 64, 0, 4, 2), (128, 1, 64, 0, 8, 3),
    ]),
    ("forward", "peer", ForwardTiles, [
        (128, 1, 128, 0, 8, 2), (64, 2, 64, 0, 4, 3), (128, 1, 64, 0, 8, 3),
    ]),
    ("forward", "pocket", ForwardTiles, [
        (16, 1, 32, 0, 1, 4), (16, 1, 32, 0, 1, 3), (16, 1, 32, 0, 1, 5), (16, 1, 64, 0, 1, 2),
    ]),
    ("queries", "train", QueryTiles, [
        (64, 3, 32, 4, 2), (64, 1, 32, 4, 3), (64, 1, 64, 4, 2), (64, 3, 32, 4, 3),
    ]),
    ("keys", "train", KeyTiles, [(32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 4, 2)]),
    ("queries", "pocket", QueryTiles, [(16, 1, 64, 1, 2), (16, 1, 32, 1, 3), (16, 1, 64, 2, 2)]),
    ("keys", "pocket", KeyTiles, [(64, 16, 2, 2), (64, 16, 1, 2), (32, 16, 1, 3), (64, 16, 2, 3)]),
]  # fmt: skip


def choices() -> list[Choice]:
    """What is tried: those above, and one row of the paper in lists cut into parts."""
    tiles = CudaTiles(128, 16, 3, 3, False)
    rows = [Choice("forward", "paper", tiles, split) for split in (1, 2, 3)]
    rows.append(Choice("forward", "paper", ForwardTiles(64, 3, 64, 16, 4, 3), 2))
    return rows + [
        Choice(what, shape, kind(*numbers)) for what, shape, kind, many in TRIED for numbers in many
    ]


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    lists: Tensor
    valid: Tensor | None


def inputs(shape: Shape) -> Inputs:
    """Random blocks and ascending lists, which reach back from a query block's chunk if any."""
    B, H, G, NQ, NK, P, D, K = shape[:8]
    make = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(B, H, n, P, D, device="cuda", dtype=torch.bfloat16, generator=make)
        for n in (NQ, NK, NK)
    )
    rank = torch.rand(B, G, NQ, NK, device="cuda", generator=make)
    if shape.chunk:
        # Streams of NK blocks side by side.
        reach = (torch.arange(NQ, device="cuda") % NK) // shape.chunk * shape.chunk
        rank[:, :, torch.arange(NK, device="cuda") >= reach[:, None]] = 2.0
    best, lists = rank.topk(min(K, NK), dim=-1, largest=False)
    lists = torch.where(best < 2.0, lists, NK).sort(-1).values
    lists = torch.where(lists < NK, lists, -1).to(torch.int32)
    valid = torch.tensor(shape.counts, dtype=torch.int32, device="cuda") if shape.counts else None
    return Inputs(q, k, v, lists, valid)


def small(shape: Shape) -> Shape:
    """The same blocks, few of them: all workers hold such inputs at once, and the definition's
    scores of every query against every key."""
    chunk = min(shape.chunk, 4)
    return shape._replace(B=min(shape.B, 2), H=2, G=min(shape.G, 2), NQ=12, NK=12, K=7, chunk=chunk)


def call(choice: Choice, x: Inputs, shared: dict) -> Callable[[], Any]:
    """The kernel under test; what the backward needs of the forward is made once for a shape."""
    scale = x.q.shape[-1] ** -0.5
    if choice.what == "forward":
        forward = cuda_forward if choice.cuda else triton_forward
        return lambda: forward.run_forward(*x, scale, split=choice.split, tiles=choice.tiles)
    if "lse" not in shared:
        out, shared["lse"] = triton_forward.run_forward(*x, scale)
        shared["grad"] = torch.randn_like(out)
        shared["delta"] = triton_backward.run_delta(out, shared["grad"])
        shared["inverse"] = inverse_lists(x.lists, x.k.shape[2])
    arguments = (*x, scale, shared["grad"], shared["lse"], shared["delta"], choice.tiles)
    back = cuda_backward if choice.cuda else triton_backward
    if choice.what == "queries":
        return lambda: back.run_query_gradient(*arguments)
    return lambda: back.run_key_gradient(*arguments, shared["inverse"])


def wanted(choice: Choice, x: Inputs, shared: dict) -> list[Tensor]:
    leaves = [t.float().requires_grad_() for t in x[:3]]
    out = reference.block_sparse_attention(*leaves, x.lists, x.valid)
    if choice.what == "forward":
        return [out]
    gradients = torch.autograd.grad(out, leaves, shared["grad"].float())
    return list(gradients[:1] if choice.what == "queries" else gradients[1:])


def work_of(choice: Choice, x: Inputs) -> float:
    """Floating-point operations asked for: two products forward, five backward, halved."""
    shape = SHAPES[choice.shape]
    pairs = int((x.lists >= 0).sum()) * (shape.H // shape.G)
    products = {"forward": 2.0, "queries": 2.5, "keys": 2.5}[choice.what]
    return products * 2 * pairs * shape.tokens**2 * shape.D


def check_one(choice: Choice) -> str:
    """What a worker says of a choice: whether it is right on a small input."""
    x, shared = inputs(small(SHAPES[choice.shape])), {}
    work = call(choice, x, shared)
    got = work()
    got = [got[0]] if choice.what == "forward" else [got] if torch.is_tensor(got) else got
    error = max(
        ((one.float() - true).abs().max() / true.abs().max()).item()
        for one, true in zip(got, wanted(choice, x, shared), strict=True)
    )
    return f"{'ok' if error < WRONG else 'WRONG'} {error:.1e}"


def time_one(choice: Choice, kept: dict) -> str:
    """What it says of the time. `kept` holds the inputs of one shape, for the next choice."""
    if kept.get("name") != choice.shape:
        kept.clear()
        torch.cuda.empty_cache()
        kept |= {"name": choice.shape, "x": inputs(SHAPES[choice.shape]), "shared": {}}
    x, shared = kept["x"], kept["shared"]
    ms = kernel_ms(call(choice, x, shared), CUDA, repeats=7)
    said = f"ok {ms:.4f} {work_of(choice, x) / ms / 1e9:.1f}"
    if "inverse" in shared and "beside" not in shared:
        out, shared["beside"] = shared["grad"], True
        lists = kernel_ms(lambda: inverse_lists(x.lists, x.k.shape[2]), CUDA)
        delta = kernel_ms(lambda: triton_backward.run_delta(out, out), CUDA)
        said += f" beside it: inverse lists {lists:.3f} ms, delta {delta:.3f} ms"
    return said


def answer(task: str, numbers: list[int]) -> None:
    """A worker: tells what became of the choices, a line for each, as far as it gets."""
    kept: dict = {}
    for number in numbers:
        choice = choices()[number]
        try:
            said = check_one(choice) if task == "check" else time_one(choice, kept)
            torch.cuda.synchronize()
        except Exception as problem:
            said = f"failed {type(problem).__name__}: {problem}".splitlines()[0][:200]
        print(f"{number} {said}", flush=True)
        try:
            torch.cuda.synchronize()
        except Exception:
            sys.exit(1)  # Of no more use; the next worker does the rest.


class Worker:
    """A process that does some of the choices; one that falls silent is ended and begun anew."""

    def __init__(self, task: str, numbers: list[int], patience: float) -> None:
        self.task, self.left, self.patience = task, list(numbers), patience
        self.said: queue.Queue[str] = queue.Queue()
        self.process: subprocess.Popen | None = None
        self._begin()

    def _begin(self) -> None:
        self.end()
        if not self.left:
            return
        self.heard, self.words = time.monotonic(), 0
        numbers = ",".join(map(str, self.left))
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--task", self.task, "--numbers", numbers],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.listener = threading.Thread(target=self._listen, args=(self.process,), daemon=True)
        self.listener.start()

    def _listen(self, process: subprocess.Popen) -> None:
        for line in process.stdout or ():
            self.said.put(line)

    def end(self) -> None:
        """Ends the process, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def news(self) -> Iterator[tuple[int, str]]:
        """Choices and what was said of them since the last call."""
        while not self.said.empty():
            number, _, verdict = self.said.get().partition(" ")
            if number.isdigit() and int(number) in self.left:
                self.left.remove(int(number))
                self.heard, self.words = time.monotonic(), self.words + 1
                yield int(number), verdict.strip()
        if not self.left or self.process is None:
            return
        silent = time.monotonic() - self.heard > self.patience
        dead = not self.listener.is_alive() and self.said.empty()
        if silent or dead:
            # One that ended after a word may have ended of what it last spoke of.
            how = "hangs, or compiles for too long" if silent else "ended its process"
            if silent or not self.words:
                yield self.left.pop(0), how
            self._begin()


def supervised(
    task: str, shares: list[list[int]], until: float, patience: float
) -> Iterator[tuple[int, str]]:
    """What workers say about their shares, as far as they get in time."""
    workers = [Worker(task, share, patience) for share in shares if share]
    try:
        while any(worker.left for worker in workers) and time.monotonic() < until:
            for worker in workers:
                yield from worker.news()
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.end()


def shares(numbers: list[int], workers: int) -> list[list[int]]:
    """Numbers for each worker. The kernels in CUDA C++ keep to workers of their own."""
    listed = choices()
    cuda = [n for n in numbers if listed[n].cuda]
    rest = [n for n in numbers if n not in cuda]
    own = min(len(cuda), max(1, workers // 3))
    others = max(1, workers - own)
    return [cuda[w::own] for w in range(own)] + [rest[w::others] for w in range(others)]


def best(timed: list[tuple[float, float, Choice]]) -> Iterator[str]:
    """The fastest of each kernel and shape, of either family."""
    yield "\nbest"
    seen: set[tuple] = set()
    for ms, rate, choice in sorted(timed, key=lambda row: (row[2].what, row[2].shape, row[0])):
        family = (choice.what, choice.shape, type(choice.tiles))
        if family not in seen:
            seen.add(family)
            yield f"{ms:8.3f} ms {rate:6.0f} TFLOP/s  {choice.name:60} {choice.tiles!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=75)
    parser.add_argument("--workers", type=int, default=max(2, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--only", default="", help="choices whose name holds this text")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--task", choices=["check", "time"], help=argparse.SUPPRESS)
    parser.add_argument("--numbers", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device")
    if asked.task:
        answer(asked.task, [int(number) for number in asked.numbers.split(",")])
        return

    begun = time.monotonic()
    listed, lines = choices(), []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    numbers = [n for n, choice in enumerate(listed) if asked.only in choice.name]
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {len(numbers)} choices")
    verdicts: dict[int, str] = {}
    halfway = begun + 0.65 * asked.seconds
    for number, verdict in supervised("check", shares(numbers, asked.workers), halfway, 40):
        verdicts[number] = verdict
        say(f"{time.monotonic() - begun:5.0f} s  {listed[number].name}: {verdict}")
    silent = [listed[number].name for number in numbers if number not in verdicts]
    say(f"no word in time: {'; '.join(silent) or 'of none'}")

    order = list(SHAPES)
    good = [n for n in numbers if verdicts.get(n, "").startswith("ok")]
    good.sort(key=lambda n: order.index(listed[n].shape))
    say(f"\nto time: {len(good)}, after {time.monotonic() - begun:.0f} s")
    timed = []
    for number, verdict in supervised("time", [good], begun + asked.seconds, 20):
        choice = listed[number]
        if not verdict.startswith("ok"):
            say(f"not timed: {choice.name}: {verdict}")
            continue
        _, *figures = verdict.split(" ", 3)
        ms, rate = float(figures[0]), float(figures[1])
        timed.append((ms, rate, choice))
        say(f"{ms:8.3f} ms {rate:6.0f} TFLOP/s  {choice.name} {' '.join(figures[2:])}")
    for line in best(timed):
        say(line)
    say(f"{len(good) - len(timed)} not timed, {time.monotonic() - begun:.0f} s in all")
    if asked.out:
        asked.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
