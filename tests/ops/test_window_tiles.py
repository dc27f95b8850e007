"""Tiles say exactly what the table says, waste little, and have one shape for all chunk sizes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from decmem.memory import Plan, Reach, bank_plan, joint_plan, training_plan
from decmem.ops.window_tiles import (
    placed_tiles,
    row_runs,
    tile_latents,
    tile_runs,
    window_tiles,
)

POCKET = Reach(window=8, write_chunk=1)
PAPER = Reach(window=8, window_includes_chunk=True, own_candidates=True)
PLANS = {
    "pocket-1": training_plan(POCKET, 20, 1, 2),
    "pocket-2": training_plan(POCKET, 20, 2, 2),
    "pocket-4": training_plan(POCKET, 20, 4, 2),
    "paper": training_plan(PAPER, 12, 4),
    "dense": training_plan(Reach(window=None, write_chunk=1), 8, 2, 2),
    "bank": bank_plan(POCKET, 11, 4, 4),
    "joint": joint_plan(POCKET, 7, 3, 1, 4),
}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
both_sides = pytest.mark.parametrize("side", ["queries", "keys"])


def sided(table: Tensor, side: str) -> Tensor:
    return table if side == "queries" else table.T.contiguous()


def parts(table: Tensor, S: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tiles, 2) rows, (tiles, runs, 4) runs, (tiles, latents, runs, 2) limits."""
    tiles, runs = window_tiles(table, S, size), tile_runs(row_runs(table))
    rest = tiles[:, 2 + 4 * runs :]
    assert rest.shape[1] == 2 * runs * tile_latents(size, S)
    walks = tiles[:, 2 : 2 + 4 * runs].unflatten(1, (runs, 4))
    return tiles[:, :2], walks, rest.unflatten(1, (-1, runs, 2))


def assert_says_what_the_table_says(table: Tensor, S: int, size: int) -> None:
    tokens = table.repeat_interleave(S, 0).repeat_interleave(S, 1)
    owners = torch.zeros(len(tokens), dtype=torch.int)
    for (first, last), runs, limits in zip(*parts(table, S, size), strict=True):
        assert 0 <= last - first <= size
        owners[first:last] += 1
        seen, everything = torch.zeros(2, last - first, tokens.shape[1], dtype=torch.bool)
        for r, (start, stop, inner, outer) in enumerate(runs.tolist()):
            everything[:, start:stop] = True
            for row in range(first, last):
                at, count = limits[row // S - first // S, r].tolist()
                assert not count or start <= at <= at + count <= stop
                assert not seen[row - first, at : at + count].any()
                seen[row - first, at : at + count] = True
            if first < last:
                assert seen[:, inner:outer].all()
        assert torch.equal(seen, tokens[first:last])
        # Nothing is walked that no row of the tile sees.
        assert torch.equal(seen.any(0), everything.any(0)) or first == last
    assert (owners == 1).all()


@every_plan
@both_sides
@pytest.mark.parametrize(("S", "size"), [(6, 16), (16, 16), (24, 16), (5, 64)])
def test_plans(plan: Plan, side: str, S: int, size: int) -> None:
    assert_says_what_the_table_says(sided(plan.windows.table, side), S, size)


@given(
    st.integers(1, 9).flatmap(
        lambda columns: st.lists(
            st.lists(st.booleans(), min_size=columns, max_size=columns), min_size=1, max_size=9
        )
    ),
    st.integers(1, 7),
    st.sampled_from([2, 4, 16]),
)
def test_any_table(rows: list[list[bool]], S: int, size: int) -> None:
    assert_says_what_the_table_says(torch.tensor(rows), S, size)


def test_a_small_table_by_hand() -> None:
    table = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 1], [0, 0, 1, 1]]).bool()
    (tile, rest), runs, limits = (x[:2] for x in parts(table, 2, 4))
    # The longest walk first: latents 0 and 1, then 2; all in tokens, of which a latent has 2.
    assert tile.tolist() == [0, 4]
    assert rest.tolist() == [4, 6]
    assert runs.tolist() == [[[0, 4, 0, 2], [6, 8, 6, 8]], [[4, 8, 4, 8], [0, 0, 0, 0]]]
    # Four rows may touch three latents; these tiles do not.
    assert limits[0].tolist() == [[[0, 2], [6, 2]], [[0, 4], [6, 2]], [[0, 0], [0, 0]]]
    assert limits[1].tolist() == [[[4, 4], [0, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]


@both_sides
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("latents", [24, 84])
def test_chunk_sizes_share_a_shape(side: str, size: int, latents: int) -> None:
    shapes = {
        window_tiles(
            sided(training_plan(POCKET, latents, chunk, 2).windows.table, side), 96, size
        ).shape
        for chunk in (1, 2, 4)
    }
    assert len(shapes) == 1


@both_sides
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_tiles_over_many_latents_waste_little(side: str, chunk: int) -> None:
    table, S, size, block = training_plan(POCKET, 84, chunk, 2).windows.table, 96, 128, 64
    _, runs, _ = parts(sided(table, side), S, size)
    walked = -(-(runs[..., 1] - runs[..., 0]) // block) * block
    share = int(table.sum()) * S * S / (int(walked.sum()) * size)
    # A tile of 128 for each latent of 96 would reach 0.75 at most.
    assert share > 0.8


def test_tables_repeat_and_are_built_once() -> None:
    cpu = torch.device("cpu")
    one, two = (bank_plan(POCKET, history, 4, 4).windows.table for history in (20, 21))
    first, second = (placed_tiles(t.numpy().tobytes(), (4, 12), 6, 16, cpu) for t in (one, two))
    assert first is second
    assert torch.equal(first, window_tiles(one, 6, 16))


def test_runs_have_room_in_powers_of_two() -> None:
    rows = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0]]).bool()
    assert row_runs(rows) == [((0, 1), (2, 3), (4, 5)), ((1, 2),)]
    assert tile_runs(row_runs(rows)) == 4
    assert tile_runs(row_runs(rows[1:])) == 2
    assert math.log2(tile_runs(row_runs(torch.eye(3).bool()))) == 1
