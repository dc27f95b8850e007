"""The flow-matching loss of [clean | noisy ...]: what it may depend on, asked of the gradient."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from decmem.codec import Autoencoder
from decmem.experiment import MemoryTraining
from decmem.flow import FlowConfig
from decmem.model import Conditions, WorldModel, initialise
from decmem.training import memory_task as module
from decmem.training.latent_cache import LatentCache
from decmem.training.memory_task import Losses, MemoryTask, flow_matching_loss
from decmem.training.trainer import Task

T, CHUNK, STREAMS = 6, 2, 2
CHUNKS = T // CHUNK


class Pass(NamedTuple):
    """A loss, the model's input it was made from, and the times the model was told."""

    loss: Tensor
    latents: Tensor
    times: Tensor


@pytest.fixture(scope="module")
def model(awake: Callable[[], WorldModel]) -> WorldModel:
    # Enough slots to retrieve everything that may be retrieved.
    made = awake()
    reading = dataclasses.replace(made.config.reading, retrieved=200)
    config = dataclasses.replace(made.config, reading=reading)
    all_seeing = WorldModel(config)
    all_seeing.load_state_dict(made.state_dict())
    return all_seeing.requires_grad_(False)


@pytest.fixture
def clip(cache: LatentCache) -> tuple[Tensor, Conditions]:
    return cache.clips(torch.tensor([0, 2]), torch.tensor([0, 0]), T)


@pytest.fixture
def passed(
    model: WorldModel, clip: tuple[Tensor, Conditions], training: MemoryTraining
) -> Callable[..., Pass]:
    """Runs the loss; the model's input becomes a leaf, so that paths outside of it do not count."""

    def run(
        changed: dict[str, float] | None = None,
        clean: Tensor | None = None,
        conditions: Conditions | None = None,
        seed: int = 5,
    ) -> Pass:
        found: list[Tensor] = []

        def as_leaf(module: WorldModel, given: tuple) -> tuple:
            found.extend((given[0].detach().requires_grad_(), given[1]))
            return (found[0], *given[1:])

        hook = model.register_forward_pre_hook(as_leaf)
        try:
            loss = flow_matching_loss(
                model,
                FlowConfig(),
                dataclasses.replace(training, noisy_streams=STREAMS, **(changed or {})),
                clip[0] if clean is None else clean,
                clip[1] if conditions is None else conditions,
                CHUNK,
                torch.Generator().manual_seed(seed),
                torch.float32,
            ).velocity
        finally:
            hook.remove()
        return Pass(loss, *found)

    return run


@pytest.mark.parametrize("stream", range(STREAMS))
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_chunk_learns_from_the_clean_past_and_its_own_noise(
    chunk: int, stream: int, passed: Callable[..., Pass]
) -> None:
    run = passed()
    (grad,) = torch.autograd.grad(run.loss[0, stream, chunk], run.latents)
    assert not grad[1].any(), "another clip of the batch"
    seen = grad[0].abs().amax((1, 2, 3)).unflatten(0, (1 + STREAMS, T)) > 0
    expected = torch.zeros(1 + STREAMS, T, dtype=torch.bool)
    own = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
    expected[0, : own.start] = True  # the past is clean; its own clean version is not shown
    expected[1 + stream, own] = True
    assert seen.tolist() == expected.tolist()


def test_a_loss_moves_with_later_latents_not_at_all(
    passed: Callable[..., Pass], clip: tuple[Tensor, Conditions]
) -> None:
    before = passed().loss
    clean = clip[0].clone()
    clean[:, 4:] += 1.0
    after = passed(clean=clean).loss
    assert after[:, :, :2].equal(before[:, :, :2])
    assert (after[:, :, 2] - before[:, :, 2]).abs().min() > 1e-4


