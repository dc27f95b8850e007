"""Tokens in blocks: the paper's own numbers, round trips, coordinates, errors."""

import pytest
import torch

from decmem.errors import UserError
from decmem.memory import TokenLayout
from decmem.memory.packing import kept, spread

PAPER = TokenLayout((22, 40), (2, 3))
LAYOUTS = [
    PAPER,
    TokenLayout((8, 12), (2, 3)),
    TokenLayout((3, 5), (2, 3)),
    TokenLayout((4, 6), (1, 1)),
    TokenLayout((2, 3), (2, 3)),
]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.grid}-in-{x.blocks}")


def test_paper_layout() -> None:
    assert (PAPER.M, PAPER.P, PAPER.S, PAPER.tokens) == (6, 160, 960, 880)
    assert PAPER.valid is not None
    assert PAPER.valid.sum(1).tolist() == [154, 143, 143, 154, 143, 143]
    assert PAPER.counts is not None
    assert PAPER.counts.tolist() == [154, 143, 143, 154, 143, 143]


def test_equal_blocks_need_no_padding() -> None:
    layout = TokenLayout((8, 12), (2, 3))
    assert (layout.P, layout.S, layout.valid, layout.counts) == (16, 96, None, None)


def test_blocks_are_rectangles_in_reading_order() -> None:
    edges = [(0, 11), (11, 22)], [(0, 14), (14, 27), (27, 40)]
    assert PAPER.valid is not None
    for block, (rows, columns) in enumerate((r, c) for r in edges[0] for c in edges[1]):
        slots = PAPER.coordinates.view(6, 160, 2)[block][PAPER.valid[block]]
        expected = [[y, x] for y in range(*rows) for x in range(*columns)]
        assert slots.tolist() == expected


@every_layout
def test_every_token_has_one_valid_slot(layout: TokenLayout) -> None:
    slots = layout.slots if layout.valid is None else layout.slots[layout.valid.flatten()]
    assert sorted(slots.tolist()) == list(range(layout.tokens))
    assert layout.order[layout.raster].tolist() == list(range(layout.tokens))
    if layout.packing is None:
        assert torch.equal(layout.slots, layout.order)
        return
    there, back = layout.packing
    assert torch.equal(layout.slots[back], layout.order)
    assert torch.equal(layout.order[there], layout.slots)


@every_layout
def test_arrange_and_restore_are_inverse(layout: TokenLayout) -> None:
    x = torch.randn(2, 3, layout.tokens, 5)
    assert torch.equal(layout.restore(layout.arrange(x)), x)


@every_layout
def test_padding_repeats_a_token_of_its_own_block_and_is_dropped(layout: TokenLayout) -> None:
    if layout.valid is None:
        assert layout.tokens == layout.S
        return
    slots = layout.slots.view(layout.M, layout.P)
    for block, valid in zip(slots, layout.valid, strict=True):
        assert set(block[~valid].tolist()) <= set(block[valid].tolist())
    x, packing = torch.randn(layout.tokens, 2), layout.packing
    garbage = spread(x, packing, 0)
    assert torch.equal(garbage[layout.valid.flatten()], x)
    garbage[~layout.valid.flatten()] = float("nan")
    assert torch.equal(kept(garbage, packing, 0), x)


@every_layout
def test_coordinates_count_rows_then_columns(layout: TokenLayout) -> None:
    rows, columns = layout.coordinates.unbind(-1)
    assert torch.equal(rows * layout.grid[1] + columns, layout.slots)
    rows, columns = layout.token_coordinates.unbind(-1)
    assert torch.equal(rows * layout.grid[1] + columns, layout.order)


@pytest.mark.parametrize("blocks", [(3, 1), (1, 6), (0, 1)])
def test_blocks_that_do_not_fit_are_refused(blocks: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="blocks"):
        TokenLayout((2, 5), blocks)
