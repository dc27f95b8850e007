"""Kernels in CUDA C++: assembled without a GPU, and against the definition on a Hopper GPU."""

import re
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from decmem.ops import coding_inference, reference, window
from decmem.ops.block_sparse import block_sparse_attention
from decmem.ops.sparse_tiles import CudaTiles, cuda_key_tiles, cuda_query_tiles, cuda_tiles
from decmem.ops.window_blocks import token_rows

if find_spec("triton") is None or find_spec("cuda") is None:
    pytest.skip("needs triton and cuda-bindings", allow_module_level=True)

from decmem.ops import (
    cuda_module,
    selection_cuda_kernels,
    sparse_backward_kernels,
    sparse_cuda_backward_kernels,
    sparse_cuda_kernels,
    window_kernels,
)

SHAPES = {
    "paper": (160, 160, 72, True),
    "paper-full": (160, 160, 72, False),
    "wide": (192, 192, 96, False),
    "peer": (128, 128, 128, False),
    "one-group": (64, 64, 64, True),
    "small-head": (96, 320, 40, True),
    "large": (192, 192, 128, True),
    "several-programs": (480, 320, 72, True),
    "small-keys": (160, 48, 64, True),
}


@pytest.mark.parametrize("half", [False, True], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_assembled_products_stay_in_flight(shape: str, half: bool) -> None:
    PQ, PK, D, masked = SHAPES[shape]
    tiles = cuda_tiles(PQ, PK, D, masked)
    assert tiles is not None
    kinds: list[dict] = [{"gate": D, "gate_type": "float"}]
    if shape == "paper":
        kinds += [{"gate": 1}, {"partial": True}, {"exponents": True}]
    texts = [
        sparse_cuda_kernels.source(PQ, PK, D, tiles, masked=masked, half=half, **kind)
        for kind in kinds
    ]
    backward = sparse_cuda_backward_kernels
    of_queries, of_keys = cuda_query_tiles(PQ, PK, D, masked), cuda_key_tiles(PQ, PK, D)
    if of_queries is not None:
        texts.append(backward.query_source(PQ, PK, D, of_queries, masked, half=half))
    if of_keys is not None:
        texts.append(backward.key_source(PQ, PK, D, of_keys, half=half))
    for text in texts:
        remarks = cuda_module.compiled(text, "sm_90a").remarks
        # C75..: the assembler lets every matrix instruction wait for the one before.
        assert "C75" not in remarks
        # Not of what computes: the warp that has keys' gradients fed has few registers.
        spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", remarks)]
        assert len(spilled) == 1
        assert spilled[0] <= (16 if "key_gradient(" in text else 0)


def test_the_choice_and_its_readers_are_assembled() -> None:
    scores = [selection_cuda_kernels.score_source(D, rows) for D, rows in ((72, 24), (128, 48))]
    for text in (*map(cuda_module.texts, ("selection", "readers")), *scores):
        code, remarks = cuda_module.compiled(text, "sm_80")
        assert code
        assert re.findall(r"(\d+) bytes spill stores", remarks) == ["0"]


def test_a_wrong_source_is_told() -> None:
    with pytest.raises(cuda_module.CompileError, match="undefined"):
        cuda_module.compiled("__global__ void f() { unheard_of(); }", "sm_90a")


def test_what_does_not_suit() -> None:
    assert cuda_tiles(160, 40, 64, True) is None
    assert cuda_query_tiles(160, 40, 64, True) is None
    assert cuda_query_tiles(64, 64, 64, False) is None
    assert cuda_key_tiles(160, 64, 64) is None
    assert cuda_key_tiles(160, 320, 72) is None
    assert cuda_key_tiles(147, 160, 72) is None
    q, k = torch.empty(1, 1, 1, 160, 72), torch.empty(1, 1, 1, 160, 72)
    assert sparse_cuda_kernels.obstacle(q, k, None, 80) == "needs a Hopper GPU"
    backward = sparse_cuda_backward_kernels
    assert backward.suits_queries(q, k, None, 80)
    # A list that has no room beside the stages.
    assert not backward.suits_queries(q, k, None, 100_000)
    assert backward.suits_keys(q, k)
    assert not backward.suits_keys(q.repeat(2, 1, 1, 1, 1), k)


def inputs(
    B: int, H: int, G: int, Nq: int, Pq: int, Nk: int, Pk: int, D: int, K: int, worlds: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Lists of every length, none included; nobody reads the last block, which is NaN."""
    q = torch.randn(B, H, Nq, Pq, D)
    k, v = (torch.randn(worlds, H, Nk, Pk, D) for _ in "kv")
    lists = torch.full((B, G, Nq, K), -1, dtype=torch.int32)
    for n, row in enumerate(lists.view(-1, K)):
        length = K - n % (K + 1)
        row[:length] = torch.randperm(Nk - 1)[:length].sort().values
    k[:, :, -1], v[:, :, -1] = float("nan"), float("nan")
    q, k, v = (x.to("cuda", dtype) for x in (q, k, v))
    return q, k, v, lists.cuda()


def definition(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    return reference.block_sparse_attention(q, k.nan_to_num(), v.nan_to_num(), lists, valid, scale)


RUNS = {
    "paper": ((2, 2, 2, 5, 160, 9, 160, 72, 6, 1), [154, 143, 143]),
    "paper-own-worlds": ((2, 2, 1, 5, 160, 9, 160, 72, 6, 2), [154, 63, 80, 81, 1]),
    "paper-full": ((1, 2, 2, 7, 160, 9, 160, 72, 5, 1), None),
    "147": ((1, 2, 2, 3, 147, 9, 160, 72, 5, 1), [147, 1, 160]),
    "wide": ((2, 2, 2, 4, 192, 9, 192, 96, 5, 1), None),
    "peer": ((1, 3, 3, 4, 128, 9, 128, 128, 7, 1), [128, 100]),
    "one-group": ((2, 2, 2, 4, 64, 9, 64, 64, 5, 2), [60, 0]),
    "small-head": ((1, 2, 2, 4, 96, 7, 320, 40, 4, 1), [300, 320, 17]),
    "large": ((1, 1, 1, 3, 192, 6, 192, 128, 4, 1), [190, 100]),
    "several-programs": ((1, 1, 1, 3, 480, 5, 320, 72, 3, 1), [300]),
    "odd-spans": ((1, 2, 2, 3, 160, 9, 80, 72, 7, 1), [80, 64, 71]),
    "small-keys": ((1, 2, 2, 3, 160, 9, 48, 72, 7, 1), [48, 33, 1]),
    "sixteen": ((1, 2, 2, 3, 96, 40, 16, 64, 30, 1), None),
}


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("run", RUNS)
def test_against_the_definition(run: str, dtype: torch.dtype) -> None:
    shape, counts = RUNS[run]
    q, k, v, lists = inputs(*shape, dtype)
    valid = None if counts is None else torch.tensor(counts, dtype=torch.int32, device="cuda")
    exact = definition(q.float(), k.float(), v.float(), lists, valid)
    allowed = 2 * (definition(q, k, v, lists, valid).float() - exact).abs().max() + 1e-3
    alm = torch.randn_like(q)
    for split in (1, 3):
        for columns in (0, 1, shape[7]):
            gate = torch.rand(*q.shape[:4], columns, device="cuda").to(dtype) if columns else None
            local = alm if columns else None
            out, lse = sparse_cuda_kernels.run_forward(
                q, k, v, lists, valid, shape[7] ** -0.5, local, gate, split
            )
            joined = exact if gate is None else alm.float() + gate.float() * exact
            # Rounding what is joined adds at most half a unit of its last place.
            unit = joined.abs().max() * 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
            assert (out.float() - joined).abs().max() <= allowed + unit * bool(columns)
            assert lse.isfinite().all()


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(130, 131), slice(None)])
def test_scores_that_outgrow_the_first_steps(dtype: torch.dtype, rows: slice) -> None:
    q, k, v, _ = inputs(1, 1, 1, 2, 160, 9, 160, 72, 6, 1, dtype)
    lists = torch.arange(8, dtype=torch.int32, device="cuda").expand(1, 1, 2, 8).contiguous()
    # The rows' scores rise by 2^150 and more in the sixth block, far beyond fp32 from there on.
    k[:, :, 6] = 0.01 * k[:, :, 6].sign()
    q[:, :, :, rows] = 30.0
    k[:, :, 5, 7] = 30.0
    exact = definition(q.float(), k.float(), v.float(), lists, None)
    out, lse = sparse_cuda_kernels.run_forward(q, k, v, lists, None, 72**-0.5)
    assert out.isfinite().all()
    assert lse.max() > 1000
    same = definition(q, k, v, lists, None)
    allowed = 2 * (same.float() - exact).abs().max() + 1e-2
    assert (out.float() - exact).abs().max() <= allowed


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("run", ["paper", "147", "wide", "one-group", "small-keys"])
@pytest.mark.parametrize("rows", ["usual", "high", "low"])
def test_exponents_need_no_shift(run: str, dtype: torch.dtype, rows: str) -> None:
    shape, counts = RUNS[run]
    q, k, v, lists = inputs(*shape, dtype)
    q *= shape[7] ** -0.5 / coding_inference.EXPONENT_SCALE
    # A row whose weights leave the range of numbers if nothing is taken from their exponents.
    if rows != "usual":
        q[:, :, 1, 5] = 4.0
        k[:, :, :-1] = k[:, :, :-1].abs() * (1 if rows == "high" else -1)
    valid = None if counts is None else torch.tensor(counts, dtype=torch.int32, device="cuda")
    scale = coding_inference.EXPONENT_SCALE
    exact = definition(q.float(), k.float(), v.float(), lists, valid, scale)
    allowed = 2 * (definition(q, k, v, lists, valid, scale).float() - exact).abs().max() + 1e-3
    for split in (1, 3):
        out, lse = sparse_cuda_kernels.run_forward(q, k, v, lists, valid, scale, split=split)
        assert (out.float() - exact).abs().max() <= allowed
        assert lse.isfinite().all()
        if rows != "usual":
            assert (lse[:, :, 1, 5] * (1 if rows == "high" else -1)).max() > 130


def written_out(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, valid: Tensor | None) -> Tensor:
    """The same as products and a softmax, in the type of the inputs throughout."""
    B, H, Nq, Pq, D = q.shape
    Nk, Pk = k.shape[2:4]
    listed = torch.zeros(B, H, Nq, Nk + 1, dtype=torch.bool, device=q.device)
    listed.scatter_(3, torch.where(lists < 0, Nk, lists).long().expand(B, H, -1, -1), True)
    slots = torch.arange(Pk, device=q.device)
    tokens = torch.full((1,), Pk, device=q.device) if valid is None else valid
    there = slots < tokens[torch.arange(Nk, device=q.device) % len(tokens)][:, None]
    mask = (listed[..., :Nk, None] & there).flatten(3)[:, :, :, None]
    keys, values = (x.expand(B, -1, -1, -1, -1).flatten(2, 3)[:, :, None] for x in (k, v))
    some = mask.any(-1, keepdim=True)
    scores = (q @ keys.mT * D**-0.5).masked_fill(~(mask | ~some), float("-inf"))
    return torch.where(some, scores.softmax(-1) @ values, 0.0)


BACKWARD = {
    "paper": ((2, 2, 2, 5, 160, 9, 160, 72, 6, 2), [154, 143, 143]),
    "paper-full": ((1, 2, 1, 7, 160, 9, 160, 72, 5, 1), None),
    "one-history": ((2, 2, 2, 5, 160, 9, 160, 72, 6, 1), [154, 63, 80, 81, 1]),
    "147": ((1, 2, 2, 3, 147, 9, 160, 72, 5, 1), [147, 1, 160]),
    "many-readers": ((1, 2, 2, 70, 160, 5, 160, 72, 3, 1), [154, 143]),
    "wide": ((2, 2, 2, 4, 192, 9, 192, 96, 5, 2), None),
    "peer": ((1, 3, 3, 4, 128, 9, 128, 128, 7, 1), [128, 100]),
    "small-head": ((1, 2, 2, 4, 96, 7, 320, 40, 4, 1), [300, 320, 17]),
    "small-keys": ((1, 2, 2, 4, 96, 7, 80, 40, 4, 1), [80, 63, 0]),
    "large": ((1, 1, 1, 3, 192, 6, 192, 128, 4, 1), [190, 100]),
    "several-programs": ((1, 1, 1, 3, 480, 5, 320, 72, 3, 1), [300]),
}


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("run", BACKWARD)
def test_gradients_against_the_definition(run: str, dtype: torch.dtype) -> None:
    shape, counts = BACKWARD[run]
    q, k, v, lists = inputs(*shape, dtype)
    valid = None if counts is None else torch.tensor(counts, dtype=torch.int32, device="cuda")
    scale = shape[7] ** -0.5
    out, lse = sparse_cuda_kernels.run_forward(q, k, v, lists, valid, scale)
    grad = torch.randn_like(out)
    delta = sparse_backward_kernels.run_delta(out, grad)

    def gradients(kind: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.nan_to_num().to(kind).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(written_out(*leaves, lists, valid), leaves, grad.to(kind))

    backward, given = sparse_cuda_backward_kernels, (q, k, v, lists, valid, scale, grad, lse, delta)
    got: list[Tensor | None] = [backward.run_query_gradient(*given), None, None]
    if backward.suits_keys(q, k):
        got[1:] = backward.run_key_gradient(*given)
        # Nothing is added up in an order that changes.
        again = backward.run_key_gradient(*given)
        assert all(torch.equal(*pair) for pair in zip(got[1:], again, strict=True))
    else:
        assert run in ("one-history", "147", "small-head", "large", "several-programs")
    for one, exact, plain in zip(got, gradients(torch.float64), gradients(dtype), strict=True):
        unit = torch.finfo(dtype).eps * exact.abs().max()
        allowed = 2 * (plain - exact).abs().max() + unit
        assert one is None or (one - exact).abs().max() <= allowed


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_company_changes_no_bit() -> None:
    q, k, v, lists = inputs(2, 2, 2, 5, 160, 9, 160, 72, 6, 1, torch.bfloat16)
    both, _ = sparse_cuda_kernels.run_forward(q, k, v, lists, None, 0.1, split=1)
    for row in range(2):
        own = (x[row : row + 1] for x in (q, lists))
        alone, _ = sparse_cuda_kernels.run_forward(next(own), k, v, next(own), None, 0.1, split=1)
        assert torch.equal(alone[0], both[row])


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    "tiles",
    [
        CudaTiles(80, 16, 3, 4, True),
        CudaTiles(80, 80, 3, 4, True),
        CudaTiles(96, 32, 3, 2, False),
        CudaTiles(32, 16, 3, 7, True),
        CudaTiles(16, 16, 3, 3, False),
    ],
    ids=str,
)
def test_other_tiles(tiles: CudaTiles) -> None:
    q, k, v, lists = inputs(1, 2, 2, 5, 160, 9, 160, 72, 6, 1, torch.bfloat16)
    valid = torch.tensor([154, 143, 143], dtype=torch.int32, device="cuda")
    exact = definition(q.float(), k.float(), v.float(), lists, valid)
    out, _ = sparse_cuda_kernels.run_forward(q, k, v, lists, valid, 72**-0.5, tiles=tiles)
    assert (out.float() - exact).abs().max() < 0.02


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("D", [72, 128])
def test_rows_may_lie_anywhere(D: int) -> None:
    """Also a tile's last groups without rows, and groups that go over the list again."""
    q, k, v, lists = inputs(2, 3, 1, 5, 192, 9, 160, D, 6, 1, torch.bfloat16)
    # The last of its keys has a score that outgrows those of the first steps.
    k[0, :, lists[1, 0, 3].max(), -1] = q[1, :, 3, 0]
    q[1, :, 3, 0] *= 40
    side_by_side, _ = sparse_cuda_kernels.run_forward(q, k, v, lists, None, 0.1, split=1)
    lines = torch.randperm(5 * 192, device="cuda").int()
    for left in (192, 128, 100, 64, 1):
        table = lines.view(5, 192, 1).repeat(1, 1, 2)
        table[3, left:] = -1
        moved = torch.empty_like(q).flatten(2, 3)
        moved[:, :, lines.long()] = q.flatten(2, 3)
        for last in (0, 5 * 192):
            got = sparse_cuda_kernels.run_rows(moved, k, v, lists, None, 0.1, table, last)
            got = (got.transpose(1, 2) if last else got)[:, :, lines.long()].unflatten(2, (5, 192))
            there = table[..., 0] >= 0
            assert torch.equal(got[:, :, there], side_by_side[:, :, there])


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_branches_side_by_side_are_what_they_are_apart() -> None:
    """Also recorded, where the one launch after the other is an edge of its own kind."""
    B, H, T, M = 2, 3, 4, 6
    q, k, v, _ = inputs(B, H, 1, T * M, 160, 20 * M, 160, 72, 8, B, torch.bfloat16)
    k, v = k.nan_to_num(), v.nan_to_num()
    latents = [x.unflatten(2, (-1, M)).flatten(3, 4) for x in (q, k, v)]
    counts = torch.tensor([154, 143, 143, 154, 143, 143], dtype=torch.int32, device="cuda")
    kept = (torch.arange(960) % 160 < counts.cpu()[torch.arange(960) // 160]).nonzero().flatten()
    table = torch.ones(T, 20, dtype=torch.bool)
    table[:, 12:] = False
    tiles = window.Tiles.of_tokens(window.WindowTable(table), kept, 960, 192, M).on(q.device)
    far = torch.rand(B, H, T * M, 20 * M, device="cuda").topk(80).indices.sort(-1).values.int()

    def both() -> tuple[Tensor, Tensor]:
        found = window.tiled_near_and_far(*latents, tiles, far, counts)
        assert found is not None
        return found

    with torch.no_grad():
        o_near = window.tiled_attention(*latents, tiles, counts)[:, :, :, kept]
        o_far = block_sparse_attention(q, k, v, far, counts, backend="hopper").view_as(latents[0])
        both()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            recorded = [both() for _ in range(4)]
        graph.replay()
        for near, there in (*recorded, *(both() for _ in range(4))):
            assert torch.equal(near[:, :, :, kept], o_near)
            assert torch.equal(there, o_far)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("padded", [True, False])
def test_windows_that_learn(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way there by these kernels, the way back by those of windows."""
    monkeypatch.setattr(window_kernels, "forward", None)
    T, S = 6, 192
    tokens = torch.tensor([90, 96] if padded else [96, 96], dtype=torch.int32, device="cuda")
    slots = torch.arange(S, device="cuda")
    valid = slots % 96 < tokens[slots // 96]
    leaves = [torch.randn(2, 3, T, S, 72, device="cuda").bfloat16() for _ in "qkv"]
    leaves = [x.requires_grad_() for x in leaves]
    table = torch.ones(T, T, dtype=torch.bool).tril().triu(-2)
    windows = window.WindowTable(table)
    windows.prepare(leaves[0], tokens if padded else None)
    asked = (valid, "auto", tokens) if padded else ()
    out = window.window_attention(*leaves, windows, *asked)
    grad = torch.randn_like(out) * valid[:, None]
    got = [out, *torch.autograd.grad(out, leaves, grad)]
    mask = torch.kron(table.cuda(), valid.expand(S, S))

    def dense(kind: torch.dtype) -> list[Tensor]:
        same = [x.detach().to(kind).requires_grad_() for x in leaves]
        q, k, v = (x.flatten(2, 3) for x in same)
        o = F.scaled_dot_product_attention(q, k, v, mask).view_as(out)
        return [o, *torch.autograd.grad(o, same, grad.to(kind))]

    for ours, exact, plain in zip(got, dense(torch.float64), dense(torch.bfloat16), strict=True):
        # Padding asks for nothing.
        ours, exact, plain = (x[:, :, :, valid].detach() for x in (ours, exact, plain))
        unit = torch.finfo(torch.bfloat16).eps * exact.abs().max()
        allowed = 2 * (plain - exact).abs().max() + unit
        assert (ours - exact).abs().max() <= allowed


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_gradients_side_by_side_are_what_they_are_apart() -> None:
    q, k, v, lists = inputs(2, 24, 24, 24, 160, 48, 160, 72, 20, 2, torch.bfloat16)
    counts = torch.tensor([154, 143, 143], dtype=torch.int32, device="cuda")
    leaves = [x.nan_to_num().requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(*leaves, lists, counts, 72**-0.5, backend="hopper")
    given = (*(x.detach() for x in leaves), lists, counts, 72**-0.5)
    again, lse = sparse_cuda_kernels.run_forward(*given)
    grad = torch.randn_like(out)
    given += grad, lse, sparse_backward_kernels.run_delta(again, grad)
    apart = (
        sparse_cuda_backward_kernels.run_query_gradient(*given),
        *sparse_cuda_backward_kernels.run_key_gradient(*given),
    )
    for _ in range(3):
        got = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        assert all(torch.equal(*pair) for pair in zip(got, apart, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("padded", [True, False])
def test_attention_inside_latents(padded: bool) -> None:
    q, k, v = (torch.randn(2, 3, 4, 960, 72, device="cuda").bfloat16() for _ in "qkv")
    tokens = torch.tensor([154, 143, 143, 154, 143, 143], dtype=torch.int32, device="cuda")
    slots = torch.arange(960, device="cuda")
    valid = slots % 160 < tokens[slots // 160] if padded else slots >= 0
    counts = tokens if padded else None
    assert window.hopper_serves_inside(q, counts)
    with torch.no_grad():
        kept = valid.nonzero().flatten()
        rows = token_rows([1] * 4, kept.cpu(), 960, 192, side_by_side=True).cuda()
        out = window.attention_inside(q, k, v, counts, rows, len(kept))
    mask = valid[None]
    exact, same = (
        F.scaled_dot_product_attention(*(x.to(kind) for x in (q, k, v)), mask)
        for kind in (torch.float64, torch.bfloat16)
    )
    allowed = 2 * (same - exact).abs().max() + 1e-3
    assert (out.permute(0, 3, 1, 2, 4) - exact[:, :, :, kept]).abs().max() <= allowed
    # Gradients are not theirs.
    assert not window.hopper_serves_inside(q.requires_grad_(), counts)
