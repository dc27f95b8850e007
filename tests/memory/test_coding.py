"""Coding of a pass: the kernels beside the plain definition, outputs and all gradients."""

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from decmem.memory import PositionConfig, coding
from decmem.memory.packing import Packing
from decmem.memory.position import Position, make_position, seeing, time_rotation
from decmem.ops import coding as kernels
from decmem.ops.norm import rms_norm
from decmem.ops.rotary import rotary_angles, rotate_pairs, rotation

B, H, T = 2, 2, 3
GRID = (2, 3)
# One place of the grid is left out: no whole number of the kernels' tiles of tokens.
S = 5
COORDINATES = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij"), -1)
# Four tokens in the five slots; the padding repeats one.
PACKING = Packing(torch.tensor([0, 1, 1, 2, 3]), torch.tensor([0, 1, 3, 4]))
LENS = torch.tensor([1.4, 2.1, 0.0, 0.0])

POSITIONS = {
    "surface": PositionConfig(camera=16, space=16, surface=24, time=8, global_time=False),
    "plain": PositionConfig(camera=24, space=24, time=24),
    "no-camera": PositionConfig(camera=0, space=8, time=4, global_time=False),
    "no-space": PositionConfig(camera=8, space=0, surface=12, time=0),
}
PLACES = [
    pytest.param("cpu", torch.float32, marks=pytest.mark.interpreter),
    pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
]
everywhere = pytest.mark.parametrize(("device", "dtype"), PLACES)
every_position = pytest.mark.parametrize("config", POSITIONS.values(), ids=POSITIONS.keys())


class Pass(NamedTuple):
    config: PositionConfig
    position: Position
    qkv: Tensor
    gains: Tensor
    estimate: Tensor


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """No TF32 in the definition."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def made(walk: Callable[..., Tensor]) -> Callable[..., Pass]:
    def make(config: PositionConfig, device: str, dtype: torch.dtype) -> Pass:
        position = make_position(
            config,
            walk(T).float().to(device),
            LENS.expand(B, T, 4).to(device),
            torch.arange(T, device=device) + 5,
            COORDINATES.flatten(0, 1)[:S].to(device),
            GRID,
        )
        qkv = torch.randn(B, T, S, 3 * H * config.head_dim).to(device, dtype)
        gains = torch.rand(2, H).to(device) + 0.5
        estimate = torch.randn(B, T, S, 2).to(device) * 0.5 + torch.tensor([1.5, -1.0]).to(device)
        leaves = (x.requires_grad_() for x in (qkv, gains, estimate))
        return Pass(config, position, *leaves)

    return make


def both_ways(
    run: Callable[[], list[Tensor]], leaves: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients by the kernels, and by the definition."""
    results = []
    for served in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "kernels_serve", lambda _, served=served: served)
            out = run()
        draw = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=draw).to(x) for x in out]
        grads = torch.autograd.grad(out, leaves, weights, allow_unused=True)
        results.append([*out, *(g for g in grads if g is not None)])
    return results[0], results[1]


def assert_alike(ours: list[Tensor], plain: list[Tensor]) -> None:
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == b.dtype
        # Both round once to the type; the definition also rounds in between.
        within = 3e-5 if a.dtype == torch.float32 and plain[0].dtype == torch.float32 else 2e-2
        scale = float(b.detach().float().abs().max()) or 1.0
        torch.testing.assert_close(a, b, atol=within * scale, rtol=within)


def placed(one: Pass) -> Position:
    if not one.config.surface:
        return one.position
    return seeing(one.config, one.position, one.estimate)


def encodings() -> Iterator[Any]:
    """All on a GPU; in the interpreter every two settings together, which is half of them."""
    for at, (name, config) in enumerate(POSITIONS.items()):
        for normed, local in product([True, False], repeat=2):
            for place in PLACES:
                device, dtype = place.values
                if device == "cpu" and (normed == local) != (at % 2 == 0):
                    continue
                words = (name, "normed" if normed else "bare", "local" if local else "once")
                ident = "-".join((*words, device, str(dtype).removeprefix("torch.")))
                yield pytest.param(
                    config, normed, local, device, dtype, marks=place.marks, id=ident
                )


