"""Products in 8 bits: the rounding, the product, and the kernels beside their definitions."""

import pytest
import torch
import torch.nn.functional as F

from decmem.errors import UserError
from decmem.ops import fp8
from decmem.ops.fp8 import FP8, Fp8Rows, check_fp8, fp8_rows, gelu_rows, product

PLACES = [
    pytest.param("cpu", torch.float32, marks=pytest.mark.interpreter),
    pytest.param("cpu", torch.float16, marks=pytest.mark.interpreter),
    pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
]


def test_a_row_worked_by_hand() -> None:
    rows = fp8_rows(torch.tensor([[-2.0, 1.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert rows.values.dtype == FP8
    assert rows.values.float().tolist() == [[-448.0, 224.0, 112.0, 0.0], [0.0] * 4]
    torch.testing.assert_close(rows.scale[0], torch.tensor([2 / 448]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_loses_a_sixteenth_at_most(dtype: torch.dtype) -> None:
    x = (torch.randn(5, 3, 40) * torch.logspace(-6, 6, 5)[:, None, None]).to(dtype)
    rows = fp8_rows(x)
    assert rows.dtype == dtype
    assert rows.scale.shape == (5, 3, 1)
    restored, largest = rows.values.float() * rows.scale, x.float().abs().amax(-1, keepdim=True)
    # Below 2^-6 of the format steps are even: 2^-10 of it, of 448.
    assert ((restored - x.float()).abs() <= x.float().abs() / 16 + largest * 2**-10 / 448).all()


def test_gelu_rows_are_the_activation_rounded() -> None:
    x = torch.randn(4, 30)
    expected = fp8_rows(F.gelu(x, approximate="tanh"))
    assert torch.equal(gelu_rows(x).values.float(), expected.values.float())
    assert torch.equal(gelu_rows(x).scale, expected.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_that_of_what_the_rows_stand_for(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 48).to(dtype), fp8_rows(torch.randn(32, 48))
    rows = fp8_rows(x)
    out = product(rows, weight.values, weight.scale)
    assert out.dtype == dtype
    expected = (rows.values.float() * rows.scale) @ (weight.values.float() * weight.scale).T
    torch.testing.assert_close(out, expected.to(dtype), rtol=2e-2, atol=1e-2)
    if dtype == torch.float32:
        torch.testing.assert_close(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3840, 7680, 77], ids=lambda n: f"M{n}")
@pytest.mark.parametrize(("inputs", "outputs"), [(1728, 5184), (6912, 1728)])
def test_the_product_of_the_gpu(rows: int, inputs: int, outputs: int) -> None:
    x = torch.randn(1, rows, inputs, device="cuda", dtype=torch.bfloat16)
    weight = fp8_rows(torch.randn(outputs, inputs, device="cuda"))
    coarse = fp8_rows(x)
    out = product(coarse, weight.values, weight.scale)
    parts = [part.double() for part in (*coarse[:2], *weight[:2])]
    expected = (parts[0] * parts[1]) @ (parts[2] * parts[3]).T
    error = (out.double() - expected).square().mean().sqrt() / expected.std()
    assert error < 5e-3  # bf16 rounds to 2^-9; sums of 8-bit products keep 14 bits or so


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("width", [24, 64, 200], ids=lambda n: f"W{n}")
@pytest.mark.parametrize("activated", [True, False], ids=["gelu", "bare"])
def test_the_kernel_rounds_by_the_definition(
    device: str, dtype: torch.dtype, width: int, activated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = (torch.randn(2, 3, width) * 3).to(device, dtype)
    x[0, 0] = 0
    round_rows = gelu_rows if activated else fp8_rows

    def by(kernels: bool) -> Fp8Rows:
        monkeypatch.setattr(fp8, "kernels_serve", lambda _: kernels)
        return round_rows(x)

    ours, plain = by(kernels=True), by(kernels=False)
    # The tanh of the plain form cancels where the activation is next to nothing.
    torch.testing.assert_close(ours.scale, plain.scale, rtol=4 * torch.finfo(dtype).eps, atol=1e-8)
    other = ours.values.float() != plain.values.float()
    # The interpreter rounds 1.99 to 1, forgetting the carry; a GPU may differ where two numbers of
    # 8 bits are equally near.
    assert other.float().mean() < (0.1 if device == "cpu" else 0.01)
    assert ours.dtype == plain.dtype


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_the_kernel_leaves_numbers_of_8_bits_alone(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = torch.arange(256, dtype=torch.uint8, device=device).view(FP8).float()
    finite = everything[everything.isfinite()].repeat(3, 1)
    rows = finite * torch.tensor([[1.0], [2.0], [0.5]], device=device)
    monkeypatch.setattr(fp8, "kernels_serve", lambda _: True)
    ours = fp8_rows(rows.to(dtype))
    assert torch.equal(ours.values.float(), finite)
    torch.testing.assert_close(ours.scale.flatten(), torch.tensor([1.0, 2.0, 0.5], device=device))


@pytest.mark.interpreter
def test_the_operator_passes_opcheck() -> None:
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.decmem.fp8_rows, (torch.randn(2, 3, 16), True), test_utils=tests
    )


def test_other_formats_are_refused() -> None:
    check_fp8(FP8, torch.device("cpu"))
    with pytest.raises(UserError, match="gemm"):
        check_fp8(torch.float8_e5m2, torch.device("cpu"))