def test_streams_share_the_past_and_nothing_else(
    passed: Callable[..., Pass], clip: tuple[Tensor, Conditions]
) -> None:
    run = passed({"history_noised": 0.0})
    history, first, second = run.latents.detach().chunk(1 + STREAMS, dim=1)
    told, one, two = run.times.chunk(1 + STREAMS, dim=1)
    assert history.equal(clip[0])
    assert not told.any()
    # One time for a chunk; every chunk and stream has its own.
    for times in (one, two):
        assert times.unflatten(1, (CHUNKS, CHUNK)).std(-1).max() == 0
    drawn = torch.cat((one[:, ::CHUNK], two[:, ::CHUNK])).flatten()
    assert len(drawn.unique()) == 2 * STREAMS * CHUNKS
    # z_t = (1 - t) z_0 + t eps: with the clean latents known, the noise can be told from it.
    for noisy, t in ((first, one), (second, two)):
        t = t[:, :, None, None, None]
        noise = (noisy - (1 - t) * clip[0]) / t
        assert abs(noise.mean()) < 0.1
        assert noise.std() == pytest.approx(1, abs=0.1)
    assert (first - second).abs().amax((2, 3, 4)).min() > 0.1


def test_the_loss_is_the_error_of_the_velocity(
    passed: Callable[..., Pass], clip: tuple[Tensor, Conditions], model: WorldModel
) -> None:
    velocity: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, given, out: velocity.append(out))
    run = passed()
    hook.remove()
    _, noisy = run.latents.detach().split([T, STREAMS * T], dim=1)
    t = run.times[:, T:, None, None, None]
    data = clip[0].repeat(1, STREAMS, 1, 1, 1)
    noise = (noisy - (1 - t) * data) / t
    error = (velocity[0] - (noise - data)).square()
    for stream in range(STREAMS):
        for chunk in range(CHUNKS):
            start = stream * T + chunk * CHUNK
            expected = error[:, start : start + CHUNK].mean((1, 2, 3, 4))
            # Dividing by t costs digits.
            torch.testing.assert_close(run.loss[:, stream, chunk], expected, rtol=1e-3, atol=0)


def test_history_is_disturbed_a_little_and_told_as_clean(
    passed: Callable[..., Pass], clip: tuple[Tensor, Conditions]
) -> None:
    run = passed({"history_noised": 1.0, "history_noise": 0.3})
    history = run.latents[:, :T].detach()
    assert not run.times[:, :T].any()
    # (1 - level) z + level eps, one level a chunk: the part along z tells the level.
    z = clip[0].unflatten(1, (CHUNKS, CHUNK))
    apart = (history.unflatten(1, (CHUNKS, CHUNK)) - z).flatten(2)
    size = apart.norm(dim=2) / (1 + z.flatten(2).square().mean(2)).sqrt() / apart.shape[2] ** 0.5
    assert size.min() > 0
    assert size.max() < 0.33
    assert size.std() > 0.02, "every chunk has its own level"
    still = passed({"history_noised": 0.0, "history_noise": 0.3})
    assert still.latents[:, :T].equal(clip[0])


def test_dropped_actions_do_not_steer(
    passed: Callable[..., Pass], clip: tuple[Tensor, Conditions]
) -> None:
    conditions = clip[1]
    other = dataclasses.replace(conditions, actions=conditions.actions + 0.5)
    moved = dataclasses.replace(
        conditions, world_to_camera=conditions.world_to_camera.flip(1).contiguous()
    )

    def felt(drop: float, conditions: Conditions, seed: int) -> list[bool]:
        """Which clips' losses change with these conditions."""
        changed = {"drop_actions": drop}
        one, two = passed(changed, seed=seed).loss, passed(changed, None, conditions, seed).loss
        return (one - two).abs().amax((1, 2)).gt(1e-6).tolist()

    assert felt(0.0, other, 0) == [True, True]
    assert felt(1.0, other, 0) == [False, False]
    assert felt(1.0, moved, 0) == [True, True], "cameras stay"
    # Each clip draws its own lot.
    lots = [felt(0.5, other, seed) for seed in range(6)]
    assert [True, False] in lots or [False, True] in lots


@pytest.fixture
def memory_task(task: Callable[[str], Task]) -> MemoryTask:
    made = task("memory")
    assert isinstance(made, MemoryTask)
    return made


