"""Runs Gluon kernels without a GPU: their logic, not their layouts.

Triton interprets its own kernels on the CPU, but not those in Gluon. This stands in for what ours
use of it: warp groups are threads, shared memory is tensors, and everything asynchronous is as late
as it may be. A copy overwrites its target with NaN at once and brings the data only when somebody
waits for its barrier; a product is computed only when it is waited for. So a missing wait, a stage
that is filled too early or a wrong parity shows as NaN or as a deadlock.
"""

import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

PATIENCE = 20.0
"""Seconds after which a wait counts as a deadlock."""


@dataclass
class Pointer:
    """Elements of a flat tensor, by number."""

    base: Tensor
    offset: Any = 0

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.base, self.offset + offset)

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.base.dtype)


def load(pointer: Pointer, mask: Tensor | None = None, other: Any = None) -> Tensor:
    at = torch.as_tensor(pointer.offset)
    if mask is None:
        return pointer.base[at]
    at, mask = torch.broadcast_tensors(at, mask)
    return torch.where(mask, pointer.base[torch.where(mask, at, 0)], other)


def store(pointer: Pointer, value: Any, mask: Tensor) -> None:
    at, mask, value = torch.broadcast_tensors(torch.as_tensor(pointer.offset), mask, value)
    pointer.base[at[mask]] = value[mask]


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all expected bytes have come."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.phase = self.missing = self.bytes = 0
        self.count = 0
        self.copies: list[Callable[[], int]] = []

    def arrive(self, count: int = 1, expected: int = 0) -> None:
        with self.changed:
            self.bytes += expected
            self.missing -= count
            assert self.missing >= 0, "more arrivals than the barrier expects"
            self._check()

    def _check(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase ^ 1, self.count
            self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            while self.phase == parity:
                if self.missing == 0 and self.copies:
                    for copy in self.copies:
                        self.bytes -= copy()
                    self.copies.clear()
                    assert self.bytes >= 0, "more bytes copied than expected"
                    self._check()
                elif not self.changed.wait(PATIENCE):
                    raise RuntimeError("deadlock: a barrier's phase never ends")


class Shared:
    """A descriptor of shared memory."""

    def __init__(self, data: Any) -> None:
        self.data = data

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, i: Any) -> Any:
        i = int(i)
        assert 0 <= i < len(self.data)
        return self.data[i] if isinstance(self.data, list) else Shared(self.data[i])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order))

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: object) -> "Shared":
        assert dtype == self.dtype
        return Shared(self.data.view(shape))


@dataclass
class Pending:
    """A product that is under way."""

    work: Callable[[], Tensor]
    done: Tensor | None = None

    def result(self) -> Tensor:
        if self.done is None:
            self.done = self.work()
        return self.done


def _value(x: Any) -> Tensor:
    return x.result() if isinstance(x, Pending) else x.data if isinstance(x, Shared) else x


def warpgroup_mma(
    a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False
) -> Pending | Tensor:
    assert a.data.shape[0] == 64 if isinstance(a, Shared) else a.shape[0] == 64
    assert not isinstance(a, Pending)

    def work() -> Tensor:
        product = _value(a).float() @ _value(b).float()
        return product + _value(acc) if use_acc else product

    pending = Pending(work)
    return pending if is_async else pending.result()


def warpgroup_mma_wait(outstanding: int, deps: Sequence[Any]) -> Any:
    assert outstanding == 0
    done = tuple(_value(x) for x in deps)
    return done[0] if len(done) == 1 else done


@dataclass
class TensorDescriptor:
    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: object

    def box(self, at: Sequence[Any]) -> Tensor:
        """A box of the tensor, zeros beyond its edges."""
        view = self.base.as_strided(self.shape, self.strides)
        top, left = (int(x) for x in at)
        part = view[top : top + self.block_shape[0], left : left + self.block_shape[1]]
        whole = torch.zeros(self.block_shape, dtype=self.base.dtype)
        whole[: part.shape[0], : part.shape[1]] = part
        return whole


def async_copy_global_to_shared(
    source: TensorDescriptor, at: Sequence[Any], barrier: Barrier, target: Shared
) -> None:
    assert list(target.data.shape) == source.block_shape
    target.data.fill_(float("nan"))

    def copy() -> int:
        target.data.copy_(source.box(at))
        # The kernels are for numbers of two bytes, whatever they are tried out with.
        return target.data.numel() * 2

    with barrier.changed:
        barrier.copies.append(copy)
        barrier.changed.notify_all()


