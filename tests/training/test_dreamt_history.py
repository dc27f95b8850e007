"""Pasts that the model painted itself: what stays true, what is painted, who asks for them."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decmem.experiment import MemoryTraining
from decmem.flow import FlowConfig
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
