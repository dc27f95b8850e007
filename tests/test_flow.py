"""Rectified flow: the path, its times, the solver, guidance, each against its formula."""

import itertools

import pytest
import torch
from torch import Tensor

from decmem.errors import UserError
from decmem.flow import (
    FlowConfig,
    guide,
    interpolate,
    sampling_times,
    shift_time,
    solve,
    training_times,
)

SHAPE = (2, 3, 4, 2, 2)


def normal(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def test_path_starts_at_the_data_and_ends_in_noise() -> None:
    data, noise = normal(0), normal(1)
    assert torch.equal(interpolate(data, noise, torch.zeros(2, 3)), data)
    assert torch.equal(interpolate(data, noise, torch.ones(2, 3)), noise)


def test_path_is_straight_with_velocity_noise_minus_data() -> None:
    data, noise = normal(0), normal(1)
    early, late = (interpolate(data, noise, torch.full((2, 3), t)) for t in (0.25, 0.75))
    torch.testing.assert_close((late - early) / 0.5, noise - data)


def test_every_latent_has_its_own_time() -> None:
    data, noise = torch.zeros(SHAPE), torch.ones(SHAPE)
    t = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.75, 0.125]])
    assert torch.equal(interpolate(data, noise, t)[:, :, 0, 0, 0], t)


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0, 5.0])
def test_shift_keeps_the_ends_and_the_order(shift: float) -> None:
    t = torch.linspace(0, 1, 11)
    shifted = shift_time(t, shift)
    assert (shifted[0].item(), shifted[-1].item()) == (0, 1)
    assert (shifted.diff() > 0).all()
    if shift != 1:
        assert ((shifted > t) == (shift > 1))[1:-1].all()
    assert shift_time(torch.tensor(0.5), shift).item() == pytest.approx(shift / (1 + shift))


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_times_fall_from_1_to_0(steps: int, shift: float) -> None:
    times = sampling_times(FlowConfig(shift=shift), steps)
    assert (times[0], times[-1], len(times)) == (1.0, 0.0, steps + 1)
    assert all(later < now for now, later in itertools.pairwise(times))
    if shift == 1:
        assert times == pytest.approx([1 - i / steps for i in range(steps + 1)])


def test_at_least_one_step() -> None:
    with pytest.raises(UserError, match="steps"):
        sampling_times(FlowConfig(), 0)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_euler_is_exact_on_a_straight_path(steps: int) -> None:
    data, noise = normal(0), normal(1)
    times = sampling_times(FlowConfig(shift=3.0), steps)
    got = solve(lambda z, t: noise - data, noise, times)
    torch.testing.assert_close(got, data, atol=1e-6, rtol=1e-5)


def test_euler_step_by_hand() -> None:
    # dz/dt = z: from t = 1 over 0.5 to 0, each step scales by (1 - 0.5).
    seen: list[float] = []

    def velocity(z: Tensor, t: float) -> Tensor:
        seen.append(t)
        return z

    got = solve(velocity, torch.ones(SHAPE), [1.0, 0.5, 0.0])
    torch.testing.assert_close(got, torch.full(SHAPE, 0.25))
    assert seen == [1.0, 0.5]


def test_state_of_the_solver_stays_fp32() -> None:
    got = solve(lambda z, t: z.bfloat16(), torch.ones(SHAPE).bfloat16(), [1.0, 0.999, 0.998])
    assert got.dtype == torch.float32
    assert got.flatten()[0].item() == pytest.approx(0.998, abs=2e-5)


def test_guidance_by_hand() -> None:
    conditional, unconditional = torch.tensor([3.0]), torch.tensor([1.0])
    for strength, expected in ((0.0, 1.0), (1.0, 3.0), (7.5, 16.0)):
        assert guide(conditional, unconditional, strength).item() == expected


def test_training_times_follow_the_configuration() -> None:
    def times(config: FlowConfig, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return training_times(config, (5000,), generator, torch.device("cpu"))

    plain = times(FlowConfig(mean=0.0, spread=1.0, shift=1.0))
    assert ((plain > 0) & (plain < 1)).all()
    assert plain.median().item() == pytest.approx(0.5, abs=0.02)
    # The median moves with the mean and the shift; quartiles with the spread.
    late = times(FlowConfig(mean=1.0, spread=2.0, shift=3.0))
    middle = torch.tensor([1.0]).sigmoid()
    assert late.median().item() == pytest.approx(shift_time(middle, 3.0).item(), abs=0.02)
    wide = times(FlowConfig(spread=2.0, shift=1.0))
    assert wide.quantile(0.75).item() == pytest.approx(1 / (1 + 2.718 ** (-2 * 0.674)), abs=0.02)
    assert torch.equal(times(FlowConfig()), times(FlowConfig()))
    assert not torch.equal(times(FlowConfig()), times(FlowConfig(), seed=1))


def test_sampling_may_lean_further_towards_noise_than_training() -> None:
    leaning = FlowConfig(shift=2.0, sampling_shift=16.0)
    assert sampling_times(leaning, 4) == sampling_times(FlowConfig(shift=16.0), 4)
    drawn = training_times(leaning, (9,), torch.Generator().manual_seed(0), torch.device("cpu"))
    plain = training_times(
        FlowConfig(shift=2.0), (9,), torch.Generator().manual_seed(0), torch.device("cpu")
    )
    assert drawn.equal(plain)
