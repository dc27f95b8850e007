"""The definition itself: a case worked by hand, its dtype, and the lists it reads."""

import math

import torch
from torch import Tensor

from decmem.ops.reference import block_mask, block_sparse_attention


def by_hand(lists: Tensor, valid: Tensor | None = None) -> Tensor:
    """Two query blocks of one token; three key blocks of two tokens; values count from 1."""
    q = torch.tensor([[1.0], [2.0]]).view(1, 1, 2, 1, 1)
    k = torch.tensor([0.0, math.log(3), 0.0, 0.0, math.log(2), 0.0]).view(1, 1, 3, 2, 1)
    v = torch.arange(1.0, 7.0).view(1, 1, 3, 2, 1)
    return block_sparse_attention(q, k, v, lists, valid=valid).flatten()


def test_hand_worked_case() -> None:
    lists = torch.tensor([[0, -1], [0, 2]], dtype=torch.int32).view(1, 1, 2, 2)
    out = by_hand(lists)
    # Query 1 reads values 1, 2 with weights 1 : 3. Query 2 doubles the logits and reads values
    # 1, 2, 5, 6 with weights 1 : 9 : 4 : 1.
    expected = torch.tensor([(1 + 3 * 2) / 4, (1 + 9 * 2 + 4 * 5 + 6) / 15])
    torch.testing.assert_close(out, expected)


def test_hand_worked_case_with_padding() -> None:
    lists = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32).view(1, 1, 2, 2)
    # Rows repeat over blocks: blocks 0 and 2 hold both tokens, block 1 only its first.
    out = by_hand(lists, torch.tensor([[True, True], [True, False]])[[0, 1, 0]])
    expected = torch.tensor([(1 + 3 * 2 + 3) / 5, (1 + 9 * 2 + 4 * 5 + 6) / 15])
    torch.testing.assert_close(out, expected)


def test_valid_repeats_over_blocks() -> None:
    q, k, v = (torch.randn(1, 1, n, 2, 4) for n in (1, 4, 4))
    lists = torch.tensor([[[[1, 2, 3]]]], dtype=torch.int32)
    valid = torch.tensor([[True, True], [True, False]])
    torch.testing.assert_close(
        block_sparse_attention(q, k, v, lists, valid=valid),
        block_sparse_attention(q, k, v, lists, valid=valid.repeat(2, 1)),
    )


def test_large_logits_stay_finite() -> None:
    q, k, v = (torch.full((1, 1, 1, 2, 4), 1e4) for _ in "qkv")
    out = block_sparse_attention(q, k, v, torch.zeros(1, 1, 1, 1, dtype=torch.int32))
    torch.testing.assert_close(out, v)


def test_result_has_the_dtype_of_the_queries() -> None:
    q, k, v = (torch.randn(1, 1, 1, 2, 4, dtype=torch.bfloat16) for _ in "qkv")
    out = block_sparse_attention(q, k, v, torch.zeros(1, 1, 1, 1, dtype=torch.int32))
    assert out.dtype == torch.bfloat16


def test_block_mask_marks_listed_blocks() -> None:
    lists = torch.tensor([[2, 0, -1], [-1, -1, -1]], dtype=torch.int32).view(1, 1, 2, 3)
    expected = torch.tensor([[True, False, True, False], [False] * 4])
    assert torch.equal(block_mask(lists, 4)[0, 0], expected)
