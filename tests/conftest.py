"""How the tests run: shapes checked at run time, one thread, hardware tests by predicate."""

import os

# Before torch, numba or numpy are imported: tests run in parallel, each with one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

COMPILED = Path(__file__).parent / "compiled"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-shape-checks",
        action="store_true",
        help="do not check array shapes at run time; needed by tests/compiled, because the "
        "checks break torch.compile",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--no-shape-checks"):
        from jaxtyping import install_import_hook

        # The tower lets an int stand where a float is asked for, as type checkers do.
        checker = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
        install_import_hook("decmem", checker)
        _hand_numba_the_bare_functions()

    # A GPU machine may have no more than PyTorch and pytest.
    if find_spec("hypothesis"):
        from hypothesis import settings

        # The same examples on every run, and no deadline: a busy machine is not a failure.
        settings.register_profile("house", deadline=None, derandomize=True, database=None)
        settings.load_profile("house")

    import torch

    torch.set_num_threads(1)

    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        from .quick_interpreter import hurry

        hurry()


def _hand_numba_the_bare_functions() -> None:
    """Numba compiles what a function says, not the checks that the hook puts around it."""
    import inspect

    import numba

    njit = numba.njit

    def bare(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return lambda decorated: bare(decorated, **options)
        return njit(inspect.unwrap(function), **options)

    numba.njit = bare


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    checked = not config.getoption("--no-shape-checks")
    if checked and collection_path.is_relative_to(COMPILED):
        return True
    # Where only kernels are asked for, files that mark none are not imported: half of the start.
    if config.getoption("markexpr") == "interpreter" and collection_path.match("test_*.py"):
        return True if "mark.interpreter" not in collection_path.read_text("utf-8") else None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    not_interpreted = pytest.mark.skip(
        reason="TRITON_INTERPRET=1 must be set: make test-interpreter"
    )
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("interpreter") and os.environ.get("TRITON_INTERPRET") != "1":
            item.add_marker(not_interpreted)


@pytest.fixture
def waiting_forbidden() -> Callable[[], AbstractContextManager[None]]:
    """Inside it, an operation that makes the host wait for the GPU is an error."""
    import torch

    @contextmanager
    def forbidden() -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        try:
            with warnings.catch_warnings():
                # PyTorch says of the mode itself that it is a prototype; all of its warnings here
                # are errors, and the mode would outlast this one.
                warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
                torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return forbidden


@pytest.fixture
def windows_in_the_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has windows read where they lie, as the kernels for Hopper GPUs do, on any device."""
    import torch
    from torch import Tensor

    from decmem import engine
    from decmem.ops import sparse_kernels, window
    from decmem.ops.block_sparse import block_sparse_attention
    from decmem.ops.window import Tiles, WindowTable
    from decmem.ops.window_blocks import tile_lists

    def tiles(
        q: Tensor, k: Tensor, windows: WindowTable, counts: Tensor, kept: Tensor | None
    ) -> Tiles:
        S = q.shape[3]
        if kept is None:
            lists = tile_lists(windows.table, S, S, len(counts))
            assert lists is not None
            return Tiles(lists, None)
        return Tiles.of_tokens(windows, kept, S, 8, len(counts))

    def attend(*arguments: object, **named: object) -> Tensor:
        if named.get("backend") == "hopper":
            named["backend"] = "gather"
        return block_sparse_attention(*arguments, **named)  # pyright: ignore[reportArgumentType]

    def attend_rows(
        q: Tensor, k: Tensor, v: Tensor, lists: Tensor, counts: Tensor, rows: Tensor,
        lines: int = 0, scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        there = rows[..., 0] >= 0
        queries = torch.where(there[..., None], q[:, :, rows[..., 0].clamp(min=0)], 0.0)
        got = block_sparse_attention(queries, k, v, lists, counts, scale, backend="gather")
        # Nobody may read what is not a token's.
        out = q.new_full((*q.shape[:2], lines or q.shape[2], q.shape[3]), float("nan"))
        out[:, :, rows[..., 1][there].long()] = got[:, :, there]
        return out.transpose(1, 2) if lines else out

    def attend_both(
        q: Tensor, k: Tensor, v: Tensor, near: Tensor, rows: Tensor, far: Tensor,
        counts: Tensor, scale: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        blocks = q.unflatten(2, (far.shape[2], -1))
        o_far = block_sparse_attention(blocks, k, v, far, counts, scale, backend="gather")
        return attend_rows(q, k, v, near, counts, rows, scale=scale), o_far.view_as(q)

    monkeypatch.setattr(sparse_kernels, "rows_attention", attend_rows)
    monkeypatch.setattr(sparse_kernels, "near_and_far_attention", attend_both)
    monkeypatch.setattr(sparse_kernels, "hopper_obstacle", lambda *asked: None)
    monkeypatch.setattr(engine, "hopper_tiles", tiles)
    monkeypatch.setattr(window, "block_sparse_attention", attend)