@pytest.mark.parametrize(("config", "normed", "local", "device", "dtype"), list(encodings()))
def test_encode(
    made: Callable[..., Pass],
    config: PositionConfig,
    normed: bool,
    local: bool,
    device: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = made(config, device, dtype)
    turn = time_rotation(config, torch.arange(T, device=device)) if local and config.time else None

    def run() -> list[Tensor]:
        gains = one.gains if normed else None
        coded = coding.encode(config, placed(one), one.qkv, gains, turn)
        return [x for x in coded if x is not None]

    assert_alike(*both_ways(run, [one.qkv, one.gains, one.estimate], monkeypatch))


@everywhere
@every_position
@pytest.mark.parametrize("gate", ["channel", "head", "none"])
def test_decode(
    made: Callable[..., Pass],
    config: PositionConfig,
    gate: str,
    device: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, D = made(config, device, dtype), config.head_dim
    near, far = (torch.randn(B, H, T, S, D).to(device, dtype).requires_grad_() for _ in range(2))
    gates = torch.randn(B, T, S, H * D if gate == "channel" else H).to(device, dtype)
    gates.requires_grad_()

    def run() -> list[Tensor]:
        branch = (None, None) if gate == "none" else (far, gates)
        return [coding.decode(config, placed(one), near, *branch)]

    assert_alike(*both_ways(run, [near, far, gates, one.estimate], monkeypatch))


@everywhere
@every_position
@pytest.mark.parametrize("gate", ["channel", "head"])
def test_tokens_in_fewer_places_than_slots(
    made: Callable[..., Pass],
    config: PositionConfig,
    gate: str,
    device: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There and back, outputs and gradients. Nothing asks for what padding holds."""
    one, D, packing = made(config, device, dtype), config.head_dim, Packing(*to(device, *PACKING))
    tokens = len(packing.kept)
    qkv = one.qkv.detach()[:, :, :tokens].clone().requires_grad_()
    near, far = (torch.randn(B, H, T, S, D).to(device, dtype).requires_grad_() for _ in range(2))
    gates = torch.randn(B, T, tokens, H * D if gate == "channel" else H).to(device, dtype)
    gates.requires_grad_()

    def run() -> list[Tensor]:
        coded = coding.encode(config, placed(one), qkv, one.gains, None, None, packing)
        read = coding.decode(config, placed(one), near, far, gates, packing)
        return [read, *(x[..., packing.kept, :] for x in coded if isinstance(x, Tensor))]

    leaves = [qkv, one.gains, near, far, gates, one.estimate]
    assert_alike(*both_ways(run, leaves, monkeypatch))


def to(device: str, *tensors: Tensor) -> list[Tensor]:
    return [x.to(device) for x in tensors]


@everywhere
def test_heads_last_and_values_left_alone(device: str, dtype: torch.dtype) -> None:
    D = 16
    qkv = torch.randn(B, T, S, 3 * H * D).to(device, dtype).requires_grad_()
    angles = rotary_angles(torch.arange(S, device=device), D, 100.0)
    back = kernels.Places(space=rotation(-angles))
    groups = kernels.Groups(0, D, 0, 0)
    ours = kernels.encode_heads(qkv, None, groups, back, values=False, heads_last=True)[:3]
    q, k, v = (x.unflatten(-1, (H, D)) for x in qkv.chunk(3, -1))
    turn = rotation(angles[:, None])
    plain = [*(rotate_pairs(x, turn).to(dtype) for x in (q, k)), v]
    weights = [torch.randn_like(x) for x in plain]
    results = [
        [*out, *torch.autograd.grad(out, [qkv], weights, retain_graph=True)]
        for out in (list(ours), plain)
    ]
    assert_alike(*results)


@everywhere
def test_a_norm_of_zeros_is_zero(device: str, dtype: torch.dtype) -> None:
    qkv = torch.zeros(1, 1, 3, 48, device=device, dtype=dtype, requires_grad=True)
    gains = torch.ones(2, 1, device=device)
    out = kernels.encode_heads(
        qkv,
        gains,
        kernels.Groups(0, 16, 0, 0),
        kernels.Places(space=rotation(torch.zeros(3, 8, device=device))),
    )[:3]
    assert all(not x.any() for x in out)
    (grad,) = torch.autograd.grad(out[0].sum(), qkv)
    assert torch.isfinite(grad).all()
    assert not rms_norm(qkv, gains[0]).any()


def test_a_cpu_takes_the_definition() -> None:
    assert not kernels.kernels_serve(torch.zeros(1))
