"""The norms: the short cut of the CPU and the kernel beside their plain forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from decmem.ops import norm
from decmem.ops.fp8 import fp8_rows
from decmem.ops.norm import (
    add_norm,
    add_norm_both,
    add_norm_rows,
    rms_norm,
    scaled_norm,
    scaled_norm_rows,
)

DTYPES = [torch.float32, torch.bfloat16]
PLACES = [
    pytest.param("cpu", torch.float32, marks=pytest.mark.interpreter),
    pytest.param("cpu", torch.float16, marks=pytest.mark.interpreter),
    pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
]
everywhere = pytest.mark.parametrize(("device", "dtype"), PLACES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gain", [(4, 1, 1), (4, 1, 6)], ids=["per-head", "per-channel"])
def test_rms_norm(dtype: torch.dtype, gain: tuple[int, ...]) -> None:
    x, by = torch.randn(2, 4, 5, 6).to(dtype) * 3, torch.rand(gain)
    x[0, 0, 0] = 0
    plain, before = rms_norm(x, by), x.clone()
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain, F.rms_norm(x.float(), (6,), eps=1e-6) * by)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, by), plain)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adding_and_scaling(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 2, 3, 5, 6).to(dtype).unbind()
    scale = torch.randn(2, 3, 6)
    total, normed = add_norm(x, y, scale)
    assert torch.equal(total, x + y)
    assert normed.dtype == dtype
    assert torch.equal(normed, scaled_norm(total, scale))
    for b in range(2):
        for t in range(3):
            expected = F.rms_norm(total[b, t].float(), (6,), eps=1e-6) * scale[b, t]
            torch.testing.assert_close(normed[b, t], expected.to(dtype))


@everywhere
@pytest.mark.parametrize("S", [8, 7, 1], ids=lambda n: f"S{n}")
@pytest.mark.parametrize("width", [64, 72, 1], ids=lambda n: f"W{n}")
@torch.no_grad()
def test_the_kernel_is_the_definition(
    device: str, dtype: torch.dtype, S: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = (torch.randn(2, 2, 3, S, width) * 4).to(device, dtype).unbind()
    x[0, 0, 0] = y[0, 0, 0] = 0
    # Scales of one norm lie between those of the others; latents before the predicted are cut off.
    scale = torch.randn(2, 4, 3, width, device=device)[:, 1:, 1]
    x, y = (torch.cat((z[:, :1], z), 1)[:, 1:] for z in (x, y))

    def both() -> list[Tensor]:
        return [scaled_norm(x, scale), *add_norm(x, y, scale)]

    monkeypatch.setattr(norm, "bare_kernels_serve", lambda _: False)
    plain = both()
    monkeypatch.setattr(norm, "bare_kernels_serve", lambda _: True)
    for ours, expected in zip(both(), plain, strict=True):
        assert ours.dtype == dtype
        # The order of a sum differs, then each number is rounded once.
        within = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, expected, rtol=within, atol=within)
    assert torch.equal(both()[1], x + y)


def test_the_kernel_is_for_inference_on_a_gpu() -> None:
    assert not norm.bare_kernels_serve(torch.zeros(1))


@everywhere
@pytest.mark.parametrize("width", [64, 72], ids=lambda n: f"W{n}")
@torch.no_grad()
def test_the_kernel_rounds_by_the_definition(
    device: str, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = (torch.randn(2, 1, 3, 7, width) * 4).to(device, dtype).unbind()
    x[0, 0, 0] = y[0, 0, 0] = 0
    scale = torch.randn(1, 3, width, device=device)
    monkeypatch.setattr(norm, "bare_kernels_serve", lambda _: True)
    total, normed = add_norm(x, y, scale)
    summed, rows = add_norm_rows(x, y, scale)
    *both, same = add_norm_both(x, y, scale)
    assert torch.equal(summed, total)
    assert all(torch.equal(*pair) for pair in zip(both, (total, normed), strict=True))
    assert torch.equal(same.values.float(), rows.values.float())
    assert torch.equal(same.scale, rows.scale)
    for got, expected in (
        (rows, fp8_rows(normed)),
        (scaled_norm_rows(x, scale), fp8_rows(scaled_norm(x, scale))),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got.scale, expected.scale)
        other = got.values.float() != expected.values.float()
        # The interpreter rounds 1.99 to 1, forgetting the carry; a GPU may differ where two
        # numbers of 8 bits are equally near.
        assert other.float().mean() < (0.1 if device == "cpu" else 0.01)


@torch.no_grad()
def test_norms_in_8_bits_are_the_norms_rounded() -> None:
    x, y, scale = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 8)
    total, normed = add_norm(x, y, scale)
    summed, rows = add_norm_rows(x, y, scale)
    *both, same = add_norm_both(x, y, scale)
    assert all(torch.equal(*pair) for pair in zip(both, (total, normed), strict=True))
    assert torch.equal(summed, total)
    for got, expected in (
        (rows, normed),
        (same, normed),
        (scaled_norm_rows(x, scale), scaled_norm(x, scale)),
    ):
        rounded = fp8_rows(expected)
        assert torch.equal(got.values.float(), rounded.values.float())
        assert torch.equal(got.scale, rounded.scale)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("plain", "rounded"), [(True, False), (False, True), (True, True)], ids=str
)
@pytest.mark.parametrize("added", [True, False], ids=["added", "alone"])
def test_the_operator_passes_opcheck(added: bool, plain: bool, rounded: bool) -> None:
    x, scale = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 16)
    y = torch.randn_like(x) if added else None
    tests = ("test_schema", "test_faketensor")
    given = (x, y, scale, plain, rounded)
    torch.library.opcheck(torch.ops.decmem.scaled_norm, given, test_utils=tests)
