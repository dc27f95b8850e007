"""The kernels for Hopper GPUs, simulated: their waits, stages and indices against the definition.

What only hardware shows (layouts, fences) is tested with the other backends, on a GPU.
"""

import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from decmem.errors import UserError
from decmem.ops import block_sparse, reference, sparse_tiles
from decmem.ops.sparse_tiles import (
    HopperTiles,
    columns,
    hopper_key_tiles,
    hopper_query_tiles,
    hopper_split_of,
    hopper_tiles,
)

from .gluon_simulator import simulated

FOLDER = Path(sparse_tiles.__file__).parent


@pytest.fixture(scope="module")
def modules() -> list[ModuleType]:
    names = "sparse_hopper_kernels.py", "sparse_hopper_backward_kernels.py"
    return simulated(*(FOLDER / name for name in names))


@pytest.fixture
def kernels(modules: list[ModuleType]) -> ModuleType:
    return modules[0]


@pytest.fixture
def backward(modules: list[ModuleType]) -> ModuleType:
    return modules[1]


def inputs(
    B: int, H: int, G: int, Nq: int, Pq: int, Nk: int, Pk: int, D: int, K: int, worlds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, Nq, Pq, D, generator=generator)
    k, v = (torch.randn(worlds, H, Nk, Pk, D, generator=generator) for _ in "kv")
    lists = torch.full((B, G, Nq, K), -1, dtype=torch.int32)
    for n, row in enumerate(lists.view(-1, K)):
        length = K - n % (K + 1)
        row[:length] = torch.randperm(Nk - 1, generator=generator)[:length].sort().values
    k[:, :, -1], v[:, :, -1] = float("nan"), float("nan")  # nobody reads the last block
    return q, k, v, lists


CASES = {
    "paper": ((1, 2, 2, 3, 160, 6, 160, 72, 4, 1), [154, 143, 143], HopperTiles(64, 16, 1, 5, 3)),
    "paper-in-pieces": (
        (1, 1, 1, 3, 160, 6, 160, 72, 5, 1), [154, 143], HopperTiles(128, 32, 2, 3, 3)
    ),
    "one-history": ((2, 1, 1, 2, 192, 4, 192, 96, 3, 1), None, HopperTiles(64, 0, 1, 4, 3)),
    "two-groups": ((1, 1, 1, 2, 128, 6, 128, 64, 5, 1), [100, 0], HopperTiles(128, 0, 2, 2, 2)),
    "one-group": ((2, 1, 1, 2, 64, 6, 64, 64, 5, 2), None, HopperTiles(64, 0, 1, 3, 1)),
    "several-programs": ((1, 1, 1, 2, 480, 3, 320, 72, 2, 1), [300], HopperTiles(64, 16, 1, 6, 3)),
}  # fmt: skip


@pytest.mark.parametrize("turns", [False, True], ids=["all-at-once", "in-turns"])
@pytest.mark.parametrize(("sizes", "counts", "tiles"), CASES.values(), ids=CASES)
def test_forward_is_right_however_late_everything_comes(
    kernels: ModuleType,
    sizes: tuple[int, ...],
    counts: list[int] | None,
    tiles: HopperTiles,
    turns: bool,
) -> None:
    q, k, v, lists = inputs(*sizes)
    valid = None if counts is None else torch.tensor(counts, dtype=torch.int32)
    tiles = tiles._replace(turns=turns)
    out, lse = kernels.run_forward(q, k, v, lists, valid, 0.1, split=1, tiles=tiles)
    wanted = reference.block_sparse_attention(q, k, v, lists, valid, 0.1)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    assert lse.isfinite().all()


BACKWARD = {
    "paper": ((2, 2, 2, 3, 160, 6, 160, 72, 4, 2), [154, 143, 143], HopperTiles(32, 0, 1, 8, 3)),
    "few-stages": ((2, 2, 1, 4, 192, 5, 192, 96, 4, 2), None, HopperTiles(32, 0, 1, 3, 3)),
    "two-groups": ((1, 1, 1, 5, 128, 6, 128, 64, 5, 1), [100, 1], HopperTiles(64, 0, 1, 3, 2)),
    "one-group": ((1, 1, 1, 2, 64, 6, 64, 40, 5, 1), None, HopperTiles(32, 0, 1, 4, 1)),
    "several-programs": ((1, 1, 1, 2, 320, 3, 320, 72, 2, 1), [300], HopperTiles(32, 0, 1, 4, 3)),
}


