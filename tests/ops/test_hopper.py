"""Which kernels run, and how lists are cut. What they compute: `test_cuda`, and on a GPU
`test_block_sparse` with `backend="hopper"`."""

import inspect
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from decmem.errors import UserError
from decmem.ops import block_sparse
from decmem.ops.sparse_tiles import cuda_split_of

if find_spec("triton") is None or find_spec("cuda") is None:
    pytest.skip("needs triton and cuda-bindings", allow_module_level=True)

from decmem.ops import sparse_kernels


def inputs(slots: int, worlds: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(B, 1, N, slots, 64) for B, N in ((worlds, 2), (1, 4), (1, 4)))
    return q, k, v, torch.zeros(1, 1, 2, 3, dtype=torch.int32)


def test_lists_are_cut_where_that_leaves_less_of_the_gpu_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h100 = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h100)
    cuda, slots = torch.device("cuda"), 80 * 160
    # One row of the paper's chunk, and two: 4.4 rounds of programs, and 8.7.
    assert cuda_split_of(576, 3, slots, cuda) == 2
    assert cuda_split_of(1152, 3, slots, cuda) == 1
    assert cuda_split_of(66, 3, slots, cuda) == 2
    assert cuda_split_of(33, 3, slots, cuda) == 4
    # Two programs of one group run side by side.
    assert cuda_split_of(264, 1, slots, cuda) == 1
    # Parts of a short list are not worth their merging.
    assert cuda_split_of(576, 3, 160, cuda) == 1
    assert cuda_split_of(33, 3, slots, torch.device("cpu")) == 1


FAMILIES = {"triton": "", "hopper": "cuda_"}


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], list[str]]:
    """With kernels that only tell their family and what they do, on inputs with this obstacle."""
    told: list[str] = []

    def tell(
        what: str, n: int, q: Tensor, k: Tensor, v: Tensor, *rest: object, **scales: object
    ) -> object:
        told.append(what)
        return ((q, q), q, (k, v))[n]

    for family, name in FAMILIES.items():
        forward = getattr(sparse_kernels, f"sparse_{name or 'forward_'}kernels")
        backward = getattr(sparse_kernels, f"sparse_{name}backward_kernels")
        works = [
            (forward, "run_forward"),
            (backward, "run_query_gradient"),
            (backward, "run_key_gradient"),
        ]
        for n, (module, work) in enumerate(works):
            monkeypatch.setattr(module, work, partial(tell, family, n))
    monkeypatch.setattr(sparse_kernels.sparse_backward_kernels, "run_delta", lambda *x: x[0])

    def of(obstacle: str | None) -> list[str]:
        cuda = sparse_kernels.sparse_cuda_kernels
        monkeypatch.setattr(cuda, "obstacle", lambda q, k, valid, slots: obstacle)
        return told

    return of


@pytest.mark.parametrize(
    ("kernels", "obstacle", "slots", "worlds", "forward", "queries", "keys"),
    [
        ("auto", None, 160, 1, "hopper", "hopper", "hopper"),
        ("auto", None, 192, 1, "hopper", "hopper", "hopper"),
        ("auto", "needs a Hopper GPU", 160, 1, "triton", "triton", "triton"),
        ("hopper", None, 160, 1, "hopper", "hopper", "hopper"),
        ("triton", None, 160, 1, "triton", "triton", "triton"),
        # One warp group alone is slower than Triton on the way back.
        ("auto", None, 64, 1, "hopper", "triton", "triton"),
        # More keys than three groups hold.
        ("auto", None, 480, 1, "hopper", "hopper", "triton"),
        # Gradients of keys that worlds share.
        ("auto", None, 160, 2, "hopper", "hopper", "triton"),
    ],
)
def test_whose_kernels_run(
    families: Callable[[str | None], list[str]],
    kernels: str,
    obstacle: str | None,
    slots: int,
    worlds: int,
    forward: str,
    queries: str,
    keys: str,
) -> None:
    told = families(obstacle)
    q, k, v, lists = inputs(slots, worlds)
    settled = (q, k, v, lists, None, 0.1, kernels)
    sparse_kernels._forward._init_fn(*settled)
    sparse_kernels._decoupled._init_fn(q, q, *settled)
    sparse_kernels._backward._init_fn(*settled, q, q[..., 0], q)
    assert told == [forward, forward, queries, keys]


def test_asked_by_name_they_say_what_they_cannot_take(
    families: Callable[[str | None], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = families("takes bfloat16 and float16, not torch.float32")
    settled = (*inputs(64), None, 0.1, "hopper")
    with pytest.raises(UserError, match=r"backend: 'hopper' takes bfloat16.*triton"):
        sparse_kernels._forward._init_fn(*settled)
    monkeypatch.setattr(sparse_kernels, "sparse_cuda_kernels", None)
    with pytest.raises(UserError, match=r"backend: 'hopper' needs the package cuda-bindings"):
        sparse_kernels._forward._init_fn(*settled)
    assert told == []


def test_unasked_the_operators_decide(monkeypatch: pytest.MonkeyPatch) -> None:
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
