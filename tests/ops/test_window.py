"""Window attention against dense attention under the same table."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from decmem.memory import Reach, bank_plan, joint_plan, training_plan
from decmem.ops import window, window_launches
from decmem.ops.block_sparse import Backend
from decmem.ops.window import Span, WindowTable, spans, window_attention
from decmem.ops.window_launches import Launch, Launches, choose_launches, head_pieces

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
    "an-unread-latent": torch.tensor([[1, 0, 1, 0], [1, 0, 1, 1], [0, 0, 1, 1]]).bool(),
}
every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
every_padding = pytest.mark.parametrize("valid", [None, VALID], ids=["exact", "padded"])

WRITES_SINGLY, WRITES_CHUNKS = Reach(window=2, write_chunk=1), Reach(window=2)
PAPER = Reach(window=4, window_includes_chunk=True)
PLANS = {
    **{f"training-{c}": training_plan(WRITES_SINGLY, 8, c) for c in (1, 2, 4)},
    **{f"training-{c}-two-streams": training_plan(WRITES_SINGLY, 4, c, 2) for c in (1, 2, 4)},
    **{f"training-{c}-chunks-written": training_plan(WRITES_CHUNKS, 8, c) for c in (2, 4)},
    "training-paper": training_plan(PAPER, 8, 4),
    "training-dense": training_plan(Reach(window=None, write_chunk=1), 4, 2, 2),
    "bank": bank_plan(WRITES_SINGLY, 5, 4, 2),
    "bank-paper": bank_plan(PAPER, 5, 4, 4),
    "bank-dense": bank_plan(Reach(window=None), 5, 3, 2),
    "joint": joint_plan(WRITES_SINGLY, 3, 2, 1, 4),
}
every_plan = pytest.mark.parametrize("plan", [p.windows for p in PLANS.values()], ids=PLANS)


def inputs(table: Tensor, spare: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    Tq, Tk = table.shape
    return [
        torch.randn(2, 3, T, S, 8, generator=generator, requires_grad=True)
        for T in (Tq, Tk + spare, Tk + spare)
    ]


def token_mask(table: Tensor, S: int, valid: Tensor | None) -> Tensor:
    """(Tq S, Tk S): the table token by token."""
    tokens = torch.ones(S, dtype=torch.bool, device=table.device) if valid is None else valid
    return torch.kron(table, tokens.expand(S, S))


def dense(q: Tensor, k: Tensor, v: Tensor, table: Tensor, valid: Tensor | None) -> Tensor:
    """One masked attention over all tokens."""
    mask = token_mask(table, q.shape[3], valid)
    seen = (x[:, :, : table.shape[1]].flatten(2, 3) for x in (k, v))
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


@every_table
@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_scores_may_have_another_scale(table: Tensor, backend: Backend, learning: bool) -> None:
    q, k, v = inputs(table)
    with torch.set_grad_enabled(learning):
        out = window_attention(q, k, v, WindowTable(table), None, backend, scale=0.2)
        expected = dense(q * 0.2 * q.shape[-1] ** 0.5, k, v, table, None)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


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


def test_keys_of_one_world_serve_many() -> None:
    table = TABLES["teacher-forcing"]
    q, k, v = inputs(table)
    shared = window_attention(q, k[:1], v[:1], WindowTable(table))
    repeated = window_attention(
        q, k[:1].repeat(2, 1, 1, 1, 1), v[:1].expand_as(v), WindowTable(table)
    )
    assert torch.equal(shared, repeated)


# From here on: the Triton kernels.


class Run(NamedTuple):
    device: str
    dtype: torch.dtype


def run(device: str, dtype: torch.dtype, mark: pytest.MarkDecorator):
    name = str(dtype).removeprefix("torch.")
    return pytest.param(Run(device, dtype), marks=mark, id=f"{device}-{name}")


FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
INTERPRETED = [run("cpu", dtype, pytest.mark.interpreter) for dtype in (FLOAT, HALF)]
ON_GPU = [run("cuda", dtype, pytest.mark.gpu) for dtype in (FLOAT, HALF, BRAIN)]
every_run = pytest.mark.parametrize("run", INTERPRETED + ON_GPU)
one_run = pytest.mark.parametrize("run", [INTERPRETED[0], ON_GPU[2]])


class Case(NamedTuple):
    """Random inputs for a table; `valid` marks slots that hold a token."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    windows: WindowTable
    valid: Tensor | None

    @classmethod
    def make(
        cls,
        windows: WindowTable,
        run: Run,
        S: int = S,
        D: int = 16,
        valid: Tensor | None = None,
        B: int = 1,
        H: int = 1,
    ) -> "Case":
        generator = torch.Generator().manual_seed(0)
        Tq, Tk = windows.table.shape
        q, k, v, grad = (
            torch.randn(B, H, T, S, D, generator=generator).to(run.device, run.dtype)
            for T in (Tq, Tk, Tk, Tq)
        )
        return cls(q, k, v, grad, windows, None if valid is None else valid.to(run.device))

    def results(self, attention: Callable[..., Tensor]) -> list[Tensor]:
        """Output and gradients."""
        q, k, v = (x.detach().clone().requires_grad_() for x in (self.q, self.k, self.v))
        out = attention(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), self.grad.to(out.dtype))]

    def kernels(self) -> list[Tensor]:
        return self.results(
            lambda q, k, v: window_attention(q, k, v, self.windows, self.valid, "triton")
        )

    def definition(self, dtype: torch.dtype) -> list[Tensor]:
        """A product, a softmax and a product, in this type throughout."""
        mask = token_mask(self.windows.table.to(self.q.device), self.q.shape[3], self.valid)

        def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, keys, values = (x.to(dtype).flatten(2, 3) for x in (q, k, v))
            scores = (q @ keys.mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
            return (scores.softmax(-1) @ values).view_as(self.q)

        return self.results(written_out)

    def assert_as_exact_as_pytorch(self) -> None:
        """At most twice the error of PyTorch in that type, plus the rounding of the result."""
        truth = self.definition(torch.float64)
        fused = self.results(
            lambda q, k, v: dense(q, k, v, self.windows.table.to(q.device), self.valid)
        )
        usual = (self.definition(self.q.dtype), fused)
        names = ("output", "dq", "dk", "dv")
        for name, got, true, *others in zip(names, self.kernels(), truth, *usual, strict=True):
            assert got.dtype == self.q.dtype
            error = (got - true).abs().max().item()
            rounding = torch.finfo(self.q.dtype).eps * true.abs().max().item()
            limit = 2 * max((other - true).abs().max().item() for other in others) + rounding
            assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e}"


