"""Window attention against dense attention under the same table."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from decmem.ops.block_sparse import Backend
from decmem.ops.window import Span, WindowTable, spans, window_attention

S = 6
VALID = torch.tensor([True, True, True, True, False, False])


def sliding(latents: int, chunk: int, before: int) -> Tensor:
    """Chunks that see themselves and `before` latents in front."""
    i, j = torch.arange(latents)[:, None], torch.arange(latents)
    start = i // chunk * chunk
    return (j >= start - before) & (j < start + chunk)


def teacher_forcing(latents: int, chunk: int) -> Tensor:
    """[clean | noisy]: windows with a hole in the middle."""
    clean = sliding(latents, chunk, chunk)
    own = sliding(latents, chunk, 0)
    return torch.cat((torch.cat((clean, clean & ~own), 0), torch.cat((~own & own, own), 0)), 1)


TABLES = {
    "one-window": torch.ones(3, 4, dtype=torch.bool),
    "sliding-chunks-of-1": sliding(6, 1, 2),
    "sliding-chunks-of-2": sliding(6, 2, 3),
    "short-last-chunk": sliding(7, 3, 2)[:, :7],
    "teacher-forcing": teacher_forcing(6, 2),
    "ragged": torch.tensor([[1, 0, 1, 0], [1, 0, 1, 0], [0, 1, 1, 1], [1, 0, 0, 1]]).bool(),
    "one-row-with-a-hole": torch.tensor([[1, 0, 1, 1]]).bool(),
}
every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
every_padding = pytest.mark.parametrize("valid", [None, VALID], ids=["exact", "padded"])


def inputs(table: Tensor, spare: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    Tq, Tk = table.shape
    return [
        torch.randn(2, 3, T, S, 8, generator=generator, requires_grad=True)
        for T in (Tq, Tk + spare, Tk + spare)
    ]


def dense(q: Tensor, k: Tensor, v: Tensor, table: Tensor, valid: Tensor | None) -> Tensor:
    """One masked attention over all tokens."""
    Tq, Tk = table.shape
    tokens = torch.ones(S, dtype=torch.bool, device=q.device) if valid is None else valid
    mask = torch.kron(table, tokens.expand(S, S))
    seen = (x[:, :, :Tk].flatten(2, 3) for x in (k, v))
    return F.scaled_dot_product_attention(q.flatten(2, 3), *seen, mask).view_as(q)


def assert_equals_dense(
    table: Tensor, valid: Tensor | None, backend: Backend, device: str = "cpu"
) -> None:
    """Output and gradients."""
    q, k, v = (x.detach().to(device).requires_grad_() for x in inputs(table))
    valid = None if valid is None else valid.to(device)
    out = window_attention(q, k, v, WindowTable(table), valid, backend)
    expected = dense(q, k, v, table.to(device), valid)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad(out, (q, k, v), grad),
        torch.autograd.grad(expected, (q, k, v), grad),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@every_table
@every_padding
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_equals_masked_dense_attention(
    table: Tensor, valid: Tensor | None, backend: Backend
) -> None:
    assert_equals_dense(table, valid, backend)


@every_table
@every_padding
@torch.no_grad()
def test_the_short_cut_of_the_cpu(table: Tensor, valid: Tensor | None) -> None:
    q, k, v = (x.movedim(1, 3).contiguous().movedim(3, 1) for x in inputs(table, spare=2))
    out = window_attention(q, k, v, WindowTable(table), valid)
    torch.testing.assert_close(out, dense(q, k, v, table, valid), atol=1e-5, rtol=1e-5)


@pytest.mark.interpreter
@every_padding
def test_equals_masked_dense_attention_in_triton(valid: Tensor | None) -> None:
    assert_equals_dense(sliding(3, 1, 1), valid, "triton")


@pytest.mark.gpu
@every_table
@every_padding
@pytest.mark.parametrize("backend", ["gather", "triton"])
def test_equals_masked_dense_attention_on_a_gpu(
    table: Tensor, valid: Tensor | None, backend: Backend
) -> None:
    assert_equals_dense(table, valid, backend, "cuda")


@every_padding
def test_window_of_everything_is_full_attention(valid: Tensor | None) -> None:
    q, k, v = inputs(torch.ones(4, 4))
    for before in (4, 9):
        table = sliding(4, 1, before) | sliding(4, 1, before).T
        out = window_attention(q, k, v, WindowTable(table), valid)
        keys, values = (x if valid is None else x[:, :, :, valid] for x in (k, v))
        full = F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, keys, values)))
        torch.testing.assert_close(out, full.view_as(q), atol=1e-5, rtol=1e-5)


@every_table
def test_spare_room_and_latents_outside_windows_are_never_read(table: Tensor) -> None:
    q, k, v = (x.detach() for x in inputs(table, spare=2))
    unseen = torch.cat((~table.any(0), torch.ones(2, dtype=torch.bool)))
    windows = WindowTable(table)
    clean = window_attention(q, k, v, windows)
    k[:, :, unseen], v[:, :, unseen] = float("nan"), float("nan")
    assert torch.equal(window_attention(q, k, v, windows), clean)


def test_spans_join_equal_rows() -> None:
    assert spans(TABLES["ragged"]) == (
        Span(0, 2, (0, 2)),
        Span(2, 3, (1, 2, 3)),
        Span(3, 4, (0, 3)),
    )
    assert [s.contiguous for s in spans(TABLES["ragged"])] == [False, True, False]


def test_lists_group_spans_of_one_length_and_fill_with_empty_slots() -> None:
    (_, count, lists), (single, one, rest) = WindowTable(
        torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 1, 1]]).bool()
    ).lists(torch.device("cpu"))
    assert count == 2
    assert lists.tolist() == [[0, -1], [0, 1]]
    assert (single.first, single.last, one, rest.tolist()) == (2, 4, 1, [[1, 2]])


def test_rows_list_the_keys_of_each_latent_in_lists_of_one_length() -> None:
    rows = WindowTable(TABLES["ragged"]).rows(torch.device("cpu"))
    keys = [[0, 2], [0, 2], [1, 2, 3], [0, 3]]
    assert rows.tolist() == [row + [-1] * (8 - len(row)) for row in keys]
    # Windows that differ a little share a shape, so that compiled code serves them all.
    shapes = {WindowTable(sliding(9, 1, n)).rows(torch.device("cpu")).shape for n in (4, 5, 6)}
    assert shapes == {(9, 8)}
    assert rows.dtype == torch.int32
