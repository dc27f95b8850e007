"""Pasts that the model painted itself: what stays true, what is painted, who asks for them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from decmem.experiment import MemoryTraining
from decmem.flow import FlowConfig, shift_time
from decmem.memory import training_plan
from decmem.model import Conditions, WorldModel
from decmem.training import memory_task as module
from decmem.training.dreamt_history import dreamt_history
from decmem.training.latent_cache import LatentCache
from decmem.training.memory_task import MemoryTask, flow_matching_loss

T, CHUNK, CLIPS = 6, 1, 12


def drawn(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model(awake: Callable[[], WorldModel]) -> WorldModel:
    return awake()


@pytest.fixture
def clips(cache: LatentCache) -> tuple[Tensor, Conditions]:
    walk = torch.arange(CLIPS) % cache.latents.shape[0]
    return cache.clips(walk, torch.zeros(CLIPS, dtype=torch.long), T)


def test_true_at_first_and_painted_from_some_chunk_on(
    model: WorldModel, clips: tuple[Tensor, Conditions]
) -> None:
    clean, conditions = clips
    past = dreamt_history(model, clean, conditions, CHUNK, drawn(), torch.float32)
    assert not past.requires_grad
    painted = (past != clean).flatten(2).any(-1)
    assert painted.int().diff(dim=1).min() == 0, "once painted, painted to the end"
    starts = (~painted).sum(1)
    assert starts.min() >= 2, "a quarter of six stays true"
    assert len(starts.unique()) > 2, "every clip begins elsewhere"
    assert past.equal(dreamt_history(model, clean, conditions, CHUNK, drawn(), torch.float32))


def test_painted_in_one_step_behind_a_true_past(
    model: WorldModel, clips: tuple[Tensor, Conditions]
) -> None:
    clean, conditions = clips
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    hook = model.register_forward_hook(lambda _, given, out: seen.append((*given[:2], out)))
    past = dreamt_history(model, clean, conditions, CHUNK, drawn(), torch.float32)
    hook.remove()
    ((latents, times, velocity),) = seen
    history, noisy = latents.split(T, dim=1)
    still, t = times.split(T, dim=1)
    assert history.equal(clean)
    assert not still.any()
    assert t.min() >= 0.5
    one_step = noisy - t[:, :, None, None, None] * velocity
    painted = past != clean
    torch.testing.assert_close(past[painted], one_step[painted])


def by_hand(
    model: WorldModel, clips: tuple[Tensor, Conditions], generations: int, shift: float
) -> tuple[Tensor, Tensor]:
    """Every generation as a loop over chunks would have it, and which latents are painted."""
    clean, conditions = clips
    draw = drawn()
    first = torch.rand(CLIPS, 1, generator=draw) * 0.75 + 0.25
    painted = torch.arange(T // CHUNK) >= first * (T // CHUNK)
    t = 0.5 + 0.5 * torch.rand(CLIPS, T // CHUNK, generator=draw)
    t = shift * t / (1 + (shift - 1) * t)
    t, painted = (x.repeat_interleave(CHUNK, 1) for x in (t, painted))
    at = t[:, :, None, None, None]
    noise = torch.randn(clean.shape, generator=draw)
    plan = training_plan(model.config.reading.reach, T, CHUNK)
    context = model.context(conditions, streams=2)
    past = clean
    for _ in range(generations):
        noisy = (1 - at) * past + at * noise
        with torch.no_grad():
            velocity = model(torch.cat((past, noisy), 1), torch.cat((0 * t, t), 1), context, plan)
        past = past.clone()
        past[painted] = (noisy - at * velocity)[painted]
    return past, painted


@pytest.mark.parametrize(("generations", "shift"), [(1, 1.0), (1, 16.0), (3, 1.0), (4, 16.0)])
def test_generations_are_passes_behind_one_another(
    generations: int, shift: float, model: WorldModel, clips: tuple[Tensor, Conditions]
) -> None:
    clean, conditions = clips
    past = dreamt_history(
        model, clean, conditions, CHUNK, drawn(), torch.float32, generations, shift
    )
    expected, painted = by_hand(model, clips, generations, shift)
    torch.testing.assert_close(past, expected)
    assert past[~painted].equal(clean[~painted])
    again = dreamt_history(
        model, clean, conditions, CHUNK, drawn(), torch.float32, generations, shift
    )
    assert past.equal(again)
    once = dreamt_history(model, clean, conditions, CHUNK, drawn(), torch.float32, 1, shift)
    assert past.equal(once) == (generations == 1)


def test_one_generation_is_what_it_always_was(
    model: WorldModel, clips: tuple[Tensor, Conditions]
) -> None:
    """Times are bit for bit those without a shift, and the generator is left where it was."""
    clean, conditions = clips
    draw = drawn()
    past = dreamt_history(model, clean, conditions, CHUNK, draw, torch.float32)
    after = torch.rand((), generator=draw)
    other = drawn()
    again = dreamt_history(model, clean, conditions, CHUNK, other, torch.float32, 3, 16.0)
    assert torch.rand((), generator=other) == after, "generations draw nothing"
    assert not past.equal(again)
    t = torch.rand(99)
    assert shift_time(t, 1.0).equal(t)


def test_later_generations_stand_behind_dreams(
    model: WorldModel, clips: tuple[Tensor, Conditions]
) -> None:
    """A slip of the first generation is seen by the second, and by those behind it alone."""
    clean, conditions = clips
    passes: list[int] = []

    def slip(_: object, given: tuple[Tensor], velocity: Tensor) -> Tensor:
        passes.append(len(passes))
        return velocity + spoilt if len(passes) == 1 else velocity

    def dreamt(generations: int) -> Tensor:
        passes.clear()
        how = (CHUNK, drawn(), torch.float32, generations)
        return dreamt_history(model, clean, conditions, *how)

    once, twice = dreamt(1), dreamt(2)
    place = 4
    chosen = (once != clean).flatten(2).any(-1)[:, place]
    assert chosen.any()
    assert not chosen.all(), "some clips are still true there"
    spoilt = torch.zeros_like(clean)
    spoilt[:, place] = 1.0
    hook = model.register_forward_hook(slip)
    slipped_once, slipped_twice = dreamt(1), dreamt(2)
    hook.remove()
    assert slipped_once[:, place + 1 :].equal(once[:, place + 1 :]), "behind truth as before"
    assert slipped_twice[:, :place].equal(twice[:, :place]), "nothing sees what comes later"
    moved = (slipped_twice != twice).flatten(2).any(-1)[:, place + 1]
    assert moved.equal(chosen)


def test_a_painted_past_is_shown_and_the_truth_is_learned(
    model: WorldModel, clips: tuple[Tensor, Conditions], training: MemoryTraining
) -> None:
    clean, conditions = clips
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    how = dataclasses.replace(training, history_noised=0.0)
    past = clean + 1.0

    def passed(past: Tensor | None) -> Tensor:
        return flow_matching_loss(
            model, FlowConfig(), how, clean, conditions, CHUNK, drawn(), torch.float32, None, past
        ).velocity

    shown, plain = passed(past), passed(None)
    hook.remove()
    assert seen[0][:, :T].equal(past)
    assert seen[0][:, T:].equal(seen[1][:, T:]), "what is to be denoised is the truth with noise"
    assert shown.shape == plain.shape
    assert not shown.equal(plain)


@pytest.mark.parametrize(("share", "progress", "expected"), [(1, 0.9, 4), (1, 0.1, 0), (0, 0.9, 0)])
def test_asked_for_once_clips_are_whole(
    share: float,
    progress: float,
    expected: int,
    model: WorldModel,
    cache: LatentCache,
    training: MemoryTraining,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Tensor] = []

    def spied(model: WorldModel, clean: Tensor, *rest: object) -> Tensor:
        asked.append(clean)
        return clean + 1.0

    monkeypatch.setattr(module, "dreamt_history", spied)
    how = dataclasses.replace(training, history_dreamt=float(share))
    task = MemoryTask(model, cache, how, FlowConfig(), seed=0, rank=0)
    losses = [task(step, progress)[0] for step in range(4)]
    assert len(asked) == expected
    plain = MemoryTask(model, cache, training, FlowConfig(), seed=0, rank=0)
    same = [bool(plain(step, progress)[0] == loss) for step, loss in enumerate(losses)]
    assert same == [expected == 0] * 4


def test_generations_are_drawn_anew_for_every_step(
    model: WorldModel, cache: LatentCache, training: MemoryTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, float]] = []

    def spied(model: WorldModel, clean: Tensor, *rest: Any) -> Tensor:
        asked.append(rest[-2:])
        return clean + 1.0

    monkeypatch.setattr(module, "dreamt_history", spied)

    def losses(most: int) -> list[Tensor]:
        how = dataclasses.replace(
            training, history_dreamt=1.0, history_generations=most, history_shift=16.0
        )
        task = MemoryTask(model, cache, how, FlowConfig(), seed=0, rank=0)
        return [task(step, 0.9)[0] for step in range(20)]

    several, drawn_first = losses(3), list(asked)
    assert {shift for _, shift in asked} == {16.0}
    assert {generations for generations, _ in asked} == {1, 2, 3}
    asked.clear()
    assert losses(3) == several
    assert asked == drawn_first, "a step draws the same whenever it is taken"
    asked.clear()
    # What is painted once is all that hangs on the number: nothing else of a step is drawn anew.
    assert losses(1) == several
    assert {generations for generations, _ in asked} == {1}
