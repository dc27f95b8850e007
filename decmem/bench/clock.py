"""The clock of every benchmark: warm-up, then the median of repeated runs."""

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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