@one_run
@every_table
@every_padding
def test_kernels_on_tables(table: Tensor, valid: Tensor | None, run: Run) -> None:
    Case.make(WindowTable(table), run, valid=valid).assert_as_exact_as_pytorch()


@one_run
def test_kernels_take_another_scale(run: Run) -> None:
    case = Case.make(WindowTable(TABLES["sliding-chunks-of-2"]), run, valid=VALID)

    def attend(factor: float, scale: float | None) -> list[Tensor]:
        return case.results(
            lambda q, k, v: window_attention(
                q * factor, k, v, case.windows, case.valid, "triton", scale=scale
            )
        )

    for got, wanted in zip(attend(1.0, 0.5), attend(2.0, None), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@one_run
@every_plan
def test_kernels_on_plans(plan: WindowTable, run: Run) -> None:
    Case.make(plan, run).assert_as_exact_as_pytorch()


@every_run
@pytest.mark.parametrize("D", [64, 72, 96, 20, 128])
@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
def test_kernels_at_head_dimensions(D: int, padded: bool, run: Run) -> None:
    windows = PLANS["training-1-two-streams"].windows
    Case.make(windows, run, D=D, valid=VALID if padded else None).assert_as_exact_as_pytorch()


@one_run
@pytest.mark.parametrize(
    ("launch", "S"),
    [
        (Launch(16, 16, 1, 1), 7),
        (Launch(16, 16, 1, 1), 16),
        (Launch(64, 32, 4, 2), 24),
        (Launch(64, 32, 4, 2), 32),
        (Launch(32, 128, 4, 2), 40),
        (Launch(128, 64, 8, 2), 70),
    ],
    ids=lambda x: f"S{x}" if isinstance(x, int) else f"{x.rows}x{x.columns}",
)
def test_kernels_at_sizes(
    S: int, launch: Launch, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        window, "choose_launches", lambda q: Launches(launch, launch._replace(rows=32), launch)
    )
    windows = training_plan(WRITES_SINGLY, 4, 2).windows
    for valid in (None, torch.arange(S) % 5 < 4):
        Case.make(windows, run, S=S, valid=valid).assert_as_exact_as_pytorch()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("D", [64, 72, 96, 128])
def test_launches_of_long_sequences(
    D: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window_launches, "_FEW_ROWS", 0)
    run = Run("cuda", dtype)
    for chunk in (1, 2, 4):
        plan = training_plan(Reach(window=8, write_chunk=1), 16, chunk, 2)
        Case.make(plan.windows, run, S=96, D=D, B=2, H=3).assert_as_exact_as_pytorch()
    paper = training_plan(Reach(window=8, window_includes_chunk=True), 8, 4)
    blocks = torch.arange(160) < torch.tensor([154, 143, 143, 154, 143, 143])[:, None]
    Case.make(paper.windows, run, S=960, D=D, valid=blocks.flatten()).assert_as_exact_as_pytorch()


@one_run
@every_padding
def test_kernels_never_read_what_nobody_sees(valid: Tensor | None, run: Run) -> None:
    windows = WindowTable(TABLES["an-unread-latent"])
    case = Case.make(windows, run, valid=valid, B=2, H=2)
    unread = ~windows.table.any(0)
    blank = torch.zeros(case.k.shape[2], S, dtype=torch.bool)
    blank[unread] = True
    if valid is not None:
        blank[:, ~valid] = True
    assert blank.any()
    blank = blank[..., None].to(run.device)
    clean, poisoned = (
        case._replace(k=case.k.masked_fill(blank, value), v=case.v.masked_fill(blank, value))
        for value in (0.0, float("nan"))
    )
    for expected, got in zip(clean.kernels(), poisoned.kernels(), strict=True):
        assert torch.equal(expected, got)
    for gradient in poisoned.kernels()[2:]:
        assert not gradient.masked_fill(~blank, 0.0).any()
    # Room behind the table's columns: neither read nor given a gradient.
    spare = torch.full_like(case.k[:, :, :2], float("nan"))
    roomy = case._replace(k=torch.cat((case.k, spare), 2), v=torch.cat((case.v, spare), 2))
    output, dq, dk, dv = roomy.kernels()
    for expected, got in zip(
        case.kernels(), (output, dq, dk[:, :, :-2], dv[:, :, :-2]), strict=True
    ):
        assert torch.equal(expected, got)
    assert not dk[:, :, -2:].any()
    assert not dv[:, :, -2:].any()


@one_run
def test_kernels_give_zeros_where_no_token_is_valid(run: Run) -> None:
    case = Case.make(PLANS["bank"].windows, run, valid=torch.zeros(S, dtype=torch.bool))
    for result in case.kernels():
        assert not result.any()


@one_run
def test_kernels_take_any_strides_and_shared_keys(run: Run) -> None:
    case = Case.make(PLANS["bank"].windows, run, B=2, H=2)
    expected = case.kernels()
    apart = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in case[:4]]
    assert not apart[0].is_contiguous()
    windows, valid = case.windows, case.valid
    strided = Case(*apart, windows, valid).results(
        lambda q, k, v: window_attention(
            q.transpose(1, 3).contiguous().transpose(1, 3), k, v, windows, valid, "triton"
        )
    )
    for got, want in zip(strided, expected, strict=True):
        assert torch.equal(got, want)
    # Heads and worlds side by side in an arena with spare room are not copied.
    arena = torch.full((2, 2, 20, S, 16), float("nan")).to(case.k)
    arena[:, :, : case.k.shape[2]] = case.k
    inside = arena[:, :, : case.k.shape[2]]
    assert torch.equal(
        window_attention(case.q, inside, case.v, windows, valid, "triton"), expected[0]
    )
    one = case._replace(k=case.k[:1], v=case.v[:1])
    many = case._replace(k=case.k[:1].repeat(2, 1, 1, 1, 1), v=case.v[:1].repeat(2, 1, 1, 1, 1))
    *same, dk, dv = one.kernels()
    *wanted, wide_dk, wide_dv = many.kernels()
    for got, want in zip(
        (*same, dk, dv), (*wanted, wide_dk.sum(0, True), wide_dv.sum(0, True)), strict=True
    ):
        assert torch.equal(got, want)


