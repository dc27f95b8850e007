"""Muon against its definition, who goes where, rates, and the average of weights."""

import pytest
import torch
from torch import Tensor, nn

from decmem.training.average import WeightAverage
from decmem.training.optimiser import Muon, Optimisers, orthogonalise, rate

SHAPES = [(12, 12), (36, 12), (12, 36), (48, 12), (36, 12), (8, 20), (20, 8)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def newton_schulz(x: Tensor) -> Tensor:
    """The quintic iteration on one matrix, as it is published."""
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.T if x.shape[0] > x.shape[1] else x
    y = y / (y.norm() + 1e-7)
    for _ in range(5):
        gram = y @ y.T
        y = a * y + b * gram @ y + c * gram @ gram @ y
    return y.T if x.shape[0] > x.shape[1] else y


def plain_muon(weights: list[Tensor], grads: list[list[Tensor]], lr: float) -> list[Tensor]:
    """One matrix at a time; fused q, k and v are three."""
    found = []
    for i, weight in enumerate(weights):
        rows, columns = weight.shape
        parts = 3 if rows == 3 * columns else 1
        pieces = []
        for part in range(parts):
            own = slice(part * rows // parts, (part + 1) * rows // parts)
            w, momentum = weight[own], torch.zeros_like(weight[own])
            for step in grads:
                g = step[i][own]
                momentum = 0.95 * momentum + 0.05 * g
                direction = newton_schulz(0.05 * g + 0.95 * momentum)
                w = w - lr * max(1.0, len(w) / columns) ** 0.5 * direction
            pieces.append(w)
        found.append(torch.cat(pieces))
    return found


def test_muon_is_what_its_definition_says() -> None:
    weights = [normal(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    # A gradient that turns from step to step, so that momentum counts.
    grads = [[normal(*s, seed=100 * n + i) for i, s in enumerate(SHAPES, 1)] for n in (1, 2, 3)]
    params = [nn.Parameter(w.clone()) for w in weights]
    optimiser = Muon(params, lr=0.1)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimiser.step()
    for p, expected in zip(params, plain_muon(weights, grads, 0.1), strict=True):
        # Batched and single products round differently, and the iteration stretches that a little.
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=2e-6)


def test_a_parameter_without_a_gradient_stays() -> None:
    first, second = nn.Parameter(normal(4, 4)), nn.Parameter(normal(4, 4))
    first.grad = normal(4, 4, seed=1)
    Muon([first, second], lr=0.1).step()
    assert not first.equal(normal(4, 4))
    assert second.equal(normal(4, 4))


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (2, 24, 8)], ids=str)
def test_orthogonalised_singular_values_are_near_one(shape: tuple[int, int, int]) -> None:
    x = normal(*shape)
    turned = orthogonalise(x)
    values = torch.linalg.svdvals(turned)
    # The published coefficients settle for this band; small values of the input rise slowest.
    assert values.max() < 1.25
    assert values.median() > 0.6
    # The singular vectors stay: y^T x is symmetric (or x y^T, whichever is full).
    gram = turned.mT @ x
    assert (gram - gram.mT).abs().max() < 1e-4 * gram.abs().max()
    scaled = orthogonalise(1000 * x)
    torch.testing.assert_close(scaled, turned, rtol=0, atol=1e-5)


class Layered(nn.Module):
    """The names that decide who goes where."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.ModuleDict(
            {"qkv": nn.Linear(4, 12), "norm_scale": nn.Linear(4, 4), "gate": nn.Conv1d(4, 4, 1)}
        )
        self.blocks = nn.ModuleList([block])
        self.head = nn.Linear(4, 4)
        self.fixed = nn.Linear(4, 4).requires_grad_(False)


def test_matrices_of_layers_go_to_muon_and_the_rest_to_adam() -> None:
    module = Layered()
    names = {p: n for n, p in module.named_parameters()}

    def members(optimiser: torch.optim.Optimizer) -> set[str]:
        return {names[p] for group in optimiser.param_groups for p in group["params"]}

    adam, muon = Optimisers(module, 1e-3, 0.02).all
    learnt = {n for n in names.values() if not n.startswith("fixed")}
    assert members(muon) == {"blocks.0.qkv.weight"}
    assert members(adam) == learnt - members(muon)
    assert isinstance(muon, Muon)
    (alone,) = Optimisers(module, 1e-3).all
    assert members(alone) == learnt
    for optimiser in (adam, alone):
        (group,) = optimiser.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.9, 0.95), 0.0)


def test_rates_are_factors_of_their_peaks() -> None:
    optimisers = Optimisers(Layered(), 1e-3, 0.02)
    for factor in (0.5, 0.25, 1.0):  # of the peak, not of the rate before
        optimisers.set_rate(factor)
        rates = [o.param_groups[0]["lr"] for o in optimisers.all]
        assert rates == [1e-3 * factor, 0.02 * factor]


def test_state_survives_in_another_process() -> None:
    def stepped(optimisers: Optimisers, module: nn.Module, seed: int) -> None:
        for i, p in enumerate(module.parameters()):
            p.grad = normal(*p.shape, seed=seed + i) if p.requires_grad else None
        optimisers.step()

    def fresh() -> tuple[nn.Module, Optimisers]:
        torch.manual_seed(0)
        module = Layered().to(memory_format=torch.preserve_format)
        return module, Optimisers(module, 1e-2, 0.02)

    one, kept = fresh()
    stepped(kept, one, 0)
    two, restored = fresh()
    two.load_state_dict(one.state_dict())
    restored.load_state({name: x.clone() for name, x in kept.state().items()})
    for module, optimisers in ((one, kept), (two, restored)):
        stepped(optimisers, module, 50)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert p.equal(q)
    # Both optimisers are in it: two moments and a step count a parameter, or the momentum.
    names = kept.state()
    assert {n.split(".")[2] for n in names if n.startswith("0.")} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
    assert [n for n in names if n.startswith("1.")] == ["1.0.momentum"]


def test_restored_state_has_the_layout_of_its_parameter() -> None:
    module = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimisers = Optimisers(module, 1e-3)
    optimisers.step()
    # A file knows no layout: what comes back is contiguous.
    optimisers.load_state({name: x.contiguous() for name, x in optimisers.state().items()})
    moments = optimisers.all[0].state[module.weight]
    assert moments["exp_avg"].stride() == module.weight.stride() != (36, 9, 3, 1)
    assert moments["exp_avg"].eq(0.1).all()
    assert float(moments["step"]) == 1.0


@pytest.mark.parametrize(
    ("progress", "step", "expected"),
    [
        (0.0, 0, 0.1),  # warm-up: 1/10 at the first step
        (0.05, 4, 0.5),
        (0.3, 9, 1.0),
        (0.6, 600, 1.0),
        (0.8, 800, 0.5),  # half of the way from 0.6 to the end
        (1.0, 1000, 0.0),
        (0.8, 4, 0.25),  # a run shorter than its warm-up: both
    ],
)
def test_rate_rises_holds_and_falls(progress: float, step: int, expected: float) -> None:
    assert rate(progress, step, 10, 0.6) == pytest.approx(expected)


def test_rate_at_the_edges_of_its_settings() -> None:
    assert rate(0.0, 0, 0, 0.5) == 1.0, "no warm-up"
    assert rate(0.25, 99, 10, 0.0) == 0.75, "falls from the start"
    assert rate(0.999, 99, 10, 1.0) == 1.0, "never falls"


def test_average_follows_slowly_and_forgets_its_youth() -> None:
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(0.0)
    average = WeightAverage(module, decay=0.5)
    expected = 0.0
    for step in range(12):
        with torch.no_grad():
            module.weight.fill_(float(step + 1))
        average.update(module, step)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * (step + 1)
    assert float(average.values[0]) == pytest.approx(expected)
    assert module.weight.item() == 12.0


def test_swapping_twice_is_no_change() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    average = WeightAverage(module, decay=0.9)
    before = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    after = [p.detach().clone() for p in module.parameters()]
    average.swap(module)
    assert all(p.equal(x) for p, x in zip(module.parameters(), before, strict=True))
    assert all(v.equal(x) for v, x in zip(average.values, after, strict=True))
    average.swap(module)
    assert all(p.equal(x) for p, x in zip(module.parameters(), after, strict=True))
    assert all(v.equal(x) for v, x in zip(average.values, before, strict=True))


def test_average_is_stored_by_name() -> None:
    module = nn.Linear(3, 2)
    average, other = WeightAverage(module, 0.9), WeightAverage(nn.Linear(3, 2), 0.9)
    state = average.state()
    assert list(state) == ["weight", "bias"]
    other.load_state(dict(reversed(state.items())))
    assert all(a.equal(b) for a, b in zip(other.values, average.values, strict=True))
