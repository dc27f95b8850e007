"""Every backend of block-sparse attention against the definition: outputs and all gradients."""

import inspect
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from decmem.errors import UserError
from decmem.ops import block_sparse, gather
from decmem.ops.block_sparse import block_sparse_attention, decoupled_attention
from decmem.ops.reference import slots_of


class Run(NamedTuple):
    backend: str
    device: str
    dtype: torch.dtype


def run(backend: str, device: str, dtype: torch.dtype, *marks: pytest.MarkDecorator):
    name = str(dtype).removeprefix("torch.")
    return pytest.param(Run(backend, device, dtype), marks=marks, id=f"{backend}-{device}-{name}")


CPU = [
    run("reference", "cpu", torch.float32),
    run("gather", "cpu", torch.float32),
    run("gather", "cpu", torch.bfloat16),
    run("triton", "cpu", torch.float32, pytest.mark.interpreter),
    run("triton", "cpu", torch.float16, pytest.mark.interpreter),
]
GPU = [
    run(backend, "cuda", dtype, pytest.mark.gpu)
    for backend in ("gather", "triton")
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
]
every_backend = pytest.mark.parametrize("run", CPU + GPU)
# Properties that do not depend on precision.
exact_backend = pytest.mark.parametrize(
    "run", [p for p in CPU + GPU if p.values[0].dtype == torch.float32]
)


class Case(NamedTuple):
    """Sizes in the letters of the contract; `period` rows of token slots are partly padding.

    `counts`: said by counts. `shared`: all worlds read the keys of one.
    """

    B: int = 1
    H: int = 2
    G: int = 1
    Nq: int = 2
    Pq: int = 16
    Nk: int = 4
    Pk: int = 16
    D: int = 64
    K: int = 3
    period: int = 0
    counts: bool = False
    shared: bool = False

    @property
    def name(self) -> str:
        sharing = "shared" if self.G == 1 else "per-head"
        padding = f"-padded{self.period}" if self.period else ""
        counted = "-counted" * self.counts + "-one-history" * self.shared
        return f"q{self.Pq}-k{self.Pk}-d{self.D}-{sharing}{padding}{counted}"


