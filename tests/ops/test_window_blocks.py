"""Windows as block-sparse attention: the same result, and taken only where they suit tiles."""

import importlib.util
import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from decmem.ops import window
from decmem.ops.block_sparse import block_sparse_attention
from decmem.ops.reference import slots_of
from decmem.ops.window import WindowTable, window_attention
from decmem.ops.window_blocks import (
    WindowBlocks,
    block_size,
    span_lists,
    tile_lists,
    tile_rows,
    token_rows,
    window_blocks,
)


def inputs(B: int, H: int, Tq: int, Tk: int, S: int, D: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, T, S, D, generator=generator) for T in (Tq, Tk, Tk)]


def dense(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
    """Attention of all queries over all tokens that exist."""
    keys, values = (
        x.flatten(2, 3) if valid is None else x[:, :, :, valid].flatten(2, 3) for x in (k, v)
    )
    return F.scaled_dot_product_attention(q.flatten(2, 3), keys, values).view_as(q)


COUNTS = torch.tensor([16, 11, 13], dtype=torch.int32)


def blocks_of(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor | None, table: Tensor | None = None
) -> WindowBlocks | None:
    """The arguments of the operator; None where no tiles suit."""
    tokens = q.shape[3]
    rows, size = tile_rows(q.shape[2] * tokens), block_size(tokens, counts)
    if not (rows and size):
        return None
    table = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool) if table is None else table
    lists = tile_lists(table, tokens, rows, tokens // size)
    return None if lists is None else window_blocks(q, k, v, lists, counts)


@pytest.mark.parametrize(
    ("sizes", "counts", "tiles", "keys"),
    [
        # Tiles of queries cross blocks, and latents.
        ((2, 2, 4, 5, 48, 16), COUNTS, (1, 192), (15, 16)),
        ((1, 1, 8, 3, 48, 16), COUNTS, (2, 192), (9, 16)),
        ((1, 2, 8, 2, 64, 8), torch.tensor([64, 63], dtype=torch.int32)[:1], (4, 128), (2, 64)),
        ((1, 1, 1, 2, 320, 8), None, (5, 64), (4, 160)),
        ((1, 1, 3, 2, 128, 8), None, (2, 192), (2, 128)),
    ],
)
def test_one_list_for_all_gives_the_same(
    sizes: tuple[int, ...], counts: Tensor | None, tiles: tuple[int, ...], keys: tuple[int, ...]
) -> None:
    q, k, v = inputs(*sizes)
    blocks = blocks_of(q, k, v, counts)
    assert blocks is not None
    assert blocks.q.shape[2:4] == tiles
    assert blocks.k.shape[2:4] == blocks.v.shape[2:4] == keys
    out = block_sparse_attention(*blocks, backend="gather").view_as(q)
    valid = None if counts is None else slots_of(counts, keys[1])
    expected = dense(q, k, v, None if valid is None else valid.flatten())
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [48, 384])
def test_each_branch_reads_its_own(tokens: int) -> None:
    """Two chunks of four latents behind a past that both see, and one that sees less of it."""
    table = torch.zeros(12, 15, dtype=torch.bool)
    for first in (0, 4, 8):
        table[first : first + 4, 3 + first : 7 + first] = True
        table[first : first + 4, 1 if first == 8 else 0 : 3] = True
    q, k, v = inputs(1, 2, 12, 15, tokens, 16)
    counts = COUNTS * (tokens // 48)
    blocks = blocks_of(q, k, v, counts, table)
    assert blocks is not None
    out = block_sparse_attention(*blocks, backend="gather").view_as(q)
    valid = slots_of(counts, tokens // 3)
    assert valid is not None
    for first in (0, 4, 8):
        own, seen = slice(first, first + 4), table[first]
        expected = dense(q[:, :, own], k[:, :, seen], v[:, :, seen], valid.flatten())
        torch.testing.assert_close(out[:, :, own], expected, atol=1e-5, rtol=1e-5)


def test_a_bank_is_read_in_place() -> None:
    q, k, v = inputs(1, 2, 4, 9, 64, 8)
    blocks = blocks_of(q, k[:, :, :5], v[:, :, :5], None)
    assert blocks is not None
    assert blocks.k.data_ptr() == k.data_ptr()


@pytest.mark.parametrize("T", [1, 3])
def test_slots_that_no_tile_divides_are_left_alone(T: int) -> None:
    q, k, v = inputs(1, 1, T, 2, 48, 8)
    assert blocks_of(q, k, v, COUNTS) is None
    assert blocks_of(*inputs(1, 1, 4, 2, 48, 8), None) is None


@pytest.mark.parametrize("odd", range(1, 8))
def test_a_tile_whose_latents_see_different_ones_is_left_alone(odd: int) -> None:
    """Eight latents of 48 tokens are two tiles; a border of windows at 4 is one between them."""
    table = torch.ones(8, 3, dtype=torch.bool)
    table[odd:, 0] = False
    assert (tile_lists(table, 48, 192, 3) is None) == (odd != 4)
    table = torch.ones(8, 3, dtype=torch.bool)
    table[odd, 0] = False
    assert tile_lists(table, 48, 192, 3) is None


def test_rows_are_tokens_and_where_they_lie() -> None:
    """Three latents of five slots, the third and the last of them empty, in tiles of four."""
    kept = torch.tensor([0, 1, 3])
    across = token_rows([3], kept, 5, 4, side_by_side=False)
    assert across[..., 0].tolist() == [[0, 1, 3, 5], [6, 8, 10, 11], [13, -1, -1, -1]]
    assert torch.equal(across[..., 0], across[..., 1])
    inside = token_rows([1, 1, 1], kept, 5, 4, side_by_side=True)
    assert inside[..., 0].tolist() == [[0, 1, 3, -1], [5, 6, 8, -1], [10, 11, 13, -1]]
    assert inside[..., 1].tolist() == [[0, 1, 2, -1], [3, 4, 5, -1], [6, 7, 8, -1]]
    spans = token_rows([2, 1], kept, 5, 4, side_by_side=True)
    assert spans[..., 1].tolist() == [[0, 1, 2, 3], [4, 5, -1, -1], [6, 7, 8, -1]]


@pytest.mark.parametrize("rows", [2, 3, 4, 7])
def test_tiles_of_tokens_see_what_their_latents_see(rows: int) -> None:
    spans, tokens, blocks = [2, 1, 3], 3, 2
    table = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    lists = span_lists(table, spans, tokens, rows, blocks)[0, 0]
    lines = token_rows(spans, torch.arange(tokens), tokens, rows, side_by_side=False)[..., 0]
    assert len(lists) == len(lines)
    of_span = torch.arange(3).repeat_interleave(torch.tensor(spans) * tokens)
    for listed, held in zip(lists, lines, strict=True):
        (span,) = set(of_span[held[held >= 0]].tolist())
        seen = table[span].repeat_interleave(blocks).nonzero().flatten()
        assert listed[listed >= 0].tolist() == seen.tolist()
    assert sorted(lines[lines >= 0].tolist()) == list(range(18))


class Taken(Exception):
    """Says that the blocks were attended to."""


@pytest.fixture
def attempt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., WindowBlocks | None]:
    """What `window_attention` gives to the kernels for Hopper GPUs, on a GPU that there is not."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    from decmem.ops import sparse_kernels, window_kernels

    def take(*arguments: object, backend: str) -> None:
        *blocks, scale = arguments
        assert backend == "hopper"
        assert scale is None
        raise Taken(WindowBlocks(*blocks))

    def leave(*arguments: object) -> Tensor:
        return torch.zeros(())

    monkeypatch.setattr(window, "block_sparse_attention", take)
    monkeypatch.setattr(window_kernels, "window_attention", leave)
    monkeypatch.setattr(WindowTable, "tiles", lambda *arguments: [])

    def run(
        table: Tensor, padded: bool = False, counts: Tensor | None = None, backend: str = "auto",
        obstacle: str | None = None, learning: bool = False,
    ) -> WindowBlocks | None:  # fmt: skip
        monkeypatch.setattr(sparse_kernels, "hopper_obstacle", lambda *asked: obstacle)
        chosen = "triton" if backend == "auto" else backend
        monkeypatch.setattr(window, "choose_backend", lambda asked, q: chosen)
        valid = torch.ones(384, dtype=torch.bool) if padded else None
        q, k, v = (
            torch.zeros(2, 1, T, 384, 64, requires_grad=learning) for T in (len(table), 5, 5)
        )
        try:
            inspect.unwrap(window_attention)(q, k, v, WindowTable(table), valid, backend, counts)
        except Taken as taken:
            return taken.args[0]
        return None

    return run


def test_where_the_blocks_are_taken(attempt: Callable[..., WindowBlocks | None]) -> None:
    everything = torch.ones(2, 5, dtype=torch.bool)
    taken = attempt(everything)
    assert taken is not None
    assert taken.q.shape == (2, 1, 4, 192, 64)
    assert taken.lists.shape == (1, 1, 4, 10)
    # A bank's spare room is not read.
    fewer = attempt(everything[:, :3])
    assert fewer is not None
    assert fewer.lists.shape == (1, 1, 4, 6)
    counts = torch.tensor([192, 100], dtype=torch.int32)
    assert attempt(everything, True, counts) is not None
    assert attempt(everything, backend="hopper") is not None
    assert attempt(everything, True) is None
    assert attempt(everything, backend="triton") is None
    assert attempt(everything, obstacle="needs a Hopper GPU") is None
    assert attempt(everything, learning=True) is None
    with torch.no_grad():
        assert attempt(everything, learning=True) is not None
    # Tiles of these latents hold no part of another: windows may differ.
    everything[0, 4] = False
    differing = attempt(everything)
    assert differing is not None
    assert differing.lists[0, 0, :, -1].tolist() == [-1, -1, 9, 9]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_the_window_of_a_chunk_on_a_gpu(dtype: torch.dtype, rows: int) -> None:
    counts = torch.tensor([154, 143, 143, 154, 143, 143], dtype=torch.int32)
    valid = slots_of(counts, 160)
    assert valid is not None
    q, k, v = (x.to("cuda", dtype) for x in inputs(rows, 2, 4, 9, 960, 72))
    windows = WindowTable(torch.ones(4, 8, dtype=torch.bool))
    k[:, :, 8:], v[:, :, 8:] = float("nan"), float("nan")
    valid, counts = valid.flatten().cuda(), counts.cuda()
    seen = (k[:, :, :8], v[:, :, :8])
    truth = dense(*(x.double() for x in (q, *seen)), valid)
    limit = 2 * (dense(q, *seen, valid) - truth).abs().max() + 2 * torch.finfo(dtype).eps * (
        truth.abs().max()
    )
    for shared in (slice(None), slice(1)) if rows > 1 else (slice(None),):
        if shared.stop == 1:
            truth = dense(q.double(), *(x[:1].expand_as(x).double() for x in seen), valid)
        for backend in ("auto", "triton"):
            out = window_attention(q, k[shared], v[shared], windows, valid, backend, counts)
            assert (out - truth).abs().max() <= limit