@one_run
def test_gradients_have_the_same_bits_every_time(run: Run) -> None:
    case = Case.make(PLANS["training-1-two-streams"].windows, run)
    for first, second in zip(case.kernels(), case.kernels(), strict=True):
        assert torch.equal(first, second)


@one_run
def test_tables_of_many_runs_are_left_to_the_block_sparse_kernel(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = torch.arange(19)[None] % 2 == torch.arange(2)[:, None]
    windows = WindowTable(table)
    assert not windows.few_runs
    monkeypatch.setattr(WindowTable, "tiles", None)
    Case.make(windows, run).assert_as_exact_as_pytorch()
    windows.prepare(torch.empty(1, 1, 2, S, 16, device=run.device))
    assert WindowTable(table[:, :15]).few_runs
    assert not WindowTable(table.T.contiguous()).few_runs


def test_heads_are_taken_in_pieces_that_waste_least() -> None:
    pieces = {D: head_pieces(D) for D in (8, 16, 20, 40, 64, 72, 80, 96, 112, 128, 192, 256)}
    assert pieces == {
        8: (16, 0), 16: (16, 0), 20: (32, 0), 40: (32, 16), 64: (64, 0), 72: (64, 16),
        80: (64, 16), 96: (64, 32), 112: (128, 0), 128: (128, 0), 192: (128, 64), 256: (256, 0),
    }  # fmt: skip


def test_launches_survive_packing() -> None:
    for dtype, D in ((FLOAT, 64), (BRAIN, 64), (BRAIN, 72), (HALF, 128), (HALF, 300)):
        launches = choose_launches(torch.empty(1, 1, 1, 1, D, dtype=dtype))
        assert Launches.unpack(launches.pack()) == launches


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
