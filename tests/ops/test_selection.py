"""Retrieval against a sort that Python does: scores, ties, candidates, order."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import product
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from decmem.ops import selection
from decmem.ops.selection import (
    _choose,
    _clear_choice,
    _pool,
    _pool_into,
    _ranked_choice,
    _score,
    block_scores,
    pool_blocks,
    pool_blocks_into,
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


PLACES = [
    pytest.param("cpu", marks=pytest.mark.interpreter),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
everywhere = pytest.mark.parametrize("device", PLACES)


@pytest.fixture
def _exact() -> Iterator[None]:
    """No TF32 in the definition."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def assert_chosen(scores: Tensor, candidates: Tensor, count: int) -> None:
    """The kernels' lists are the definition's, bit for bit."""
    count = min(count, scores.shape[-1])
    expected = _ranked_choice(scores, candidates.expand_as(scores), count)
    # In CUDA C++ where that can run, then in Triton.
    for cuda in (selection.selection_cuda_kernels, None):
        with patch.object(selection, "selection_cuda_kernels", cuda):
            chosen = _choose(scores, candidates.expand_as(scores)[:, 0], count)
        assert chosen.dtype == expected.dtype
        assert torch.equal(chosen, expected)


@everywhere
@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_the_kernel_chooses_by_the_definition(scores: list[float], count: int, device: str) -> None:
    # All sets of candidates at once, each a query block of its own.
    allowed = torch.tensor(list(product([False, True], repeat=len(scores))), device=device)
    row = torch.tensor(scores, device=device).expand(1, 1, len(allowed), -1)
    assert_chosen(row, allowed[None, None], count)


@everywhere
@pytest.mark.parametrize("count", [1, 80, 5000], ids=lambda n: f"k{n}")
@pytest.mark.parametrize("blocks", [1, 64, 1236], ids=lambda n: f"N{n}")
def test_the_kernel_chooses_from_long_histories(blocks: int, count: int, device: str) -> None:
    generator = torch.Generator().manual_seed(blocks)
    scores = torch.randn(2, 2, 2, blocks, generator=generator).to(device) * 100
    some = (torch.rand(2, 1, 2, blocks, generator=generator) < 0.6).to(device)
    some[0, 0, 0] = False
    first = torch.arange(blocks, device=device) < blocks // 2  # a mask without memory of its own
    for candidates in (some, first.expand(2, -1)):
        for tied in (scores, scores.round(decimals=-2), scores.sign() * 0.0):
            assert_chosen(tied, candidates, count)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", [6200, 16384], ids=lambda n: f"N{n}")
def test_the_kernel_chooses_from_the_longest_histories(blocks: int) -> None:
    scores = torch.randn(2, 24, 24, blocks, device="cuda")
    reachable = (torch.arange(blocks, device="cuda") < blocks - 100).expand(24, -1)
    for tied in (scores, scores.round(decimals=1), scores.round()):
        assert_chosen(tied, reachable, 80)


@pytest.mark.gpu
def test_choosing_never_waits_for_the_device(
    waiting_forbidden: Callable[[], AbstractContextManager[None]],
) -> None:
    q, k = (torch.randn(2, 4, n, 72, device="cuda") for n in (24, 300))
    seen = (torch.arange(300, device="cuda") < 200).expand(24, -1)
    select_blocks(q, k, seen, 80, per_head=True)
    with waiting_forbidden():
        lists = select_blocks(q, k, seen, 80, per_head=True)
    assert lists.shape == (2, 4, 24, 80)


@everywhere
@pytest.mark.parametrize("D", [8, 72, 128])
@pytest.mark.parametrize("worlds", [1, 2])
@pytest.mark.parametrize("N", [290, 2050])
def test_scores_by_the_kernel_are_as_exact_as_fp32(
    device: str, D: int, worlds: int, N: int
) -> None:
    q = torch.randn(2, 3, 24, D, device=device)
    room = torch.randn(worlds, 3, N + 9, D, device=device)
    k = room[:, :, :N]  # a part of a bank
    exact = q.double() @ k.double().mT
    scores = _score(q, k)
    assert scores.dtype == torch.float32
    plain = (q.cpu() @ k.cpu().mT).double()
    allowed = 2 * (plain - exact.cpu()).abs().max()
    assert (scores.double() - exact).abs().max() <= allowed
    # The same keys give the same scores, wherever they lie: ties stay ties.
    k = k[:, :, :1].expand(-1, -1, N, -1)
    assert (_score(q, k).amax(-1) == _score(q, k).amin(-1)).all()
    assert torch.equal(_score(q, k), _score(q, k.expand(2, -1, -1, -1)))


