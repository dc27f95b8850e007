"""The whole model: what it may not depend on, what it must, its limits and its cost."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from decmem.errors import UserError
from decmem.memory import DecoupledMemory, Reach, Recall, coding, training_plan
from decmem.memory.packing import Packing, spread
from decmem.model import ModelConfig, WorldModel, block, initialise
from decmem.model.block import Block

LATENTS = 8
ENDLESS = Reach(window=None, own_candidates=True)


@torch.no_grad()
def velocity(model: WorldModel, clip: tuple, chunk: int = 2, **changes: Tensor) -> Tensor:
    conditions = dataclasses.replace(clip.conditions, **changes)
    x, t = clip.sequence()
    plan = training_plan(model.config.reading.reach, x.shape[1] // 2, chunk)
    return model(x, t, model.context(conditions, streams=2), plan)


def test_batch_company_changes_nothing(small: ModelConfig, awake, clip) -> None:
    model, data = awake(small), clip(small, LATENTS, batch=3)
    together = velocity(model, data)
    for b in range(3):
        own = slice(b, b + 1)
        steering = data.conditions
        alone = data._replace(
            clean=data.clean[own],
            noisy=data.noisy[own],
            t=data.t[own],
            conditions=dataclasses.replace(
                steering,
                actions=steering.actions[own],
                world_to_camera=steering.world_to_camera[own],
                lens=steering.lens[own],
            ),
        )
        torch.testing.assert_close(velocity(model, alone), together[own], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("degrees", [0, 73])
@pytest.mark.parametrize("rays", [True, False], ids=["rays", "no-rays"])
def test_moving_and_turning_the_world_changes_nothing(
    rays: bool, degrees: int, small: ModelConfig, awake, clip
) -> None:
    # Surfaces are compared along the world's axes: with them only moves leave all as it is.
    width, position = small.width, small.position
    if degrees:
        width = small.heads * (position.head_dim - position.surface)
        position = dataclasses.replace(position, surface=0)
    config = dataclasses.replace(small, rays=rays, width=width, position=position)
    model, data = awake(config), clip(small, LATENTS)
    cameras = data.conditions.world_to_camera
    turn = math.radians(degrees)
    frame = torch.tensor(
        [
            [math.cos(turn), 0, math.sin(turn), 40.0],
            [0, 1, 0, -3.0],
            [-math.sin(turn), 0, math.cos(turn), 70.0],
            [0, 0, 0, 1],
        ],
        dtype=torch.float64,
    )
    before = velocity(model, data)
    moved = velocity(model, data, world_to_camera=cameras @ frame)
    torch.testing.assert_close(moved, before, atol=1e-4, rtol=1e-4)
    # Moving one latent's cameras alone does change what is seen.
    other = cameras.clone()
    other[:, 3] = cameras[:, 3] @ frame
    assert (velocity(model, data, world_to_camera=other) - before).abs().max() > 1e-2


def test_a_common_shift_of_time_changes_nothing(small: ModelConfig, awake, clip) -> None:
    model, data = awake(small), clip(small, LATENTS)
    later = velocity(model, data, time=data.conditions.time + 100_000)
    torch.testing.assert_close(later, velocity(model, data), atol=1e-5, rtol=1e-5)


def test_both_memories_reading_everything_are_dense_attention(
    small: ModelConfig, awake, clip, with_reach
) -> None:
    everything = 2 * LATENTS * small.layout.M
    # Retrieval sees time here, as dense attention does.
    position = dataclasses.replace(small.position, global_time=True)
    config = dataclasses.replace(
        with_reach(small, ENDLESS, retrieved=everything), position=position
    )
    decoupled = awake(config)
    dense = WorldModel(dataclasses.replace(config, memory="dense")).eval()
    state = {k: v for k, v in decoupled.state_dict().items() if ".gate." not in k}
    dense.load_state_dict(state)
    with torch.no_grad():
        for module in decoupled.modules():
            if isinstance(module, DecoupledMemory):
                module.gate.weight.zero_()
                module.gate.bias.fill_(200.0)
            if isinstance(module, Block):  # two equal branches: each counts half
                module.spatiotemporal.out.weight.mul_(0.5)
    data = clip(config, LATENTS)
    expected = velocity(dense, data)
    torch.testing.assert_close(velocity(decoupled, data), expected, atol=2e-5, rtol=1e-4)
    fewer = dataclasses.replace(config.reading, retrieved=3)
    sparse = WorldModel(dataclasses.replace(config, reading=fewer)).eval()
    sparse.load_state_dict(decoupled.state_dict())
    assert (velocity(sparse, data) - expected).abs().max() > 1e-2


def test_padding_never_influences_the_output(
    small: ModelConfig, awake, clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(small, size=(48, 80))
    model, data = awake(config), clip(config, LATENTS)
    assert config.layout.valid is not None
    padding = ~config.layout.valid.flatten()[:, None]
    before = velocity(model, data)

    def soiled(x: Tensor, packing: Packing, dim: int) -> Tensor:
        return torch.where(padding, 30.0, spread(x, packing, dim))

    for module in (coding, block):
        monkeypatch.setattr(module, "spread", soiled)
    assert torch.equal(velocity(model, data), before)


def test_actions_steer_and_can_be_dropped(small: ModelConfig, awake, clip) -> None:
    model, data = awake(small), clip(small, LATENTS)
    x, t = data.sequence()
    plan = training_plan(small.reading.reach, LATENTS, 2)

    @torch.no_grad()
    def steered(scale: float, heard: list[bool]) -> Tensor:
        conditions = dataclasses.replace(data.conditions, actions=data.conditions.actions * scale)
        return model(x, t, model.context(conditions, None, torch.tensor(heard), streams=2), plan)

    one, other = steered(1.0, [True, False]), steered(3.0, [True, False])
    assert (one[0] - other[0]).abs().max() > 1e-2
    assert torch.equal(one[1], other[1])
    assert torch.equal(one[0], steered(1.0, [True, True])[0])
    # Dropped is not the same as standing still.
    assert (steered(0.0, [True, True])[1] - one[1]).abs().max() > 1e-3


def test_every_input_and_parameter_matters(small: ModelConfig, awake, clip) -> None:
    model, data = awake(small), clip(small, LATENTS)
    x, t = data.sequence()
    plan = training_plan(small.reading.reach, LATENTS, 2)
    out = model(x, t, model.context(data.conditions, streams=2), plan)
    out.square().sum().backward()
    idle = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert idle == []


def test_recomputing_blocks_changes_no_gradient(
    small: ModelConfig, awake, clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = awake(small), clip(small, 4)
    x, t = data.sequence()
    grads, calls = [], []
    forward = Block.forward

    def counted(self: Block, *args: object) -> object:
        calls.append(self)
        return forward(self, *args)

    monkeypatch.setattr(Block, "forward", counted)
    for recompute in (False, True):
        model.recompute = recompute
        calls.clear()
        plan = training_plan(small.reading.reach, 4, 2)
        context = model.context(data.conditions, streams=2)
        loss = model(x, t, context, plan).square().sum()
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
        assert len(calls) == small.layers * (1 + recompute)
    for kept, again in zip(*grads, strict=True):
        assert torch.equal(kept, again)


def test_a_fresh_model_is_silent_and_its_gates_half_open(small: ModelConfig, clip) -> None:
    model = WorldModel(small)
    initialise(model)
    assert not velocity(model, clip(small, LATENTS)).any()
    for module in model.modules():
        if isinstance(module, DecoupledMemory):
            assert not module.gate.weight.any()
            assert not module.gate.bias.any()


def test_initialisation_depends_on_the_seed_alone(small: ModelConfig) -> None:
    one, same, other = (WorldModel(small) for _ in range(3))
    for model, seed in ((one, 3), (same, 3), (other, 4)):
        initialise(model, seed)
    states = [model.state_dict() for model in (one, same, other)]
    assert all(torch.equal(a, states[1][name]) for name, a in states[0].items())
    assert not torch.equal(states[0]["patchify.weight"], states[2]["patchify.weight"])


def test_half_precision_activations_give_fp32_velocities(small: ModelConfig, awake, clip) -> None:
    model, data = awake(small), clip(small, LATENTS)
    exact = velocity(model, data)
    halved = data._replace(clean=data.clean.bfloat16(), noisy=data.noisy.bfloat16())
    rough = velocity(model, halved)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).square().mean().sqrt() < 0.1 * exact.std()


def test_a_reader_may_switch_the_global_memory_off(small: ModelConfig, awake, clip) -> None:
    model, data = awake(small), clip(small, LATENTS)
    x, t = data.sequence()
    plan = training_plan(small.reading.reach, LATENTS, 2)
    with torch.no_grad():
        context = model.context(data.conditions, streams=2)
        off = model(x, t, context, plan, recall=Recall(global_memory=False))
        for module in model.modules():
            if isinstance(module, DecoupledMemory):
                module.gate.weight.zero_()
                module.gate.bias.fill_(-200.0)
        closed = model(x, t, context, plan)
    assert torch.equal(off, closed)


@pytest.mark.parametrize(
    ("changes", "argument"),
    [({"width": 50}, "width"), ({"size": (60, 96)}, "size"), ({"blocks": (5, 3)}, "blocks")],
)
def test_shapes_that_do_not_fit_are_refused(
    changes: dict, argument: str, small: ModelConfig
) -> None:
    with pytest.raises(UserError, match=argument):
        WorldModel(dataclasses.replace(small, **changes))


@torch.no_grad()
def test_weights_held_in_16_bits_give_the_same_velocities(small: ModelConfig, awake, clip) -> None:
    model, data = awake(small), clip(small, 4)
    x, t = data.sequence()
    plan = training_plan(small.reading.reach, 4, 2)

    def velocity() -> Tensor:
        context = model.context(data.conditions, streams=2)
        return model(x.bfloat16(), t, context, plan)

    before = velocity()
    model.hold_weights(torch.bfloat16)
    assert model.blocks[0].ffn.up.weight.dtype == torch.bfloat16
    assert model.head_norm.scale.weight.dtype == torch.float32
    assert torch.equal(velocity(), before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_products_in_8_bits_give_nearby_velocities(
    device: str, small: ModelConfig, awake, clip
) -> None:
    # PyTorch's scaled product asks for multiples of 16.
    position = dataclasses.replace(small.position, camera=12, space=8, time=6)
    config = dataclasses.replace(small, width=64, position=position)
    model, data = awake(config).to(device), clip(config, 4)
    x, t = (part.to(device) for part in data.sequence())
    plan = training_plan(config.reading.reach, 4, 2)

    def velocity() -> Tensor:
        context = model.context(data.conditions.to(device), streams=2)
        return model(x.bfloat16(), t, context, plan)

    model.hold_weights(torch.bfloat16)
    before, parameters = velocity(), sum(p.numel() for p in model.parameters())
    model.hold_weights(torch.bfloat16, torch.float8_e4m3fn)
    after = velocity()
    assert 0 < (after - before).square().mean().sqrt() < 0.2 * before.std()
    block = model.blocks[0]
    assert block.spatial.qkv.weight.dtype == block.ffn.down.weight.dtype == torch.float8_e4m3fn
    assert block.spatiotemporal.memory.gate.weight.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == parameters
    model.hold_weights(torch.bfloat16)
    assert torch.equal(velocity(), after)


def test_products_in_other_formats_are_refused(small: ModelConfig) -> None:
    with pytest.raises(UserError, match="gemm"):
        WorldModel(small).hold_weights(torch.bfloat16, torch.float16)
