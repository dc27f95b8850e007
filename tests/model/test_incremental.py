"""Training's one parallel pass and the roll-out's passes behind a bank are the same function."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decmem.memory import Bank, Reach, bank_plan, training_plan
from decmem.model import Conditions, ModelConfig, WorldModel
from decmem.model.conditioning import camera_centres

POCKET = Reach(window=2, write_chunk=1)
PAPER = Reach(window=6, window_includes_chunk=True, own_candidates=True)
LATENTS = 8


def parallel(model: WorldModel, clip: tuple, chunk: int) -> Tensor:
    x, t = clip.sequence()
    plan = training_plan(model.config.reading.reach, clip.clean.shape[1], chunk)
    return model(x, t, model.context(clip.conditions, streams=2), plan)


def new_bank(model: WorldModel, conditions: Conditions, room: int = 64) -> Bank:
    return model.new_bank(camera_centres(conditions.cameras[:, 3]), room=room)


def write(model: WorldModel, bank: Bank, clean: Tensor, conditions: Conditions, chunk: int) -> None:
    """The write pass."""
    T = clean.shape[1]
    plan = bank_plan(model.config.reading.reach, bank.length, T, chunk)
    model(clean, torch.zeros(len(clean), T), model.context(conditions, bank), plan, bank)
    bank.commit(conditions.cameras, conditions.lens, conditions.time)


def incremental(model: WorldModel, clip: tuple, chunk: int, written: int, room: int) -> Tensor:
    """Chunk after chunk: denoise behind the bank, then write the clean chunk."""
    bank = new_bank(model, clip.conditions, room)
    reach = model.config.reading.reach
    velocities = []
    for start in range(0, clip.clean.shape[1], chunk):
        part = slice(start, start + chunk)
        steering = clip.conditions[part]
        context = model.context(steering, bank)
        plan = bank_plan(reach, bank.length, chunk, chunk)
        for _ in range(2):  # a second look finds the same history
            velocity = model(clip.noisy[:, part], clip.t[:, part], context, plan, bank)
        velocities.append(velocity)
        write(model, bank, clip.clean[:, part], steering, written)
    return torch.cat(velocities, 1)


CASES = {
    "pocket": (POCKET, {}),
    "paper": (PAPER, {"per_head": True}),
    "write-in-pairs": (Reach(window=3, write_chunk=2), {}),
    "dense": (Reach(window=None), {"memory": "dense"}),
}


def configured(small: ModelConfig, with_reach: Callable[..., ModelConfig], name: str):
    reach, settings = CASES[name]
    per_head = settings.get("per_head", False)
    config = with_reach(small, reach, per_head=per_head)
    if name == "paper":
        position = dataclasses.replace(config.position, reach=0.0, global_time=True)
        config = dataclasses.replace(config, position=position, rays=False, patch_position=False)
    return dataclasses.replace(config, memory=settings.get("memory", "decoupled"))


@pytest.mark.parametrize(
    ("name", "chunk"),
    [
        ("pocket", 1),
        ("pocket", 2),
        ("pocket", 4),
        ("paper", 1),
        ("paper", 2),
        ("paper", 4),
        ("write-in-pairs", 4),
        ("dense", 2),
    ],
)
@torch.no_grad()
def test_bank_equals_parallel_pass(
    name: str, chunk: int, small: ModelConfig, awake, clip, with_reach
) -> None:
    config = configured(small, with_reach, name)
    model, data = awake(config), clip(config, LATENTS)
    expected = parallel(model, data, chunk)
    assert expected.std() > 0.1
    written = config.reading.reach.write_chunk or chunk
    # Little room at first, so that the arena grows on the way.
    got = incremental(model, data, chunk, written, room=2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_ragged_layouts_too(small: ModelConfig, awake, clip) -> None:
    config = dataclasses.replace(small, size=(48, 80))
    assert config.layout.valid is not None
    model, data = awake(config), clip(config, LATENTS)
    got = incremental(model, data, 2, 1, room=64)
    torch.testing.assert_close(got, parallel(model, data, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["pocket", "paper"])
@torch.no_grad()
def test_prefill_in_one_pass_equals_chunk_after_chunk(
    name: str, small: ModelConfig, awake, clip, with_reach
) -> None:
    config = configured(small, with_reach, name)
    model, data = awake(config), clip(config, LATENTS)
    chunk = config.reading.reach.write_chunk or 4
    whole, pieces = (new_bank(model, data.conditions) for _ in range(2))
    write(model, whole, data.clean, data.conditions, chunk)
    for start in range(0, LATENTS, 4):
        part = slice(start, start + 4)
        write(model, pieces, data.clean[:, part], data.conditions[part], chunk)
    assert whole.length == pieces.length == LATENTS
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        for name_ in ("keys", "values"):
            a, b = (getattr(x, name_)[:, :, :LATENTS] for x in (one, other))
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        M = config.layout.M
        a, b = (x.pooled[:, :, : LATENTS * M] for x in (one, other))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_uninitialised_room_is_never_read(small: ModelConfig, awake, clip) -> None:
    model, data = awake(small), clip(small, LATENTS)
    bank = new_bank(model, data.conditions)
    for layer in bank.layers:
        for arena in (layer.keys, layer.values, layer.pooled):
            arena.fill_(float("nan"))
    write(model, bank, data.clean[:, :4], data.conditions[:4], 1)
    steering = data.conditions[4:]
    plan = bank_plan(small.reading.reach, 4, 4, 4)
    velocity = model(data.noisy[:, 4:], data.t[:, 4:], model.context(steering, bank), plan, bank)
    assert velocity.isfinite().all()


@torch.no_grad()
def test_rebasing_changes_no_velocity(small: ModelConfig, awake, clip) -> None:
    model, data = awake(small), clip(small, LATENTS)
    bank = new_bank(model, data.conditions)
    write(model, bank, data.clean[:, :4], data.conditions[:4], 1)
    steering, plan = data.conditions[4:], bank_plan(small.reading.reach, 4, 4, 4)

    def velocity() -> Tensor:
        context = model.context(steering, bank)
        return model(data.noisy[:, 4:], data.t[:, 4:], context, plan, bank)

    before = velocity()
    bank.rebase(bank.anchor + torch.tensor([[3.0, -1.0, 2.0], [-4.0, 0.0, 5.0]]))
    torch.testing.assert_close(velocity(), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["pocket", "paper", "dense"])
@torch.no_grad()
def test_a_pass_that_only_writes_leaves_the_same_bank(
    name: str, small: ModelConfig, awake, clip, with_reach
) -> None:
    config = configured(small, with_reach, name)
    model, data = awake(config), clip(config, LATENTS)
    reach, known = config.reading.reach, data.conditions[:4]
    t, ahead = torch.zeros(len(data.clean), 4), data.conditions[4:]
    banks, chunks = [], []
    for writes in (False, True):
        bank = new_bank(model, data.conditions)
        plan = bank_plan(reach, 0, 4, 4, writes)
        out = model(data.clean[:, :4], t, model.context(known, bank), plan, bank)
        assert out.shape[1] == (0 if writes else 4)
        assert out.dtype == torch.float32
        bank.commit(known.cameras, known.lens, known.time)
        banks.append(bank)
        plan = bank_plan(reach, 4, 4, 4)
        context = model.context(ahead, bank)
        chunks.append(model(data.noisy[:, 4:], data.t[:, 4:], context, plan, bank))
    for whole, short in zip(*(bank.layers for bank in banks), strict=True):
        for part, per_latent in (("keys", 1), ("values", 1), ("pooled", config.layout.M)):
            stored = (getattr(layer, part)[:, :, : 4 * per_latent] for layer in (whole, short))
            assert torch.equal(*stored)
    assert torch.equal(*chunks)


@torch.no_grad()
def test_a_pass_that_only_writes_reads_nothing_in_the_last_layer(
    small: ModelConfig, awake, clip
) -> None:
    model, data = awake(small), clip(small, 4)
    model.blocks[-1].ffn.register_forward_hook(lambda *_: pytest.fail("the last feed-forward ran"))
    model.head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    bank = new_bank(model, data.conditions)
    context, t = model.context(data.conditions, bank), torch.zeros(2, 4)
    model(data.clean, t, context, bank_plan(small.reading.reach, 0, 4, 4, writes=True), bank)
