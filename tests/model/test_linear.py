"""The activation: the short cut of the CPU beside its plain form; the joined scales of norms."""

import copy

import pytest
import torch
import torch.nn.functional as F

from decmem.model.linear import JointScales, Projection, ScaledNorm, gelu

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu(dtype: torch.dtype) -> None:
    x = torch.cat((torch.linspace(-30, 30, 999), torch.tensor([0.0, 1e4, -1e4]))).to(dtype)
    plain, before = gelu(x), x.clone()
    assert torch.equal(plain, F.gelu(x, approximate="tanh"))
    with torch.no_grad():
        torch.testing.assert_close(gelu(x), plain, atol=1e-6, rtol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@torch.no_grad()
def test_a_product_that_activates_by_itself(dtype: torch.dtype) -> None:
    up = Projection(32, 96).to("cuda", dtype)
    x = (torch.randn(2, 3, 5, 32) * 4).to("cuda", dtype)
    plain, fused = gelu(up(x)), up.activated(x)
    assert (fused.shape, fused.dtype) == (plain.shape, dtype)
    exact = gelu(x.double().cpu() @ up.weight.double().cpu().T)
    errors = [(out.double().cpu() - exact).abs().max() for out in (fused, plain)]
    assert errors[0] <= 2 * errors[1] + 1e-6


@torch.no_grad()
def test_elsewhere_the_activation_follows_the_product() -> None:
    up, x = Projection(32, 96), torch.randn(2, 3, 32)
    assert torch.equal(up.activated(x), gelu(up(x)))


def norms() -> list[ScaledNorm]:
    made = [ScaledNorm(6, 4) for _ in range(3)]
    for norm in made:
        torch.nn.init.normal_(norm.weight)
    return made


@torch.no_grad()
def test_joined_scales_are_those_of_each_norm() -> None:
    alone, time = norms(), torch.randn(2, 5, 4)
    expected = torch.stack([norm.scale_at(time) for norm in alone])
    joint = JointScales(alone)
    torch.testing.assert_close(joint.at(time), expected)
    torch.testing.assert_close(torch.stack([norm.scale_at(time) for norm in alone]), expected)


@torch.no_grad()
def test_joined_scales_follow_their_norms() -> None:
    alone, time = norms(), torch.randn(2, 5, 4)
    joint = JointScales(alone)
    others = torch.nn.ModuleList(norms())
    torch.nn.ModuleList(alone).load_state_dict(others.state_dict())
    assert joint.serve
    torch.testing.assert_close(joint.at(time)[1], others[1].scale_at(time))
    assert not copy.deepcopy(joint).serve
    alone[0].double()
    assert not joint.serve
