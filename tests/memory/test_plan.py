"""The tables of a pass against the definition, asked latent by latent."""

from itertools import product

import pytest
import torch
from torch import Tensor

from decmem.errors import UserError
from decmem.memory import Plan, Reach, bank_plan, training_plan

REACHES = {
    "pocket": Reach(window=3, write_chunk=1),
    "paper": Reach(window=5, window_includes_chunk=True, own_candidates=True),
    "dense": Reach(window=None),
    "no-window": Reach(window=0),
    "window-shorter-than-the-chunk": Reach(window=1, window_includes_chunk=True),
    "write-in-pairs": Reach(window=2, write_chunk=2, own_candidates=True),
}
every_reach = pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)


def in_window(reach: Reach, latent: int, chunk: int, other: int) -> bool:
    """Whether the local branch of a latent sees an earlier or own-chunk latent `other`."""
    start = latent // chunk * chunk
    if other >= start:
        return other < start + chunk
    if reach.window is None:
        return True
    # The window ends with the chunk, or in front of it.
    end = start + chunk if reach.window_includes_chunk else start
    return end - other <= reach.window


def is_candidate(reach: Reach, latent: int, chunk: int, other: int) -> bool:
    start = latent // chunk * chunk
    return other < start or (reach.own_candidates and other < start + chunk)


def tables(plan: Plan, pool: int) -> tuple[Tensor, Tensor]:
    """Local table over the whole pool, and candidates."""
    local = torch.zeros(len(plan.windows.table), pool, dtype=torch.bool)
    local[:, plan.window_first :] = plan.windows.table
    # Columns nobody may retrieve are left out at the end of the pool.
    candidates = torch.zeros(local.shape, dtype=torch.bool)
    candidates[:, : plan.candidates.shape[1]] = plan.candidates
    return local, candidates


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize(
    ("reach", "chunk"),
    [
        pytest.param(reach, chunk, id=f"{name}-{chunk}")
        for name, reach in REACHES.items()
        for chunk in (1, 2, 4)
        if chunk % (reach.write_chunk or chunk) == 0
    ],
)
def test_training_plan(reach: Reach, chunk: int, streams: int) -> None:
    latents = 8
    plan = training_plan(reach, latents, chunk, streams)
    total = latents * (1 + streams)
    local, candidates = torch.zeros(2, total, total, dtype=torch.bool)
    for i, j in product(range(total), range(total)):
        (query_stream, query), (key_stream, key) = divmod(i, latents), divmod(j, latents)
        size = (reach.write_chunk or chunk) if query_stream == 0 else chunk
        same_chunk = query // chunk == key // chunk
        if query_stream == 0:
            visible = key_stream == 0
        elif key_stream == 0:
            visible = not same_chunk
        else:
            visible = key_stream == query_stream and same_chunk
        local[i, j] = visible and in_window(reach, query, size, key)
        candidates[i, j] = visible and is_candidate(reach, query, size, key)
    got_local, got_candidates = tables(plan, total)
    assert torch.equal(got_local, local)
    assert torch.equal(got_candidates, candidates)
    assert (plan.predicted, plan.history) == (latents, 0)


@every_reach
@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize(("history", "latents"), [(0, 4), (8, 4), (8, 1), (4, 6), (0, 1)])
def test_bank_plan(reach: Reach, chunk: int, history: int, latents: int) -> None:
    plan = bank_plan(reach, history, latents, chunk)
    pool = history + latents
    local, candidates = torch.zeros(2, latents, pool, dtype=torch.bool)
    for i, j in product(range(latents), range(pool)):
        # Chunks count from the first latent of the pass; the last one may be short.
        start = i // chunk * chunk
        end = min(start + chunk, latents)
        own = start <= j - history < end
        reached = (end if reach.window_includes_chunk else start) + history - j
        before = j < history + start and (reach.window is None or reached <= reach.window)
        local[i, j] = own or before
        candidates[i, j] = j < history + start or (reach.own_candidates and own)
    got_local, got_candidates = tables(plan, pool)
    assert torch.equal(got_local, local)
    assert torch.equal(got_candidates, candidates)
    assert (plan.predicted, plan.history) == (0, history)


@every_reach
def test_windows_start_where_somebody_sees_something(reach: Reach) -> None:
    for plan in (training_plan(reach, 8, 2), bank_plan(reach, 20, 4, 2)):
        assert plan.windows.table[:, 0].any()


def test_bank_plan_is_the_last_chunk_of_a_training_plan() -> None:
    for reach in (REACHES["pocket"], REACHES["paper"], REACHES["dense"]):
        local, candidates = tables(training_plan(reach, 12, 4), 24)
        noisy = slice(20, 24)
        bank_local, bank_candidates = tables(bank_plan(reach, 8, 4, 4), 12)
        columns = [*range(8), *range(20, 24)]
        assert torch.equal(local[noisy][:, columns], bank_local)
        assert torch.equal(candidates[noisy][:, columns], bank_candidates)


def test_block_candidates_repeat_over_blocks() -> None:
    plan = bank_plan(Reach(), 2, 1, 1)
    blocks = plan.block_candidates(3, torch.device("cpu"))
    assert blocks.tolist() == [[True] * 6] * 3


@pytest.mark.parametrize(("latents", "chunk", "write"), [(6, 4, 0), (8, 2, 4), (8, 4, 3)])
def test_chunks_that_do_not_divide_are_refused(latents: int, chunk: int, write: int) -> None:
    with pytest.raises(UserError, match="chunk"):
        training_plan(Reach(write_chunk=write), latents, chunk)
