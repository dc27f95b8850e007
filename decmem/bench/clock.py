"""The clock of every benchmark: warm-up, then the median of repeated runs."""

import itertools
import statistics
import time
from collections.abc import Callable

import torch


def median_ms(
    work: Callable[[], object], device: torch.device, warmup: int = 2, repeats: int = 7
) -> float:
    """Median milliseconds of `work`, which may be called as often as one likes.

    On a GPU every run is waited for, so that launches that overlap do not hide work.
    """
    for _ in range(warmup):
        work()
    times = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def median_device_ms(
    work: Callable[[], object], device: torch.device, warmup: int = 2, repeats: int = 7
) -> float:
    """Median milliseconds between the events around each run on a GPU's own clock.

    Nothing is waited for in between, so that the launching of one run hides behind the last, as
    in training. On a CPU the same as `median_ms`.
    """
    if device.type != "cuda":
        return median_ms(work, device, warmup, repeats)
    for _ in range(warmup):
        work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        work()
    events[-1].record()
    _wait(device)
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


_CACHE_BYTES = 256 * 2**20
"""More than the second-level cache of any GPU: overwriting so much leaves nothing of it."""


def kernel_ms(
    work: Callable[[], object],
    device: torch.device,
    warmup: int = 2,
    repeats: int = 7,
    graph: bool = True,
) -> float:
    """Median milliseconds of the kernels of `work` alone, on a GPU with cold caches.

    The launches are captured in a CUDA graph, so that no time of the CPU is in the figure. Without
    `graph`, for work that cannot be captured, they are queued behind other work instead, which
    hides them unless `work` waits for the device. Before every run the caches are overwritten. On
    a CPU the same as `median_ms`.
    """
    if device.type != "cuda":
        return median_ms(work, device, warmup, repeats)
    run, sweeps = (_captured(work, device, warmup), 1) if graph else (work, _QUEUE)
    for _ in range(1 if graph else warmup):
        run()
    dirt = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(repeats)]
    for begun, done in events:
        for _ in range(sweeps):
            dirt.zero_()
        begun.record()
        run()
        done.record()
    _wait(device)
    return statistics.median(begun.elapsed_time(done) for begun, done in events)


_QUEUE = 10
"""Sweeps that keep a GPU busy for a millisecond, while the launches to be timed queue up."""


def _captured(
    work: Callable[[], object], device: torch.device, warmup: int
) -> Callable[[], object]:
    """The launches of `work`, to be repeated."""
    # Capture wants what is initialised on first use to be so, and on another stream.
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(warmup):
            work()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
