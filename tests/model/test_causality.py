"""Who depends on whom, asked of the gradient: chunks, branches, the clean and the noisy stream."""

import dataclasses

import pytest
import torch
from torch import Tensor

from decmem.memory import Reach, Recall, training_plan
from decmem.model import ModelConfig, WorldModel

LATENTS = 12
PAPER = Reach(window=6, window_includes_chunk=True, own_candidates=True)
POCKET = Reach(window=2, write_chunk=1)
REACHES = {"pocket": POCKET, "paper": PAPER, "dense": Reach(window=None)}


def influence(
    model: WorldModel, clip: tuple, chunk: int, latents: slice, recall: Recall = Recall()
) -> tuple[Tensor, Tensor]:
    """Largest gradient of these latents' velocity at each clean and each noisy input latent."""
    x, t = clip.sequence()
    x = x.requires_grad_()
    context = model.context(clip.conditions, streams=2)
    plan = training_plan(model.config.reading.reach, LATENTS, chunk)
    velocity = model(x, t, context, plan, recall=recall)[:, latents]
    (grad,) = torch.autograd.grad(velocity.square().sum(), x)
    clean, noisy = grad.abs().amax((0, 2, 3, 4)).chunk(2)
    return clean, noisy


@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
@pytest.mark.parametrize("memory", ["decoupled", "window"])
def test_a_chunk_sees_itself_noisy_and_the_past_clean(
    chunk: int, reach: Reach, memory: str, small: ModelConfig, awake, clip, with_reach
) -> None:
    config = dataclasses.replace(with_reach(small, reach, retrieved=200), memory=memory)
    model, data = awake(config), clip(small, LATENTS, batch=1)
    own = slice(4, 4 + chunk)
    clean, noisy = influence(model, data, chunk, own)
    assert not clean[4:].any(), "its own clean version, or a later latent"
    assert not noisy[:4].any()
    assert not noisy[4 + chunk :].any()
    assert (noisy[own] > 0).all()
    assert (clean[2:4] > 0).all()
    # The clean stream has its own causality: its chunks feed no earlier one.
    if memory == "decoupled" or reach.window is None:
        assert (clean[:2] > 0).all()


@pytest.mark.parametrize(
    ("reach", "seen"), [(POCKET, slice(6, 8)), (PAPER, slice(6, 8))], ids=["pocket", "paper"]
)
def test_branches_reach_as_far_as_they_should(
    reach: Reach, seen: slice, small: ModelConfig, awake, clip, with_reach
) -> None:
    # One layer: what two layers pass on would reach twice as far.
    config = dataclasses.replace(with_reach(small, reach, retrieved=200), layers=1)
    model, data = awake(config), clip(small, LATENTS, batch=1)
    last = slice(8, 12)
    local, own = influence(model, data, 4, last, Recall(global_memory=False))
    inside = torch.zeros(LATENTS, dtype=torch.bool)
    inside[seen] = True
    assert torch.equal(local > 0, inside), "the local branch sees its window and nothing else"
    assert torch.equal(own > 0, torch.arange(LATENTS) >= 8)
    far, _ = influence(model, data, 4, last)
    assert torch.equal(far > 0, torch.arange(LATENTS) < 8), "the global branch reaches everything"


def test_few_blocks_means_few_latents(small: ModelConfig, awake, clip) -> None:
    config = dataclasses.replace(small, layers=1)
    model, data = awake(config), clip(small, LATENTS, batch=1)
    clean, _ = influence(model, data, 1, slice(11, 12))
    unread = (clean[:9] == 0).sum()
    # Six blocks of queries with five slots each could reach all; they share favourites.
    assert 0 < unread < 9


def test_a_later_latents_steering_changes_nothing_before(small: ModelConfig, awake, clip) -> None:
    model, data = awake(small), clip(small, LATENTS)
    plan = training_plan(small.reading.reach, LATENTS, 4)
    x, t = data.sequence()

    def velocity(conditions) -> Tensor:
        with torch.no_grad():
            return model(x, t, model.context(conditions, streams=2), plan)

    before = velocity(data.conditions)
    actions, cameras = data.conditions.actions.clone(), data.conditions.world_to_camera.clone()
    actions[:, 8:] += 1.0
    cameras[:, 8:] = cameras[:, :4]
    steered = velocity(dataclasses.replace(data.conditions, actions=actions))
    assert torch.equal(steered[:, :8], before[:, :8])
    assert (steered[:, 8:] - before[:, 8:]).abs().amax((0, 2, 3, 4)).min() > 1e-3
    moved = velocity(dataclasses.replace(data.conditions, world_to_camera=cameras))
    assert torch.equal(moved[:, :8], before[:, :8])
    assert (moved[:, 8:] - before[:, 8:]).abs().amax((0, 2, 3, 4)).min() > 1e-3