def allocate_shared_memory(dtype: torch.dtype, shape: list[int], layout: object) -> Shared:
    if dtype == torch.int64:
        return Shared([Barrier() for _ in range(shape[0])])
    return Shared(torch.full(shape, float("nan"), dtype=dtype))


def init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = count


def arrive(barrier: Barrier, count: int = 1, pred: Any = True) -> None:
    if pred:
        barrier.arrive(count)


def warp_specialize(
    functions_and_args: Sequence[tuple[Callable, tuple]], warps: list[int], registers: list[int]
) -> None:
    assert len(warps) == len(registers) == len(functions_and_args) - 1
    failures: list[BaseException] = []

    def run(function: Callable, args: tuple) -> None:
        try:
            function(*args)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in functions_and_args]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@dataclass
class Kernel:
    """A function that runs inline, or once per program when a grid is given."""

    function: Callable
    programs: SimpleNamespace = field(default_factory=SimpleNamespace)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            assert num_warps == 4
            held = [Pointer(x.view(-1)) if isinstance(x, Tensor) else x for x in args]
            for pid in range(grid[0]):
                _PROGRAM.id = torch.tensor(pid)
                self.function(*held, **constants)

        return launch


_PROGRAM = SimpleNamespace(id=torch.tensor(0))


def _jit(function: Callable | None = None, do_not_specialize: object = None) -> Any:
    return Kernel if function is None else Kernel(function)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Layouts, fences and barriers among the threads of a group: one thread has no need of them."""


_LANGUAGE = {
    "constexpr": lambda x: x,
    "float32": torch.float32,
    "int32": torch.int32,
    "int64": torch.int64,
    "static_range": range,
    "program_id": lambda axis: _PROGRAM.id,
    "arange": lambda start, end, layout: torch.arange(start, end),
    "zeros": lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    "full": lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    "convert_layout": lambda x, layout: x,
    "where": lambda c, a, b: torch.where(torch.as_tensor(c), a, b),
    "maximum": torch.maximum,
    "minimum": lambda a, b: min(int(a), int(b)),
    "max": lambda x, axis: x.amax(axis),
    "sum": lambda x, axis: x.sum(axis),
    "exp2": torch.exp2,
    "log2": torch.log2,
    "load": load,
    "store": store,
    "allocate_shared_memory": allocate_shared_memory,
    "warp_specialize": warp_specialize,
    "barrier": _nothing,
    "NVMMADistributedLayout": _nothing,
    "NVMMASharedLayout": _nothing,
    "BlockedLayout": _nothing,
    "SliceLayout": _nothing,
    "DotOperandLayout": _nothing,
}


def _module(name: str, contents: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(contents)
    return module


def simulated(*paths: Path) -> list[ModuleType]:
    """The modules at `paths` with their Gluon kernels made to run here.

    A module may import from those named before it.
    """
    gluon = "triton.experimental.gluon"
    language = _module(f"{gluon}.language", _LANGUAGE)
    mbarrier = {
        "init": init,
        "arrive": arrive,
        "expect": lambda barrier, expected: barrier.arrive(1, expected),
        "wait": lambda barrier, parity: barrier.wait(int(parity)),
        "MBarrierLayout": _nothing,
    }
    hopper = {
        "fence_async_shared": _nothing,
        "mbarrier": SimpleNamespace(**mbarrier),
        "tma": SimpleNamespace(async_copy_global_to_shared=async_copy_global_to_shared),
        "warpgroup_mma": warpgroup_mma,
        "warpgroup_mma_init": lambda x: x,
        "warpgroup_mma_wait": warpgroup_mma_wait,
    }
    stand_ins = {
        gluon: {"language": language, "jit": _jit, "constexpr_function": lambda f: f},
        f"{gluon}.language": _LANGUAGE,
        f"{gluon}.language.nvidia": {},
        f"{gluon}.language.nvidia.hopper": hopper,
        f"{gluon}.nvidia": {},
        f"{gluon}.nvidia.hopper": {"TensorDescriptor": TensorDescriptor},
    }
    modules = []
    with pytest.MonkeyPatch.context() as patch:
        for name, contents in stand_ins.items():
            patch.setitem(sys.modules, name, _module(name, contents))
        # Where the real one was imported before, its parent leads there.
        parent = importlib.import_module("triton.experimental")
        patch.setattr(parent, "gluon", sys.modules[gluon], raising=False)
        for path in paths:
            spec = importlib.util.spec_from_file_location(f"simulated_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            modules.append(importlib.util.module_from_spec(spec))
            spec.loader.exec_module(modules[-1])
            patch.setitem(sys.modules, f"decmem.ops.{path.stem}", modules[-1])
    return modules