@pytest.mark.parametrize("turns", [False, True], ids=["all-at-once", "in-turns"])
@pytest.mark.parametrize(("sizes", "counts", "tiles"), BACKWARD.values(), ids=BACKWARD)
def test_gradients_are_right_however_late_everything_comes(
    kernels: ModuleType,
    backward: ModuleType,
    sizes: tuple[int, ...],
    counts: list[int] | None,
    tiles: HopperTiles,
    turns: bool,
) -> None:
    q, k, v, lists = inputs(*sizes)
    valid = None if counts is None else torch.tensor(counts, dtype=torch.int32)
    out, lse = kernels.run_forward(q, k, v, lists, valid, 0.1, split=1)
    grad = torch.randn_like(q)
    arguments = (q, k, v, lists, valid, 0.1, grad, lse, (out * grad).sum(-1))
    got = (
        backward.run_query_gradient(*arguments, tiles._replace(turns=turns)),
        *backward.run_key_gradient(*arguments, tiles),
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(
        reference.block_sparse_attention(*leaves, lists, valid, 0.1), leaves, grad
    )
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gates", [1, 72])
def test_the_local_branch_is_joined(kernels: ModuleType, gates: int) -> None:
    q, k, v, lists = inputs(1, 1, 1, 2, 80, 4, 80, 72, 3, 1)
    o_alm, gate = torch.randn_like(q), torch.rand_like(q[..., :gates]).contiguous()
    out, _ = kernels.run_forward(q, k, v, lists, None, 0.1, o_alm, gate, split=1)
    o_sgm = reference.block_sparse_attention(q, k, v, lists, None, 0.1)
    torch.testing.assert_close(out, o_alm + gate * o_sgm, atol=1e-5, rtol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("split", [2, 3])
def test_lists_in_parts_give_the_same(kernels: ModuleType, split: int) -> None:
    q, k, v, lists = inputs(1, 2, 2, 4, 64, 6, 64, 64, 4, 1)
    whole = kernels.run_forward(q, k, v, lists, None, 0.1, split=1)
    parts = kernels.run_forward(q, k, v, lists, None, 0.1, split=split)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_default_tiles_fit() -> None:
    shapes = [(160, 160, 72), (192, 192, 96), (128, 128, 128), (64, 64, 64), (480, 480, 72)]
    for PQ, PK, D in shapes:
        width = sum(columns(D))
        for choose, own in ((hopper_tiles, 64), (hopper_query_tiles, 128), (hopper_key_tiles, 128)):
            tiles = choose(PQ, PK, D)
            assert tiles is not None
            # Fewer stages than three would wait for themselves.
            assert tiles.stages >= 3
            rows = tiles.groups * own + 2 * tiles.stages * (tiles.keys + tiles.tail)
            assert rows * width * 2 <= 226 * 1024
            assert (PQ if choose is hopper_key_tiles else PK) % (tiles.keys + tiles.tail) == 0
    assert hopper_tiles(48, 48, 64) is None


def test_gluon_is_where_it_is_looked_for() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    from decmem.ops import sparse_kernels

    assert sparse_kernels.sparse_hopper_kernels is not None


@pytest.mark.gpu
@pytest.mark.parametrize(("slots", "D", "counts"), [(160, 72, [154, 143]), (128, 128, None)])
def test_turns_change_no_bit(slots: int, D: int, counts: list[int] | None) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU")
    from decmem.ops import sparse_hopper_kernels

    q, k, v, lists = (x.cuda() for x in inputs(2, 4, 4, 20, slots, 40, slots, D, 23, 2))
    q, k, v = (x.nan_to_num().bfloat16() for x in (q, k, v))
    valid = None if counts is None else torch.tensor(counts, dtype=torch.int32, device="cuda")
    tiles = hopper_tiles(slots, slots, D)
    assert tiles is not None
    plain, taken = (
        sparse_hopper_kernels.run_forward(
            q, k, v, lists, valid, 0.1, split=1, tiles=tiles._replace(turns=turns)
        )
        for turns in (False, True)
    )
    assert all(torch.equal(one, other) for one, other in zip(plain, taken, strict=True))


def test_lists_are_cut_where_that_leaves_less_of_the_gpu_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h100 = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    cuda, slots = torch.device("cuda"), 80 * 160
    # One row of the paper's chunk, and two: 4.4 rounds of programs, and 8.7.
    assert hopper_split_of(576, 3, slots, cuda) == 2
    assert hopper_split_of(1152, 3, slots, cuda) == 1
    assert hopper_split_of(66, 3, slots, cuda) == 2
    assert hopper_split_of(33, 3, slots, cuda) == 4
    # Three programs of one group run side by side.
    assert hopper_split_of(396, 1, slots, cuda) == 1
    # Parts of a short list are not worth their merging.
    assert hopper_split_of(576, 3, 160, cuda) == 1
    assert hopper_split_of(33, 3, slots, torch.device("cpu")) == 1


class Ran(Exception):
    """Says whose kernels were run."""


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, bool], ModuleType]:
    """`sparse_kernels` with kernels that only tell their family, on inputs with this obstacle, and
    with lists for which those in CUDA C++ have room or not."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    from decmem.ops import sparse_kernels

    def teller(family: str) -> Callable:
        def tell(*arguments: object, **more: object) -> None:
            raise Ran(family)

        return tell

    for name in ("forward", "hopper", "cuda"):
        module = getattr(sparse_kernels, f"sparse_{name}_kernels")
        monkeypatch.setattr(module, "run_forward", teller(name))
    for name in ("backward", "hopper_backward"):
        module = getattr(sparse_kernels, f"sparse_{name}_kernels")
        monkeypatch.setattr(module, "run_query_gradient", teller(name))
    monkeypatch.setattr(sparse_kernels.sparse_backward_kernels, "run_delta", lambda *x: x[0])

    def of(obstacle: str | None, room: bool) -> ModuleType:
        hopper, cuda = sparse_kernels.sparse_hopper_kernels, sparse_kernels.sparse_cuda_kernels
        monkeypatch.setattr(hopper, "obstacle", lambda q, k, valid: obstacle)
        monkeypatch.setattr(cuda, "suits", lambda q, k, valid, slots: room)
        return sparse_kernels

    return of


@pytest.mark.parametrize(
    ("kernels", "obstacle", "room", "forward", "backward"),
    [
        ("auto", None, True, "cuda", "hopper_backward"),
        ("auto", None, False, "hopper", "hopper_backward"),
        ("auto", "needs a Hopper GPU", True, "forward", "backward"),
        ("hopper", None, True, "cuda", "hopper_backward"),
        ("triton", None, True, "forward", "backward"),
    ],
)
def test_whose_kernels_run(
    families: Callable[[str | None, bool], ModuleType],
    kernels: str,
    obstacle: str | None,
    room: bool,
    forward: str,
    backward: str,
) -> None:
    kernel = families(obstacle, room)
    q, k, v, lists = inputs(1, 1, 1, 2, 160, 4, 160, 64, 3, 1)
    settled = (q, k, v, lists, None, 0.1, kernels)
    with pytest.raises(Ran, match=f"^{forward}$"):
        kernel._forward._init_fn(*settled)
    with pytest.raises(Ran, match=f"^{forward}$"):
        kernel._decoupled._init_fn(q, q, *settled)
    with pytest.raises(Ran, match=f"^{backward}$"):
        kernel._backward._init_fn(*settled, q, q[..., 0], q)
    # A history that worlds share has no gradients in the kernels for Hopper GPUs.
    if backward == "hopper_backward":
        with pytest.raises(Ran, match=r"^backward$"):
            kernel._backward._init_fn(q.repeat(2, 1, 1, 1, 1), *settled[1:], q, q[..., 0], q)


@pytest.mark.parametrize(
    ("kernels", "slots", "queries", "keys"),
    [
        ("auto", 160, "hopper_backward", "hopper_backward"),
        ("auto", 192, "hopper_backward", "backward"),
        ("auto", 64, "backward", "backward"),
        ("hopper", 64, "hopper_backward", "hopper_backward"),
    ],
)
def test_the_faster_kernels_go_back(
    families: Callable[[str | None, bool], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    kernels: str,
    slots: int,
    queries: str,
    keys: str,
) -> None:
    kernel = families(None, True)
    asked = []

    def noted(family: str, gradients: object, *arguments: object) -> object:
        asked.append(family)
        return gradients

    q, k, v, lists = inputs(1, 1, 1, 2, slots, 4, slots, 64, 3, 1)
    for name in ("backward", "hopper_backward"):
        module = getattr(kernel, f"sparse_{name}_kernels")
        monkeypatch.setattr(module, "run_query_gradient", partial(noted, name, q))
        monkeypatch.setattr(module, "run_key_gradient", partial(noted, name, (k, v)))
    kernel._backward._init_fn(q, k, v, lists, None, 0.1, kernels, q, q[..., 0], q)
    assert asked == [queries, keys]


def test_asked_by_name_they_say_what_they_cannot_take(
    families: Callable[[str | None, bool], ModuleType],
) -> None:
    kernel = families("takes bfloat16 and float16, not torch.float32", True)
    q, k, v, lists = inputs(1, 1, 1, 2, 64, 4, 64, 64, 3, 1)
    with pytest.raises(UserError, match=r"backend: 'hopper' takes bfloat16.*triton"):
        kernel._forward._init_fn(q, k, v, lists, None, 0.1, "hopper")


def test_unasked_the_operators_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    from decmem.ops import sparse_kernels

    asked = []

    def record(*arguments: object) -> Tensor:
        asked.append(arguments[-3])  # before the scales of keys and values
        return torch.zeros(())

    for name in ("block_sparse_attention", "decoupled_attention"):
        monkeypatch.setattr(sparse_kernels, name, record)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 1, n, 64, 64, device="cuda") for n in (2, 4, 4))
        lists = torch.empty(1, 1, 2, 3, dtype=torch.int32, device="cuda")
        for backend in ("auto", "triton", "hopper"):
            inspect.unwrap(block_sparse.block_sparse_attention)(q, k, v, lists, None, None, backend)
            inspect.unwrap(block_sparse.decoupled_attention)(
                q, q, q, k, v, lists, None, None, backend
            )
    assert asked == ["auto", "auto", "triton", "triton", "hopper", "hopper"]
