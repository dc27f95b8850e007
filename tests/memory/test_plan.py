"""The tables of a pass against the definition, asked latent by latent."""

from itertools import product

import pytest
import torch
from torch import Tensor

from decmem.errors import UserError
from decmem.memory import Plan, Reach, bank_plan, joint_plan, training_plan
from decmem.memory.plan import desk_plan, window_before

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


@every_reach
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize(("history", "clean", "write"), [(7, 0, 1), (5, 3, 2), (0, 2, 1)])
def test_a_joint_plan_is_its_passes(
    reach: Reach, branches: int, history: int, clean: int, write: int
) -> None:
    chunk, start = 2, history + clean
    plan = joint_plan(reach, history, clean, write, chunk, branches)
    assert (plan.history, plan.predicted) == (history, clean)
    assert plan.unsteered == (branches - 1) * chunk
    got = tables(plan, start + branches * chunk)
    if clean:
        writes = tables(bank_plan(reach, history, clean, write), start)
        for joint, alone in zip(got, writes, strict=True):
            assert torch.equal(joint[:clean, :start], alone)
            assert not joint[:clean, start:].any()
    for branch in range(branches):
        first = start + branch * chunk
        seen = [*range(start), first, first + 1]
        rows = slice(first - history, first - history + chunk)
        for joint, alone in zip(
            got, tables(bank_plan(reach, start, chunk, chunk), start + chunk), strict=True
        ):
            assert torch.equal(joint[rows][:, seen], alone)
            assert joint[rows].sum() == alone.sum()


@every_reach
@pytest.mark.parametrize("branches", [1, 2])
def test_a_plan_at_a_desk_is_the_plan_of_every_length(reach: Reach, branches: int) -> None:
    chunk, room, blocks = 2, 16, 3
    near = window_before(reach, chunk)
    if near is None:
        return
    q = torch.empty(1, 1, branches * chunk, 6, 4)
    length = torch.zeros(1, dtype=torch.long)
    desk = desk_plan(reach, chunk, branches, room, torch.zeros_like(length), length)
    for history in (near, near + 1, 9):
        length.fill_(history)
        desk.prepare(blocks, q)
        plan = joint_plan(reach, history, 0, 1, chunk, branches)
        expected = torch.zeros(branches * chunk * blocks, room * blocks, dtype=torch.bool)
        seen = plan.block_candidates(blocks, q.device)
        expected[:, : seen.shape[1]] = seen
        assert torch.equal(desk.block_candidates(blocks, q.device), expected)
        assert torch.equal(desk.windows.table, plan.windows.table)
        lists = torch.tensor([[0, history * blocks - 1, history * blocks, -1]])
        lists = lists.int().expand(1, 2, chunk * blocks, -1)
        assert torch.equal(desk.lists_for_all(lists, blocks), plan.lists_for_all(lists, blocks))


@every_reach
@pytest.mark.parametrize("writes", [0, 1, 2, 4])
def test_rows_at_a_desk_see_their_own_run(reach: Reach, writes: int) -> None:
    chunk, blocks, rooms = 3, 2, (12, 17)
    near = window_before(reach, min(writes, chunk) or chunk)
    if near is None:
        return
    first, length = torch.tensor([0, 12]), torch.tensor([near + 2, near + 5])
    desk = desk_plan(reach, chunk, 1, max(rooms), first, length, writes)
    assert (desk.rows, desk.history) == (2, 2 * near)
    assert desk.predicted == (2 * chunk if writes else 0)
    desk.prepare(blocks, torch.empty(1, 1, 2 * chunk, 4, 4))
    seen = desk.block_candidates(blocks, torch.device("cpu"))
    for row, history in enumerate(length.tolist()):
        plan = bank_plan(reach, history, chunk, writes or chunk)
        local, candidates = tables(plan, history + chunk)
        expected = candidates.repeat_interleave(blocks, 0).repeat_interleave(blocks, 1)
        assert torch.equal(seen[row, 0, :, : expected.shape[1]], expected)
        assert not seen[row, 0, :, expected.shape[1] :].any()
        # The window of all rows: what lies before each, then the chunks.
        rows = desk.windows.table[row * chunk : (row + 1) * chunk]
        before = slice(row * near, (row + 1) * near)
        own = slice(2 * near + row * chunk, 2 * near + (row + 1) * chunk)
        assert torch.equal(rows[:, before], local[:, history - near : history])
        assert torch.equal(rows[:, own], local[:, history:])
        assert rows.sum() == local.sum()
    pool = torch.arange(29.0 * blocks)[None, None, :, None]
    runs = desk.cursor.runs_of(pool, blocks) if desk.cursor else pool
    assert runs[0, 0, :, 0].tolist() == list(range(17 * blocks))
    assert runs[1, 0, :, 0].tolist() == list(range(12 * blocks, 29 * blocks))


def test_unsteered_latents_may_read_the_lists_of_the_steered_ones() -> None:
    plan = joint_plan(REACHES["paper"], 3, 1, 1, 1, branches=2)
    # Two blocks a latent; own blocks are 8 and 9, those of the unsteered latent 10 and 11.
    lists = torch.tensor([[0, 1, -1], [2, 6, 7], [4, 7, 8], [5, 9, -1]]).int()[None, None]
    got = plan.lists_for_all(lists, 2)
    assert torch.equal(got[:, :, :4], lists)
    assert got[0, 0, 4:].tolist() == [[4, 7, 10], [5, 11, -1]]
    assert got.dtype == torch.int32


def test_block_candidates_repeat_over_blocks() -> None:
    plan = bank_plan(Reach(), 2, 1, 1)
    blocks = plan.block_candidates(3, torch.device("cpu"))
    assert blocks.tolist() == [[True] * 6] * 3


@pytest.mark.parametrize(("latents", "chunk", "write"), [(6, 4, 0), (8, 2, 4), (8, 4, 3)])
def test_chunks_that_do_not_divide_are_refused(latents: int, chunk: int, write: int) -> None:
    with pytest.raises(UserError, match="chunk"):
        training_plan(Reach(write_chunk=write), latents, chunk)
