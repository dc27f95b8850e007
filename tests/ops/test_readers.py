"""Lists turned round."""

import pytest
import torch
from torch import Tensor

from decmem.ops import readers


def test_readers_are_the_lists_turned_round() -> None:
    lists = torch.tensor([[0, 2, 3], [2, -1, -1], [-1, -1, -1], [0, 3, -1]], dtype=torch.int32)
    which, offsets = readers.inverse_lists(lists[None, None], 5)
    assert offsets[0, 0].tolist() == [0, 2, 2, 4, 6, 6]
    assert which[0, 0, :6].tolist() == [0, 3, 0, 1, 0, 3]


def lists_of(B: int, G: int, Nq: int, K: int, Nk: int) -> Tensor:
    """Some key blocks for each query block, in any order, and empty slots behind them."""
    lists = torch.rand(B, G, Nq, Nk).argsort(-1)[..., :K].to(torch.int32)
    filled = torch.randint(0, K + 1, (B, G, Nq, 1))
    return torch.where(torch.arange(K) < filled, lists, -1)


SHAPES = [(2, 3, 24, 80, 333), (1, 2, 19, 300, 301), (1, 1, 1, 1, 1), (1, 2, 70, 7, 5)]


def assert_turned_round(got: tuple[Tensor, Tensor], lists: Tensor, Nk: int) -> None:
    expected, offsets = readers.inverse_lists(lists.cpu(), Nk)
    assert torch.equal(got[1].cpu(), offsets)
    for one, other, last in zip(
        got[0].cpu().flatten(0, 1), expected.flatten(0, 1), offsets[..., -1].flatten(), strict=True
    ):
        assert torch.equal(one[:last], other[:last])


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "G", "Nq", "K", "Nk"), [*SHAPES, (1, 24, 720, 80, 6000)])
def test_a_gpu_turns_them_round_alike(B: int, G: int, Nq: int, K: int, Nk: int) -> None:
    lists = lists_of(B, G, Nq, min(K, Nk), Nk)
    assert_turned_round(readers.inverse_lists(lists.cuda(), Nk), lists, Nk)
