"""The backend of flash-attn-4: against the definition, with a stand-in where the library is not."""

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from decmem.errors import UserError
from decmem.ops import block_sparse, flash4, reference

from ..flash4_library import MODULES, install


def test_tiles_and_readers_are_those_of_the_lists() -> None:
    lists = torch.tensor([[[[0, 2], [1, 2], [3, -1]]]], dtype=torch.int32)
    tiles = flash4.in_tiles(lists, 2, 3)
    first, second, third = [0, 1, 2, 6, 7, 8], [3, 4, 5, 6, 7, 8], [9, 10, 11, -1, -1, -1]
    assert tiles[0, 0].tolist() == [first, first, second, second, third, third]
    count, which = flash4.readers(lists, 5)
    assert count[0, 0].tolist() == [1, 1, 2, 1, 0]
    assert [which[0, 0, j, :n].tolist() for j, n in enumerate(count[0, 0])] == [
        [0], [1], [0, 1], [2], []
    ]  # fmt: skip


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, MODULES)
    monkeypatch.setattr(flash4, "obstacle", lambda q, k, valid: None)


def inputs(P: int, G: int, worlds: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Two worlds of queries; lists of three blocks, of one, and of none."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(B, 2, N, P, 64, generator=draw) for B, N in ((2, 3), (worlds, 5), (worlds, 5))
    )
    lists = torch.tensor([[0, 2, 4], [3, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    lists = lists.expand(1, G, 3, 3).to(device)
    return [*(x.to(device, dtype) for x in (q, k, v)), lists]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("P", "G", "worlds"), [(128, 2, 2), (128, 1, 1), (192, 1, 2)])
def test_calls_follow_the_conventions(P: int, G: int, worlds: int) -> None:
    *x, lists = inputs(P, G, worlds, "cpu", torch.float32)
    x = [t.requires_grad_(P == flash4.GRADIENT_TILE) for t in x]
    out = flash4.block_sparse_attention(*x, lists, scale=0.2)
    true = reference.block_sparse_attention(*x, lists, None, 0.2)
    torch.testing.assert_close(out, true)
    if P == flash4.GRADIENT_TILE:
        grad = torch.randn_like(out)
        for got, wanted in zip(
            torch.autograd.grad(out, x, grad), torch.autograd.grad(true, x, grad), strict=True
        ):
            torch.testing.assert_close(got, wanted)


def test_what_does_not_suit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, lists = inputs(128, 1, 2, "cpu", torch.bfloat16)
    with pytest.raises(UserError, match="needs a GPU"):
        block_sparse.block_sparse_attention(q, k, v, lists, backend="flash4")
    monkeypatch.setattr(flash4.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="'flash4' needs the package flash-attn-4"):
        flash4.block_sparse_attention(q, k, v, lists)
    monkeypatch.setattr(flash4.importlib.util, "find_spec", lambda name: name)
    assert flash4.obstacle(q, k, None) == "needs a Hopper or Blackwell GPU"


# The library, and the one it compiles with, warn of themselves.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Argument aux_data:UserWarning")
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("G", "worlds"), [(2, 2), (1, 1)])
def test_the_library_itself(G: int, worlds: int, dtype: torch.dtype) -> None:
    if find_spec("flash_attn") is None:
        pytest.skip("flash-attn-4 is not installed")
    *x, lists = inputs(128, G, worlds, "cuda", dtype)
    x = [t.requires_grad_() for t in x]
    exact = [t.detach().float().requires_grad_() for t in x]
    same = [t.detach().clone().requires_grad_() for t in x]
    grad = torch.randn_like(x[0])
    results = []
    for leaves, run in (
        (x, lambda *a: block_sparse.block_sparse_attention(*a, backend="flash4")),
        (exact, reference.block_sparse_attention), (same, reference.block_sparse_attention),
    ):  # fmt: skip
        out = run(*leaves, lists)
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    for got, wanted, usual in zip(*results, strict=True):
        allowed = 2 * (usual.float() - wanted).abs().max() + 1e-3
        assert (got.float() - wanted).abs().max() <= allowed
