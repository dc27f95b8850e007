"""What the codec is trained on, and how its errors count."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from decmem.experiment import CodecTraining
from decmem.training.codec_task import CodecTask, halved, reconstruction_loss
from decmem.training.trainer import Task


@pytest.fixture
def codec_task(task: Callable[[str], Task]) -> CodecTask:
    made = task("codec")
    assert isinstance(made, CodecTask)
    return made


def test_clips_are_cut_from_the_walks(codec_task: CodecTask) -> None:
    codec_task.config = dataclasses.replace(codec_task.config, batch=64, lone=0.5)
    groups = codec_task.clips(0)
    N, F, *size = codec_task.frames.shape
    assert groups.shape == (64, 2, 4, *size)
    still = (groups[:, 0, 1:] == groups[:, 0, :-1]).flatten(1).all(1)
    assert 16 < int(still.sum()) < 48, "about half begin with one frame that stands four times"
    frames = codec_task.frames.flatten(2)
    found = set()
    for clip, lone in zip(groups.flatten(1, 2).flatten(2), still.tolist(), strict=True):
        walk, last = next(
            (w, f) for w in range(N) for f in range(7, F) if frames[w, f].equal(clip[7])
        )
        expected = frames[walk, last - 7 : last + 1].clone()
        if lone:
            expected[:3] = expected[3].clone()
        assert clip.equal(expected)
        found.add((walk, last))
    assert found == {(w, f) for w in range(N) for f in range(7, F)}, "every place is drawn"


def test_clips_hang_on_seed_rank_and_step_alone(codec_task: CodecTask) -> None:
    def clips(step: int, seed: int = 0, rank: int = 0) -> bytes:
        codec_task.seed, codec_task.rank = seed, rank
        torch.rand(3)  # what others draw does not matter
        return codec_task.clips(step).numpy().tobytes()

    assert clips(3) == clips(3)
    drawn = {clips(step, seed, rank) for step in (3, 4) for seed in (0, 1) for rank in (0, 1)}
    assert len(drawn) > 5, "a few of so few places may agree"


def test_loss_adds_pixels_and_edges() -> None:
    config = CodecTraining(l1=2.0, mse=3.0, gradient=5.0)
    truth = torch.zeros(1, 12, 2, 3)
    assert reconstruction_loss(truth, truth, config) == 0
    grey = torch.full_like(truth, 0.5)
    assert reconstruction_loss(grey, truth, config) == 2 * 0.5 + 3 * 0.25
    # One column raised by 1: a third of the pixels, edges across on both sides, none down.
    bar = truth.clone()
    bar[..., 1] = 1.0
    expected = 2 / 3 + 3 / 3 + 5 * (0 + 1) / 2
    assert reconstruction_loss(bar, truth, config).item() == pytest.approx(expected)
    assert reconstruction_loss(truth, bar, config).item() == pytest.approx(expected)


def test_psnr_of_the_log_is_that_of_the_frames(
    codec_task: CodecTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A codec that gives back every picture 0.1 brighter: 20 log10(2 / 0.1) dB on [-1, 1].
    given = codec_task.clips(0)
    x = given.movedim(-1, 3).flatten(0, 1).flatten(1, 2).float() / 127.5 - 1
    assert x.max() < 0.9
    monkeypatch.setattr(codec_task.network, "pictures", lambda z, previous: x + 0.1)
    loss, figures = codec_task(0, 0.0)
    config = codec_task.config
    assert figures["psnr"].item() == pytest.approx(20 * math.log10(20), abs=1e-3)
    assert loss.item() == pytest.approx(0.1 * config.l1 + 0.01 * config.mse, rel=1e-3)


def test_the_decoder_meets_noise_and_a_past_that_may_be_missing(
    codec_task: CodecTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec_task.config = dataclasses.replace(codec_task.config, batch=64)
    codec = codec_task.network
    met: list[tuple[torch.Tensor, torch.Tensor]] = []
    pictures = codec.pictures

    def spied(z: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        met.append((z.detach().unflatten(0, (64, 2)), previous.detach().unflatten(0, (64, 2))))
        return pictures(z, previous)

    monkeypatch.setattr(codec, "pictures", spied)
    with torch.no_grad():
        codec_task(0, 0.0)
        x = codec_task.clips(0).movedim(-1, 3).flatten(0, 1).flatten(1, 2).float() / 127.5 - 1
        clean = codec.raw_latents(x).unflatten(0, (64, 2))
    (z, previous), *_ = met
    assert (z - clean).std() == pytest.approx(codec_task.config.noise, rel=0.05)
    assert not previous[:, 0].any(), "nothing comes before a clip"
    missing = ~previous[:, 1].flatten(1).any(1)
    assert 1 <= int(missing.sum()) <= 15, "one in ten"
    assert previous[~missing, 1].equal(z[~missing, 0])


def test_measured_statistics_normalise_the_latents(codec_task: CodecTask) -> None:
    codec = codec_task.network
    codec.mean.fill_(7.0)
    codec_task.measure(clips=32)
    assert not codec.training
    shown = torch.cat([codec_task.clips(-1 - step) for step in range(16)])
    with torch.no_grad():
        x = shown.movedim(-1, 3).flatten(0, 1).flatten(1, 2).float() / 127.5 - 1
        z = codec.encode_groups(x)
    assert z.mean((0, 2, 3)).abs().max() < 1e-3
    assert (z.std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_halved_latents_are_raw_latents_again() -> None:
    z = torch.randn(2, 8, 4, 6)
    z[1] = 0.0
    small = halved(z)
    assert small.shape == (2, 8, 2, 3)
    torch.testing.assert_close(small[0].square().mean(0), torch.ones(2, 3), atol=1e-4, rtol=0)
    assert not small[1].any()
    corner = z[0, :, :2, :2].mean((1, 2))
    torch.testing.assert_close(small[0, :, 0, 0], corner / corner.square().mean().sqrt())


def test_equivariance_asks_halved_latents_for_a_halved_picture(codec_task: CodecTask) -> None:
    plain, _ = codec_task(0, 0.0)
    codec_task.config = dataclasses.replace(codec_task.config, equivariance=2.0)
    twice, _ = codec_task(0, 0.0)
    codec_task.config = dataclasses.replace(codec_task.config, equivariance=1.0)
    once, _ = codec_task(0, 0.0)
    assert once > plain
    torch.testing.assert_close(twice - once, once - plain)
    once.backward()
    grad = next(codec_task.network.encoder.parameters()).grad
    assert grad is not None
    assert grad.abs().sum() > 0
