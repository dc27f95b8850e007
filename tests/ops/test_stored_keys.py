"""Keys and values stored in 8 bits: read as if they had been restored before."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from decmem.errors import UserError
from decmem.memory.quantised import quantise, restore
from decmem.ops.block_sparse import Backend, block_sparse_attention, decoupled_attention
from decmem.ops.reference import block_mask

RUNS = [
    pytest.param("reference", "cpu", torch.float32, id="reference"),
    pytest.param("gather", "cpu", torch.float32, id="gather"),
    pytest.param("gather", "cpu", torch.bfloat16, id="gather-bfloat16"),
    *(
        pytest.param("triton", "cpu", dtype, marks=pytest.mark.interpreter, id=f"triton-{dtype}")
        for dtype in (torch.float32, torch.float16)
    ),
    *(
        pytest.param(backend, "cuda", dtype, marks=pytest.mark.gpu, id=f"{backend}-cuda-{dtype}")
        for backend in ("auto", "triton", "gather")
        for dtype in (torch.bfloat16, torch.float16)
    ),
]
every_run = pytest.mark.parametrize(("backend", "device", "dtype"), RUNS)

# B, H, G, Nq, Pq, Nk, Pk, D, K, worlds of keys.
SHAPES = {
    "small": (2, 2, 1, 2, 16, 6, 16, 64, 3, 2),
    "head-dim-in-parts": (1, 2, 2, 2, 24, 5, 80, 72, 3, 1),
    "one-history": (2, 1, 1, 1, 40, 4, 64, 40, 2, 1),
    "ragged": (1, 1, 1, 2, 10, 5, 4, 20, 4, 1),
}
LARGE = {
    "paper": (2, 2, 2, 3, 160, 24, 160, 72, 17, 2),
    "wide": (2, 2, 1, 3, 192, 24, 192, 96, 17, 1),
}
COUNTS = (4, 3)  # of what a block holds, in quarters


class Stored(NamedTuple):
    """Queries, and keys and values in 8 bits with their scales, in a bank with room to spare."""

    q: Tensor
    k: Tensor
    v: Tensor
    lists: Tensor
    valid: Tensor
    k_scale: Tensor
    v_scale: Tensor


def stored(sizes: tuple[int, ...], device: str, dtype: torch.dtype) -> Stored:
    B, H, G, Nq, Pq, Nk, Pk, D, K, worlds = sizes
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, Nq, Pq, D, generator=draw)
    parts = []
    for _ in "kv":
        x = torch.randn(worlds, H, Nk + 2, Pk, D, generator=draw)
        x *= torch.rand(worlds, H, Nk + 2, Pk, 1, generator=draw) * 3 + 0.1
        parts.append([part[:, :, 1 : Nk + 1] for part in quantise(x)])
    lists = torch.full((B, G, Nq, K), -1, dtype=torch.int32)
    for n, row in enumerate(lists.view(-1, K)):
        length = K - n % 2
        row[:length] = torch.randperm(Nk, generator=draw)[:length].sort().values
    valid = torch.tensor([Pk * quarters // 4 for quarters in COUNTS], dtype=torch.int32)
    (k, k_scale), (v, v_scale) = parts
    moved = (x.to(device) for x in (k, v, lists, valid, k_scale, v_scale))
    return Stored(q.to(device, dtype), *moved)


def check(sizes: tuple[int, ...], backend: Backend, device: str, dtype: torch.dtype) -> None:
    """At most twice the error of the backend over keys and values restored before, and rounding."""
    x = stored(sizes, device, dtype)
    bare = (restore(x.k, x.k_scale, dtype), restore(x.v, x.v_scale, dtype), x.lists, x.valid, None)
    given = (x.k, x.v, x.lists, x.valid, None)
    scales = {"k_scale": x.k_scale, "v_scale": x.v_scale}
    gate = torch.rand_like(x.q)
    truth = block_sparse_attention(x.q.float(), *bare, "reference")
    usual = block_sparse_attention(x.q, *bare, backend)
    got = block_sparse_attention(x.q, *given, backend, **scales)
    joined = decoupled_attention(x.q, gate, x.q, *given, backend, **scales)
    usual_join = decoupled_attention(x.q, gate, x.q, *bare, backend)
    for ours, others, true in (
        (got, usual, truth), (joined, usual_join, x.q.float() + gate.float() * truth)
    ):  # fmt: skip
        assert ours.dtype == dtype
        limit = 2 * (others - true).abs().max() + torch.finfo(dtype).eps * true.abs().max()
        assert (ours - true).abs().max() <= limit


@every_run
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_equals_attention_over_restored_keys(
    sizes: tuple[int, ...], backend: Backend, device: str, dtype: torch.dtype
) -> None:
    check(sizes, backend, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", LARGE.values(), ids=LARGE)
def test_large_blocks(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    check(sizes, "auto", "cuda", dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_the_kernel_restores_to_the_same_bits(sizes: tuple[int, ...]) -> None:
    x = stored(sizes, "cpu", torch.float16)
    scales = {"k_scale": x.k_scale, "v_scale": x.v_scale}
    got = block_sparse_attention(x.q, x.k, x.v, x.lists, x.valid, None, "triton", **scales)
    keys, values = (
        restore(part, scale, torch.float16) for part, scale in ((x.k, x.k_scale), (x.v, x.v_scale))
    )
    assert torch.equal(
        got, block_sparse_attention(x.q, keys, values, x.lists, x.valid, None, "triton")
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_listed_blocks_are_restored_to_the_same_bits(sizes: tuple[int, ...]) -> None:
    from decmem.ops.sparse_restore_kernels import restore_listed

    x = stored(sizes, "cpu", torch.float16)
    listed = block_mask(x.lists, x.k.shape[2]).any(2)  # (B, G, Nk)
    if len(x.k) < len(listed):
        listed = listed.any(0, keepdim=True)
    listed = listed[..., None, None].expand(*x.k.shape[:3], 1, 1)
    restored = restore_listed(x.k, x.v, x.k_scale, x.v_scale, x.lists, torch.float16)
    for got, part, scale in zip(restored, (x.k, x.v), (x.k_scale, x.v_scale), strict=True):
        wanted = restore(part, scale, torch.float16)
        assert torch.equal(torch.where(listed, got, 0.0), torch.where(listed, wanted, 0.0))
        # Fresh memory is NaN in these tests: what nobody reads was not written.
        assert got[~listed.expand_as(got)].isnan().all()


@pytest.mark.parametrize(
    ("kernels", "rows", "serves", "way"),
    [
        ("auto", 2, True, "hopper"),
        ("auto", 1, True, "hopper"),
        ("auto", 2, False, "forward"),
        ("triton", 2, True, "forward"),
        ("hopper", 1, True, "hopper"),
    ],
)
def test_who_reads_what_is_stored(
    kernels: str, rows: int, serves: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from decmem.ops import sparse_kernels, sparse_restore_kernels

    ran = []

    def restored(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        ran.append("restored")
        return arguments[0].half(), arguments[1].half()

    def run(family: str) -> Callable[..., tuple[Tensor, Tensor]]:
        def ran_it(q: Tensor, k: Tensor, *rest: object, **scales: Tensor | None) -> tuple:
            read = torch.float16 if family == "hopper" else torch.float8_e4m3fn
            assert k.dtype == read
            assert len(scales) == (0 if family == "hopper" else 2)
            ran.append(family)
            return q, q

        return ran_it

    obstacle = None if serves else "needs a Hopper GPU"
    hopper = sparse_kernels.sparse_cuda_kernels
    monkeypatch.setattr(hopper, "obstacle", lambda q, k, valid, slots: obstacle)
    monkeypatch.setattr(hopper, "run_forward", run("hopper"))
    monkeypatch.setattr(sparse_kernels.sparse_forward_kernels, "run_forward", run("forward"))
    monkeypatch.setattr(sparse_restore_kernels, "restore_listed", restored)
    x = stored((rows, 1, 1, 2, 16, 8, 16, 16, 4, 1), "cpu", torch.float16)
    sparse_kernels._decoupled._init_fn(
        None, None, x.q, x.k, x.v, x.lists, x.valid, 0.1, kernels, x.k_scale, x.v_scale
    )
    assert ran == (["restored", "hopper"] if way == "hopper" else ["forward"])


def test_scales_that_lie_otherwise_than_their_blocks() -> None:
    pytest.importorskip("triton")
    from decmem.ops.sparse_restore_kernels import alike

    x = stored(SHAPES["small"], "cpu", torch.float16)
    found, scale = alike(x.k, x.k_scale)
    assert found.tensor is x.k
    assert scale is x.k_scale
    other, scale = alike(x.k, x.k_scale.contiguous())
    assert scale is not None
    assert (other.world, other.head) == (scale.stride(0) // 16, scale.stride(1) // 16)
    assert torch.equal(other.tensor.float(), x.k.float())


def test_what_has_no_gradients_says_so() -> None:
    x = stored(SHAPES["small"], "cpu", torch.float32)
    with pytest.raises(UserError, match=r"k_scale: .*both"):
        block_sparse_attention(x.q, x.k, x.v, x.lists, k_scale=x.k_scale)
    q = x.q.requires_grad_()
    with pytest.raises(UserError, match=r"k_scale: .*no gradients"):
        block_sparse_attention(q, x.k, x.v, x.lists, k_scale=x.k_scale, v_scale=x.v_scale)
    with torch.no_grad():
        block_sparse_attention(q, x.k, x.v, x.lists, k_scale=x.k_scale, v_scale=x.v_scale)