@pytest.mark.usefixtures("_exact")
@everywhere
@pytest.mark.parametrize("per_head", [True, False], ids=["per-head", "together"])
def test_selection_by_the_kernel(
    device: str, per_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = (torch.randn(2, 3, n, 8).to(device) for n in (4, 50))
    seen = (torch.arange(50, device=device) < 40).expand(4, -1)
    expected = select_blocks(q.cpu(), k.cpu(), seen.cpu(), 7, per_head)
    monkeypatch.setattr(selection, "kernels_serve", lambda _: True)
    assert torch.equal(select_blocks(q, k, seen, 7, per_head).cpu(), expected)
    one = select_blocks(q, k[:1], seen, 7, per_head)
    assert torch.equal(one, select_blocks(q, k[:1].expand(2, -1, -1, -1), seen, 7, per_head))
    monkeypatch.setattr(selection, "_MOST", 49)
    assert torch.equal(select_blocks(q, k, seen, 7, per_head).cpu(), expected)


@everywhere
@pytest.mark.parametrize("D", [8, 72], ids=lambda n: f"D{n}")
@pytest.mark.parametrize("P", [1, 32, 35], ids=lambda n: f"P{n}")
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "full"])
def test_pooling_by_the_kernel(P: int, D: int, masked: bool, device: str) -> None:
    x = torch.randn(2, 3, 4, P, D).to(device, torch.float16)
    counts = torch.tensor([P, (P + 1) // 2], device=device)
    valid = torch.arange(P, device=device) < counts[:, None] if masked else None
    with torch.enable_grad():  # the plain form
        expected = pool_blocks(x.double() if device == "cpu" else x, valid)
    torch.testing.assert_close(_pool(x, valid), expected.float())
    turned = x.movedim(1, 3).contiguous().movedim(3, 1)
    assert torch.equal(_pool(turned, valid), _pool(x, valid))
    roomy = torch.full((*x.shape[:2], x.shape[2] + 2, *x.shape[3:]), float("nan")).to(x)
    roomy[:, :, 1:-1] = x
    assert torch.equal(_pool(roomy[:, :, 1:-1], valid), _pool(x, valid))
    means = torch.full((2, 3, 4, D), 7.0, device=device)
    blocks = torch.tensor([3, 0], device=device)
    _pool_into(x, blocks, means, valid)
    assert torch.equal(means[:, :, [0, 3]], _pool(x, valid)[:, :, [0, 3]])
    assert (means[:, :, 1:3] == 7).all()


def test_some_blocks_are_pooled_where_they_belong() -> None:
    x, valid = torch.randn(2, 3, 6, 5, 4), torch.rand(2, 5) < 0.7
    valid[:, 0] = True
    means = torch.full((2, 3, 6, 4), 7.0)
    pool_blocks_into(x, torch.tensor([5, 2]), means, valid)
    torch.testing.assert_close(means[:, :, [2, 5]], pool_blocks(x, valid)[:, :, [2, 5]])
    assert (means[:, :, [0, 1, 3, 4]] == 7).all()


@pytest.mark.interpreter
def test_the_operators_pass_opcheck() -> None:
    tests = ("test_schema", "test_faketensor")
    scores, candidates = torch.randn(2, 3, 4, 20), torch.rand(2, 4, 20) < 0.5
    torch.library.opcheck(torch.ops.decmem.choose_blocks, (scores, candidates, 5), test_utils=tests)
    x, valid = torch.randn(2, 3, 4, 6, 8), torch.rand(2, 6) < 0.5
    torch.library.opcheck(torch.ops.decmem.pool_blocks, (x, valid), test_utils=tests)
    listed = x, torch.tensor([2, 0]), torch.zeros(2, 3, 4, 8), valid
    torch.library.opcheck(torch.ops.decmem.pool_blocks_into, listed, test_utils=tests)


def test_the_kernels_are_for_a_gpu() -> None:
    assert not selection.kernels_serve(torch.zeros(1))
