"""The surface group: where two tokens see one place they meet, however far apart their cameras."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decmem.memory import Bank, PositionConfig, TokenLayout
from decmem.memory.position import (
    Position,
    decode_output,
    encode_key,
    encode_query,
    encode_time,
    make_position,
    seeing,
    time_rotation,
)
from decmem.memory.surface import (
    FARTHEST,
    Sight,
    SurfaceDepth,
    depth_loss,
    make_sight,
    surface_rotation,
)

CONFIG = PositionConfig(camera=8, space=8, time=4, surface=12, surface_waves=(1.0, 8.0))
LAYOUT = TokenLayout((2, 3), (1, 1))
LENS = torch.tensor([1.4, 2.1, 0.05, -0.1])
GROUP = slice(16, 28)
SHARP = -3.5


def positions(cameras: Tensor, estimate: Tensor) -> Position:
    B, T = cameras.shape[:2]
    at = make_position(
        CONFIG,
        cameras.float(),
        LENS.expand(B, T, 4),
        torch.arange(T),
        LAYOUT.coordinates,
        LAYOUT.grid,
    )
    return seeing(CONFIG, at, estimate)


def estimates(cameras: Tensor, spread: float = SHARP, seed: int = 0) -> Tensor:
    """Random depths, equally certain."""
    generator = torch.Generator().manual_seed(seed)
    depth = torch.rand(*cameras.shape[:2], LAYOUT.S, generator=generator) * 1.5
    return torch.stack((depth, torch.full_like(depth, spread)), -1)


def heads(T: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, T, LAYOUT.S, CONFIG.head_dim, generator=generator)


def logits(at: Position) -> Tensor:
    """Between all tokens, of the surface group alone."""
    T = at.time.cos.shape[0]
    q, k = heads(T), heads(T, seed=1)
    coded = (
        encode(CONFIG, at, x)[..., GROUP] for encode, x in ((encode_query, q), (encode_key, k))
    )
    return torch.einsum("bhtsd,bhund->bhtsun", *coded)


def test_rays_lead_through_the_patches() -> None:
    # A camera at (1, 2, 3) that looks along +x: right is +z, down is -y.
    camera = torch.tensor([[0.0, 0, 1, -3], [0, -1, 0, 2], [1, 0, 0, -1], [0, 0, 0, 1]])
    lens = torch.tensor([1.0, 2.0, 0.0, 0.0])
    sight = make_sight(camera[None, None], lens[None, None], LAYOUT.coordinates, LAYOUT.grid)
    assert sight.eye.flatten().tolist() == [1.0, 2.0, 3.0]
    # The grid is 2 x 3: patch centres at x = -2/3, 0, 2/3 and y = -1/2, 1/2.
    expected = [[1, 0.25, x] for x in (-2 / 3, 0, 2 / 3)] + [
        [1, -0.25, x] for x in (-2 / 3, 0, 2 / 3)
    ]
    torch.testing.assert_close(sight.ray[0, 0], torch.tensor(expected))


def test_tokens_that_see_one_point_meet_as_they_are(walk: Callable[..., Tensor]) -> None:
    """Two cameras, and in each the depth at which the patch's ray passes nearest the other's."""
    eye = torch.tensor([[0.0, 0, 0], [3.0, 1, -2]])
    point = torch.tensor([1.0, 2.0, 5.0])
    ray = (point - eye) / torch.tensor([[2.0], [4.0]])  # depths 2 and 4
    sight = Sight(eye[None, :, None], ray[None, :, None])
    estimate = torch.tensor([[[[math.log(2), SHARP]], [[math.log(4), SHARP]]]])
    turn = surface_rotation(sight, estimate, 12, (20.0, 60.0))
    assert turn.cos.shape == (1, 1, 2, 1, 6)
    angle = torch.atan2(turn.sin, turn.cos)
    torch.testing.assert_close(angle[:, :, 0], angle[:, :, 1], atol=1e-5, rtol=1e-5)
    length = torch.hypot(turn.sin, turn.cos)
    assert length.min() > 0.97
    assert length.max() <= 1.0


def test_moving_the_world_changes_no_logit(walk: Callable[..., Tensor]) -> None:
    cameras = walk(3)
    before = logits(positions(cameras, estimates(cameras)))
    moved = logits(positions(walk(3, at=(9.0, -4.0, 5.0)), estimates(cameras)))
    torch.testing.assert_close(moved, before, atol=2e-4, rtol=1e-4)
    deeper = estimates(cameras) + torch.tensor([0.3, 0.0])
    assert (logits(positions(cameras, deeper)) - before).abs().max() > 0.1


def test_what_is_uncertain_fades_short_waves_first(walk: Callable[..., Tensor]) -> None:
    at = [positions(walk(2), estimates(walk(2), spread)) for spread in (SHARP, -1.5, 1.0)]
    lengths = []
    for one in at:
        assert one.surface is not None
        lengths.append(torch.hypot(*one.surface).unflatten(-1, (3, 2)))  # axes, waves
    sharp, middling, vague = lengths
    assert (sharp >= middling - 1e-6).all()
    assert (middling >= vague - 1e-6).all()
    assert (middling[..., 0] <= middling[..., 1] + 1e-6).all()
    assert middling[..., 0].mean() < 0.7 * middling[..., 1].mean()


def test_the_expectation_is_that_of_a_thousand_draws() -> None:
    sight = Sight(torch.zeros(1, 1, 1, 3), torch.tensor([[[[0.3, -0.2, 1.0]]]]))
    mean, spread = math.log(5.0), 0.05
    told = torch.tensor([[[[mean, math.log(spread)]]]])
    turn = surface_rotation(sight, told, 12, (4.0, 30.0))
    drawn = mean + spread * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    one = Sight(sight.eye, sight.ray.expand(1, 1, 20_000, 3))
    exact = surface_rotation(
        one, torch.stack((drawn, torch.full_like(drawn, SHARP)), -1)[None, None], 12, (4.0, 30.0)
    )
    for got, want in zip(turn, exact, strict=True):
        torch.testing.assert_close(got[..., 0, :], want.mean(-2), atol=0.05, rtol=0)


def test_rebasing_equals_writing_in_the_new_frame(walk: Callable[..., Tensor]) -> None:
    cameras, estimate = walk(4), estimates(walk(4))
    anchor = torch.tensor([[2.0, -1.0, 0.5], [-300.0, 40.0, 7.0]])
    old, new = (Bank(1, 1, CONFIG, LAYOUT, 2, torch.zeros(2, 3), room=4) for _ in range(2))
    new.anchor = anchor.double()
    for bank in (old, new):
        at = positions(bank.relative(cameras), estimate)
        k, v = (encode_key(CONFIG, at, heads(4, seed)) for seed in (0, 1))
        bank.layers[0].stage(k, v, LAYOUT)
        bank.commit(cameras, LENS.expand(2, 4, 4), torch.arange(4))
    before = old.layers[0].keys.clone()
    old.rebase(anchor)
    for name in ("keys", "values", "pooled"):
        got, want = (getattr(bank.layers[0], name)[..., GROUP] for bank in (old, new))
        torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-3)
    assert (old.layers[0].keys - before)[..., GROUP].abs().max() > 0.1


def test_an_untrained_layer_guesses_eight_metres() -> None:
    layer = SurfaceDepth(16)
    torch.nn.init.zeros_(layer.readout.weight)
    torch.nn.init.zeros_(layer.readout.bias)
    estimate = layer(torch.randn(1, 2, 3, 16).bfloat16())
    assert estimate.dtype == torch.float32
    torch.testing.assert_close(estimate[..., 0].exp(), torch.full((1, 2, 3), 8.0))
    assert not estimate[..., 1].any()


def test_the_loss_is_least_at_the_truth() -> None:
    mean, variance = torch.full((1, 1, 1), 1.2), torch.full((1, 1, 1), 0.04)

    def loss(log_depth: float, log_spread: float) -> float:
        return float(depth_loss(torch.tensor([[[[log_depth, log_spread]]]]), mean, variance))

    best = loss(1.2, math.log(0.2))
    assert best == pytest.approx(math.log(0.2) + 0.5)
    for other in ((1.3, math.log(0.2)), (1.1, math.log(0.2)), (1.2, -1.0), (1.2, -2.5)):
        assert loss(*other) > best


def test_sky_lies_where_the_haze_has_closed() -> None:
    sight = Sight(torch.zeros(1, 1, 1, 3), torch.tensor([[[[0.0, 0.0, 1.0]]]]))
    far = [
        surface_rotation(sight, torch.tensor([[[[depth, SHARP]]]]), 6, (40.0, 40.0))
        for depth in (FARTHEST, 9.0, 90.0)
    ]
    for one in far[1:]:
        torch.testing.assert_close(one.cos, far[0].cos)
        torch.testing.assert_close(one.sin, far[0].sin)


def test_the_short_cut_of_the_cpu(walk: Callable[..., Tensor]) -> None:
    cameras = walk(3)
    at, x = positions(cameras, estimates(cameras, -1.0)), heads(3)
    side_by_side = x.movedim(1, 3).contiguous().movedim(3, 1)
    for position in (at, at._replace(surface=None)):
        for code in (encode_query, encode_key, decode_output):
            plain = code(CONFIG, position, x)
            with torch.no_grad():
                for given in (x, side_by_side):
                    short = code(CONFIG, position, given)
                    torch.testing.assert_close(short, plain, atol=1e-6, rtol=1e-5)
                    assert short.stride() == given.stride()
                assert code(CONFIG, position, x.bfloat16()).dtype == torch.bfloat16
    turn = time_rotation(CONFIG, torch.tensor([3, 4, 9]))
    plain, before = encode_time(CONFIG, x, turn), x.clone()
    with torch.no_grad():
        torch.testing.assert_close(encode_time(CONFIG, x, turn), plain)
    assert torch.equal(x, before)
