"""The clock: warm-up is not measured, and the median is taken."""

import pytest
import torch

from decmem.bench import clock

CPU = torch.device("cpu")


@pytest.mark.parametrize("measure", [clock.median_ms, clock.median_device_ms, clock.kernel_ms])
def test_the_median_is_taken_after_warming_up(
    measure: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter([0.0, 0.1, 1.0, 1.3, 2.0, 2.2])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))
    calls = []
    assert callable(measure)
    ms = measure(lambda: calls.append(1), CPU, warmup=2, repeats=3)
    assert ms == pytest.approx(200)
    assert len(calls) == 5


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
def test_kernels_are_timed_without_their_launches(graph: bool) -> None:
    cuda = torch.device("cuda")
    x = torch.zeros(1024, device=cuda)
    ms = clock.kernel_ms(lambda: x.add_(1), cuda, warmup=2, repeats=3, graph=graph)
    torch.cuda.synchronize()
    assert ms > 0
    # Capturing runs nothing; one replay warms up.
    assert x[0].item() == (2 + 1 + 3 if graph else 2 + 3)