def test_short_clips_first_and_more_of_them(
    memory_task: MemoryTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    clips = memory_task.cache.clips

    def spied(walk: Tensor, start: Tensor, length: int) -> tuple[Tensor, Conditions]:
        asked.append((len(walk), length))
        assert (start >= 0).all()
        assert (start + length <= T).all()
        return clips(walk, start, length)

    monkeypatch.setattr(memory_task.cache, "clips", spied)
    with torch.no_grad():
        for progress in (0.0, 0.49, 0.5, 0.9):
            memory_task(7, progress)
    assert asked == [(3, 4), (3, 4), (2, 6), (2, 6)]


def test_batches_hang_on_seed_rank_and_step_alone(
    memory_task: MemoryTask,
    cache: LatentCache,
    training: MemoryTraining,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Tensor] = []

    def spied(
        model: WorldModel, times: FlowConfig, how: MemoryTraining, clean: Tensor, *rest: object
    ) -> Losses:
        noise = next(x for x in rest if isinstance(x, torch.Generator))
        drawn.extend((clean, torch.randn(3, generator=noise)))
        return Losses(torch.zeros(len(clean), STREAMS, 3))

    monkeypatch.setattr(module, "flow_matching_loss", spied)

    def batches(seed: int, rank: int, first: int) -> tuple[bytes, bytes]:
        """Clips and noise of a few steps."""
        made = MemoryTask(memory_task.network, cache, training, FlowConfig(), seed, rank)
        drawn.clear()
        for step in range(first, first + 4):
            torch.rand(3)  # what others draw does not matter
            made(step, 0.0)
        clips, noise = torch.cat(drawn[::2]), torch.cat(drawn[1::2])
        return clips.numpy().tobytes(), noise.numpy().tobytes()

    assert batches(0, 0, 3) == batches(0, 0, 3)
    others = [batches(0, 0, 3), batches(1, 0, 3), batches(0, 1, 3), batches(0, 0, 40)]
    for kind in (0, 1):
        assert len({batch[kind] for batch in others}) == 4


def test_all_chunk_sizes_are_trained(
    memory_task: MemoryTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    figures = {1: torch.arange(6.0), 2: torch.arange(3.0)}

    def spied(model: WorldModel, *rest: object) -> Losses:
        sizes.append(next(x for x in rest if isinstance(x, int)))
        return Losses(figures[sizes[-1]].expand(2, STREAMS, -1))

    monkeypatch.setattr(module, "flow_matching_loss", spied)
    told = [memory_task(step, 0.9) for step in range(500)]
    # Drawn by their size: 2 twice as often as 1.
    assert 0.6 < sizes.count(2) / 500 < 0.73
    # The first and the last quarter of the chunks, at least one.
    for size, (loss, shown) in zip(sizes, told, strict=True):
        last = len(figures[size]) - 1
        assert (loss, shown["early"], shown["late"]) == (last / 2, 0, last)


def test_depth_is_learned_where_it_is_weighed(
    codec: Autoencoder, training: MemoryTraining, awake: Callable[[], WorldModel]
) -> None:
    """The misfit of what the surface group assumes is added, and falls when only it is followed."""
    config = awake().config
    position = dataclasses.replace(config.position, surface=6)
    model = WorldModel(dataclasses.replace(config, width=52, position=position))
    initialise(model)
    grid = config.layout.grid
    cache = LatentCache(codec, 3, 6, config.size, torch.device("cpu"), 0, grid)
    weighed = dataclasses.replace(training, depth_weight=0.5)
    task = MemoryTask(model, cache, weighed, FlowConfig(), seed=0, rank=0)
    loss, figures = task(3, 0.9)
    plain, bare = MemoryTask(model, cache, training, FlowConfig(), 0, 0)(3, 0.9)
    assert "depth_error" not in bare
    assert figures["velocity"] == plain
    assert loss != plain
    readouts = [p for name, p in model.named_parameters() if "readout" in name]
    assert len(readouts) == 4
    optimiser = torch.optim.Adam(readouts, 0.03)
    first = float(figures["depth_error"])
    for _ in range(60):
        optimiser.zero_grad()
        loss, figures = task(3, 0.9)
        loss.backward()
        optimiser.step()
    assert float(figures["depth_error"]) < 0.7 * first
