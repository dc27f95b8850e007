"""Retrieval against a sort that Python does: scores, ties, candidates, order."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from decmem.ops.selection import (
    _clear_choice,
    _ranked_choice,
    block_scores,
    pool_blocks,
    ranking_keys,
    select_blocks,
)


def best(scores: list[float], candidates: list[bool], count: int) -> list[int]:
    """Indices of the best candidates, ties to the lowest index, ascending, then -1."""
    ranked = sorted((-s, i) for i, (s, c) in enumerate(zip(scores, candidates, strict=True)) if c)
    chosen = sorted(i for _, i in ranked[:count])
    return chosen + [-1] * (min(count, len(scores)) - len(chosen))


def features(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled queries and keys whose scores are these (Nq, Nk), exactly."""
    return torch.eye(len(scores))[None, None], scores.T[None, None]


SCORES = {
    "positive": [0.5, 3.0, 0.25, 2.0, 1.0],
    "negative": [-0.5, -3.0, -0.25, -2.0, -1.0],
    "mixed": [-1.0, 1e-30, 2.0, -1e-30, 1e30],
    "all-equal": [1.5, 1.5, 1.5, 1.5, 1.5],
    "zeros-of-both-signs": [-0.0, 0.0, -0.0, -1.0, 0.0],
    "neighbours": [1.0, 1.0 + 2**-23, 1.0 - 2**-24, -1.0, -1.0 - 2**-23],
    "infinite": [math.inf, -math.inf, 3.0, math.inf, -3.0],
}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_ranking_equals_a_sort(scores: list[float], count: int) -> None:
    for allowed in product([False, True], repeat=len(scores)):
        keys = ranking_keys(torch.tensor(scores), torch.tensor(allowed)).tolist()
        assert all((key >= 0) == a for key, a in zip(keys, allowed, strict=True))
        ranked = sorted(range(len(scores)), key=lambda i: -keys[i])[: min(count, sum(allowed))]
        expected = [i for i in best(scores, list(allowed), count) if i >= 0]
        assert sorted(ranked) == expected


@pytest.mark.parametrize("count", [1, 3, 4, 7, 20])
def test_selection_equals_a_sort(count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    # Few distinct values: many ties, and sums that are exact in any order.
    scores = torch.randint(-3, 4, (5, 12), generator=generator) / 2
    candidates = torch.rand(5, 12, generator=generator) < 0.5
    candidates[0] = False
    candidates[1] = torch.arange(12) < 2
    lists = select_blocks(*features(scores), candidates, count)
    expected = [
        best(s.tolist(), c.tolist(), count) for s, c in zip(scores, candidates, strict=True)
    ]
    assert lists[0, 0].tolist() == expected
    assert lists.dtype == torch.int32


@pytest.mark.parametrize("count", [1, 3, 4, 7, 20])
def test_a_clear_choice_is_the_ranked_one(count: int) -> None:
    generator = torch.Generator().manual_seed(2)
    clear = 0
    for case in range(80):
        scores = torch.randn(1, 1, 5, 12, generator=generator)
        if case % 4 == 1:
            scores = scores.round()
        if case % 4 == 2:
            scores[..., case % 12] = [math.inf, -math.inf, math.nan][case % 3]
        candidates = torch.rand(scores.shape, generator=generator) < (case + 1) / 80
        chosen = _clear_choice(scores, candidates, count)
        if chosen is not None:
            clear += 1
            assert torch.equal(chosen, _ranked_choice(scores, candidates, count))
    assert (clear > 0) == (count < 12)


def test_the_short_cut_is_taken_where_the_choice_is_clear() -> None:
    scores = torch.tensor([[[[3.0, 1.0, 2.0, 1.0]]]])
    everything = torch.ones_like(scores, dtype=torch.bool)
    assert _clear_choice(scores, everything, 2).tolist() == [[[[0, 2]]]]
    assert _clear_choice(scores, everything, 3) is None  # blocks 1 and 3 are even
    assert _clear_choice(scores, everything, 4) is None  # nothing is left to be above
    assert _clear_choice(scores, scores > 2, 2) is None  # too few candidates


def test_candidates_may_differ_between_worlds() -> None:
    q, k = torch.randn(2, 1, 1, 4), torch.randn(2, 1, 3, 4)
    candidates = torch.tensor([[True, False, False], [False, False, True]])[:, None, None]
    assert select_blocks(q, k, candidates, 2).flatten().tolist() == [0, -1, 2, -1]


def test_heads_vote_together_or_alone() -> None:
    # Head 0 likes block 0, head 1 likes block 2, both together block 1.
    q = torch.ones(1, 2, 1, 1)
    k = torch.tensor([[3.0, 2.0, 0.0], [0.0, 2.0, 3.0]]).view(1, 2, 3, 1)
    candidates = torch.ones(1, 3, dtype=torch.bool)
    assert select_blocks(q, k, candidates, 1).flatten().tolist() == [1]
    assert select_blocks(q, k, candidates, 1, per_head=True).flatten().tolist() == [0, 2]


def test_scores_are_dot_products() -> None:
    q, k = torch.randn(2, 3, 4, 8, dtype=torch.bfloat16), torch.randn(2, 3, 5, 8)
    each = q.float() @ k.mT
    torch.testing.assert_close(block_scores(q, k, per_head=True), each)
    torch.testing.assert_close(block_scores(q, k, per_head=False), each.sum(1, keepdim=True))


def test_selection_lets_no_gradient_through() -> None:
    q, k = (torch.randn(1, 1, 2, 4, requires_grad=True) for _ in "qk")
    assert not select_blocks(q, k, torch.ones(2, 2, dtype=torch.bool), 1).requires_grad


def test_pooling_is_the_mean_over_valid_tokens() -> None:
    x = torch.randn(1, 2, 4, 3, 5, dtype=torch.float16)
    torch.testing.assert_close(pool_blocks(x), x.float().mean(3))
    valid = torch.tensor([[True, True, True], [True, False, False]])
    pooled = pool_blocks(x, valid)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled[:, :, 0::2], x[:, :, 0::2].float().mean(3))
    torch.testing.assert_close(pooled[:, :, 1::2], x[:, :, 1::2, 0].float())