CASES = [
    Case(Nq=3),
    Case(B=2, H=1, Pq=24, Pk=24, D=72, Nk=4, K=2, period=2),
    Case(H=1, Pq=96, Pk=96, D=96, Nk=3, K=2),
    Case(G=2, Pq=40, Pk=24, D=72, Nk=3, K=2),
    Case(G=2, Pq=48, Pk=16, Nk=6, K=5, period=3),
    Case(H=1, Pq=80, Pk=160, D=72, Nk=2, K=2, period=2),
    Case(B=2, H=1, Nq=1, Pq=10, Pk=4, D=20, Nk=9, K=7),
    Case(H=1, Nq=1, Pq=160, Pk=160, D=72, Nk=2, K=2, period=2, counts=True),
    Case(B=2, H=1, Pq=16, Pk=24, D=64, Nk=4, K=3, period=2, counts=True, shared=True),
    Case(B=2, H=2, G=2, Pq=72, Pk=64, D=40, Nk=4, K=2, shared=True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    lists: Tensor
    valid: Tensor | None
    grad: Tensor

    def to(self, run: Run) -> "Inputs":
        """Floats in the run's dtype, everything on its device."""
        return Inputs(
            *(
                x if x is None else x.to(run.device, run.dtype if x.is_floating_point() else None)
                for x in self
            )
        )


def random_lists(case: Case, generator: torch.Generator) -> Tensor:
    """Ascending lists of all lengths, the first one full, the last one empty where there are two.

    The last block is listed nowhere if that leaves enough.
    """
    choices = case.Nk - 1 if case.Nk > case.K else case.Nk
    lists = torch.full((case.B, case.G, case.Nq, case.K), -1, dtype=torch.int32)
    for n, (b, g, i) in enumerate(product(range(case.B), range(case.G), range(case.Nq))):
        order = torch.randperm(choices, generator=generator)
        length = case.K - n % (case.K + 1)
        if i == case.Nq - 1 and case.Nq > 1:
            length = 0
        lists[b, g, i, :length] = order[:length].sort().values
    return lists


def make(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = normal(case.B, case.H, case.Nq, case.Pq, case.D)
    worlds = 1 if case.shared else case.B
    k, v = (normal(worlds, case.H, case.Nk, case.Pk, case.D) for _ in "kv")
    valid = None
    if case.period:
        valid = (case.Pk - torch.arange(case.period) * 5 % case.Pk).int()
        valid = valid if case.counts else torch.arange(case.Pk) < valid[:, None]
    return Inputs(q, k, v, random_lists(case, generator), valid, normal(*q.shape))


def slot_mask(x: Inputs) -> Tensor:
    """(B, H, Nq, Nk, Pk): what each query block may read, written down slot by slot."""
    (B, H, Nq, _, _), (Nk, Pk), G = x.q.shape, x.k.shape[2:4], x.lists.shape[1]
    mask = torch.zeros(B, H, Nq, Nk, Pk, dtype=torch.bool)
    valid = slots_of(x.valid, Pk)
    for b, h, i in product(range(B), range(H), range(Nq)):
        for j in x.lists[b, h if G > 1 else 0, i].tolist():
            if j >= 0:
                mask[b, h, i, j] = True if valid is None else valid[j % len(valid)].cpu()
    return mask


def unread(x: Inputs) -> Tensor:
    """(B, H, Nk): blocks that no query block of that world and head reads."""
    return ~slot_mask(x).any(-1).any(2)


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention as matrix products and a softmax, in the dtype of the inputs throughout."""
    weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf")).softmax(-1)
    return weights @ v


def pytorchs(x: Inputs, attention: Callable[..., Tensor]) -> list[Tensor]:
    """Output and gradients of dense masked attention; rows that read nothing give zeros."""
    q, k, v = (t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v))
    mask = slot_mask(x).flatten(3).repeat_interleave(q.shape[3], dim=2).to(q.device)
    some = mask.any(-1, keepdim=True)
    keys, values = (t.expand(len(q), -1, -1, -1, -1).flatten(2, 3) for t in (k, v))
    dense = attention(q.flatten(2, 3), keys, values, mask | ~some)
    out = torch.where(some, dense, 0.0).view_as(q)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), x.grad)]


def ours(x: Inputs, backend: str) -> list[Tensor]:
    """Output and gradients of a backend."""
    q, k, v = (t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v))
    out = block_sparse_attention(q, k, v, x.lists, x.valid, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), x.grad)]


NAMES = ("output", "dq", "dk", "dv")


def assert_as_exact_as_pytorch(got: list[Tensor], x: Inputs) -> None:
    """At most twice the error of PyTorch in that dtype, plus the rounding of the result; of the
    output alone where no gradients are given."""
    exact = Inputs(*(t.double() if t is not None and t.is_floating_point() else t for t in x))
    truth = pytorchs(exact, written_out)
    usual = [pytorchs(x, attention) for attention in (written_out, F.scaled_dot_product_attention)]
    for name, result, true, *others in zip(NAMES, got, truth, *usual, strict=False):
        assert result.dtype == x.q.dtype
        error = (result - true).abs().max().item()
        rounding = torch.finfo(x.q.dtype).eps * true.abs().max().item()
        limit = 2 * max((other - true).abs().max().item() for other in others) + rounding
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e}"


@every_backend
@every_case
def test_output_and_gradients(case: Case, run: Run) -> None:
    x = make(case).to(run)
    assert_as_exact_as_pytorch(ours(x, run.backend), x)


LARGE = [
    Case(B=2, H=2, G=2, Nq=3, Pq=160, Pk=160, D=72, Nk=12, K=9, period=6, counts=True),
    Case(B=2, H=2, G=2, Nq=2, Pq=192, Pk=192, D=96, Nk=7, K=5, shared=True),
    Case(Nq=3, Pq=128, Pk=128, D=128, Nk=9, K=7, period=3, counts=True),
    Case(H=1, Nq=3, Pq=64, Pk=64, D=64, Nk=9, K=9),
    Case(H=1, Nq=2, Pq=480, Pk=480, D=72, Nk=4, K=3, period=1, counts=True),
]
LARGE_RUNS = [
    run(backend, "cuda", dtype, pytest.mark.gpu)
    for backend in ("hopper", "auto", "triton", "flex")
    for dtype in (torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize("run", LARGE_RUNS)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large_blocks(case: Case, run: Run) -> None:
    if run.backend == "hopper" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU")
    x = make(case).to(run)
    assert_as_exact_as_pytorch(ours(x, run.backend), x)


def side_by_side(x: Tensor) -> Tensor:
    """The same tensor, with the heads of a token side by side in memory."""
    return x.movedim(1, 3).contiguous().movedim(3, 1)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [Tensor.contiguous, side_by_side], ids=["apart", "side-by-side"])
@pytest.mark.parametrize("slab", [1, 1000, 10**9])
def test_the_short_cut_of_the_cpu(
    case: Case,
    dtype: torch.dtype,
    layout: Callable[[Tensor], Tensor],
    slab: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gather, "_SLAB", slab)
    x = make(case).to(Run("gather", "cpu", dtype))
    blank = unread(x)[..., None, None]
    if case.G == 1:  # heads that keep lists of their own are blanked by the plain way
        x = x._replace(k=x.k.masked_fill(blank, torch.nan), v=x.v.masked_fill(blank, torch.nan))
    q, k, v = (layout(t) for t in (x.q, x.k, x.v))
    with torch.no_grad():
        out = block_sparse_attention(q, k, v, x.lists, x.valid, backend="gather")
    clean = x._replace(k=x.k.masked_fill(blank, 0.0), v=x.v.masked_fill(blank, 0.0))
    assert_as_exact_as_pytorch([out], clean)


def test_the_short_cut_masks_nothing_where_every_list_is_full() -> None:
    x = make(Case(B=2, K=2))
    lists = x.lists.clamp(min=0) + torch.tensor([0, 2], dtype=torch.int32)
    expected = ours(x._replace(lists=lists), "gather")[0]
    with torch.no_grad():
        out = block_sparse_attention(x.q, x.k, x.v, lists, backend="gather")
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


@exact_backend
@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_unread_memory_never_leaks(case: Case, run: Run) -> None:
    x = make(case).to(run)
    # Nor may an empty list read the first block, which nobody else reads here.
    x.lists[:, :, :, 0] = torch.where(x.lists[:, :, :, 0] == 0, -1, x.lists[:, :, :, 0])
    x = x._replace(lists=x.lists.sort(dim=-1, descending=True).values)
    blank = unread(x)[..., None, None].to(run.device)
    assert blank.any()
    filled, poisoned = (
        x._replace(k=torch.where(blank, value, x.k), v=torch.where(blank, value, x.v))
        for value in (0.0, float("nan"))
    )
    for name, clean, got in zip(
        NAMES, ours(filled, run.backend), ours(poisoned, run.backend), strict=True
    ):
        assert torch.equal(clean, got), f"{name} differs"
        if name in ("dk", "dv"):
            assert not torch.where(blank, got, 0.0).any()


@exact_backend
@pytest.mark.parametrize("counts", [False, True], ids=["slots", "counts"])
def test_what_lies_in_padding_changes_nothing(run: Run, counts: bool) -> None:
    x = make(CASES[1]._replace(counts=counts)).to(run)
    valid = slots_of(x.valid, x.k.shape[3])
    assert valid is not None
    padding = ~valid.repeat(x.k.shape[2] // len(valid), 1)[:, :, None]
    other = x._replace(k=torch.where(padding, 7.0, x.k), v=torch.where(padding, -900.0, x.v))
    for before, after in zip(ours(x, run.backend), ours(other, run.backend), strict=True):
        assert torch.equal(before, after)


@exact_backend
def test_permuting_unread_blocks_changes_nothing(run: Run) -> None:
    x = make(Case(B=1, Nk=8, K=2)).to(run)
    idle = unread(x)[0].all(0).nonzero().flatten()
    assert len(idle) >= 2
    order = torch.arange(x.k.shape[2])
    order[idle] = idle.roll(1)
    moved = x._replace(k=x.k[:, :, order], v=x.v[:, :, order])
    output, dq, *_ = ours(x, run.backend)
    moved_output, moved_dq, *_ = ours(moved, run.backend)
    assert torch.equal(output, moved_output)
    assert torch.equal(dq, moved_dq)


@exact_backend
@pytest.mark.parametrize("heads", [1, 2], ids=["shared", "per-head"])
def test_reading_all_blocks_is_dense_attention(run: Run, heads: int) -> None:
    x = make(Case(G=heads, Pq=24, Pk=40, Nk=3)).to(run)
    q, k, v = x.q, x.k, x.v
    lists = torch.arange(3, dtype=torch.int32, device=run.device).expand(1, heads, 2, 3)
    out = block_sparse_attention(q, k, v, lists, backend=run.backend)
    dense = F.scaled_dot_product_attention(*(t.flatten(2, 3) for t in (q, k, v)))
    torch.testing.assert_close(out, dense.view_as(out), atol=1e-5, rtol=1e-5)
    few = block_sparse_attention(q, k, v, lists[..., :1], backend=run.backend)
    assert (few - out).abs().max() > 0.1


@exact_backend
def test_reading_one_block_is_attention_inside_it(run: Run) -> None:
    x = make(Case(Nq=4, Nk=4, K=1)).to(run)
    lists = torch.arange(4, dtype=torch.int32, device=run.device)[None, None, :, None]
    out = block_sparse_attention(x.q, x.k, x.v, lists, backend=run.backend)
    inside = F.scaled_dot_product_attention(x.q, x.k, x.v)
    torch.testing.assert_close(out, inside, atol=1e-5, rtol=1e-5)


@exact_backend
def test_empty_lists_read_zeros(run: Run) -> None:
    x = make(Case()).to(run)
    x.lists.fill_(-1)
    for result in ours(x, run.backend):
        assert not result.any()


@exact_backend
def test_lists_without_slots_read_zeros(run: Run) -> None:
    x = make(CASES[1]).to(run)
    none = x.lists[..., :0]
    assert not block_sparse_attention(x.q, x.k, x.v, none, x.valid, backend=run.backend).any()


@exact_backend
def test_blocks_without_a_token_read_zeros(run: Run) -> None:
    x = make(Case(K=1)).to(run)
    x.lists[:] = torch.tensor([[0], [1]])
    x = x._replace(valid=torch.tensor([[True] * 16, [False] * 16], device=run.device))
    output, dq, dk, dv = ours(x, run.backend)
    assert output[:, :, 0].all()
    for result in (output[:, :, 1], dq[:, :, 1], dk[:, :, 1:], dv[:, :, 1:]):
        assert not result.any()


@exact_backend
def test_scale(run: Run) -> None:
    x = make(Case()).to(run)
    usual = block_sparse_attention(x.q * 3, x.k, x.v, x.lists, backend=run.backend)
    scaled = block_sparse_attention(
        x.q, x.k, x.v, x.lists, scale=3 * x.q.shape[-1] ** -0.5, backend=run.backend
    )
    torch.testing.assert_close(scaled, usual, atol=1e-5, rtol=1e-5)


@exact_backend
def test_strided_inputs_and_one_list_for_all_worlds(run: Run) -> None:
    x = make(Case(B=2, H=2)).to(run)
    lists = x.lists[:1]
    swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k, x.v)]
    assert not swapped[0].is_contiguous()
    out = block_sparse_attention(*swapped, lists, backend=run.backend)
    whole = block_sparse_attention(x.q, x.k, x.v, lists.repeat(2, 1, 1, 1), backend=run.backend)
    assert torch.equal(out, whole)


@exact_backend
def test_a_part_of_a_larger_bank_is_read_in_place(run: Run) -> None:
    x = make(Case(B=2, H=2, Nk=5)).to(run)
    room = [torch.full((2, 2, 8, 16, 64), float("nan"), device=run.device) for _ in "kv"]
    for whole, part in zip(room, (x.k, x.v), strict=True):
        whole[:, :, 2:7] = part
    views = [whole[:, :, 2:7] for whole in room]
    out = block_sparse_attention(x.q, *views, x.lists, backend=run.backend)
    assert torch.equal(out, block_sparse_attention(x.q, x.k, x.v, x.lists, backend=run.backend))


@every_backend
@pytest.mark.parametrize("gates", [1, 72], ids=["gate-per-token", "gate-per-channel"])
def test_decoupled_attention(run: Run, gates: int) -> None:
    x = make(CASES[1]).to(run)
    o_alm = torch.randn_like(x.q)
    gate = torch.rand_like(x.q[..., :gates])
    with torch.no_grad():
        got = decoupled_attention(o_alm, gate, x.q, x.k, x.v, x.lists, x.valid, backend=run.backend)
    assert got.dtype == run.dtype
    exact = (t.double() for t in (o_alm, gate, x.q, x.k, x.v))
    o_alm, gate, q, k, v = exact
    o_sgm = pytorchs(Inputs(q, k, v, x.lists, x.valid, x.grad.double()), written_out)[0]
    truth = o_alm + gate * o_sgm
    own = x._replace(grad=x.q)
    error = (pytorchs(own, written_out)[0] - o_sgm).abs().max()
    rounding = torch.finfo(run.dtype).eps * truth.abs().max()
    assert (got - truth).abs().max() <= 2 * error + 2 * rounding


def test_decoupled_attention_has_the_gradients_of_its_parts() -> None:
    x = make(CASES[1])
    o_alm, gate = torch.randn_like(x.q), torch.rand_like(x.q)
    leaves = [t.requires_grad_() for t in (o_alm, gate, x.q, x.k, x.v)]
    out = decoupled_attention(*leaves, x.lists, x.valid, backend="gather")
    o_sgm = block_sparse_attention(*leaves[2:], x.lists, x.valid, backend="reference")
    wanted = torch.autograd.grad(o_alm + gate * o_sgm, leaves, x.grad)
    for got, want in zip(torch.autograd.grad(out, leaves, x.grad), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_gate_of_another_width_is_refused() -> None:
    x = make(CASES[1])
    with pytest.raises(UserError, match="gate: 5 values per token, expected 1 or 72"):
        decoupled_attention(x.q, x.q[..., :5], x.q, x.k, x.v, x.lists)


def test_unknown_backend_is_named() -> None:
    with pytest.raises(UserError, match="backend: 'cudnn' is unknown"):
        inspect.unwrap(block_sparse.choose_backend)("cudnn", torch.zeros(1))


def test_triton_where_it_cannot_run_names_the_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    x = make(Case())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend in ("triton", "hopper", "flex"):
        with pytest.raises(UserError, match=f"'{backend}' needs a GPU.*gather"):
            block_sparse_attention(x.q, x.k, x.v, x.lists, backend=backend)
    monkeypatch.setattr(block_sparse, "triton_available", lambda: False)
    with pytest.raises(UserError, match=r"not installed.*gather"):
        block_sparse_attention(x.q, x.k, x.v, x.lists, backend="triton")
