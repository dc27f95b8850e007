"""Walks and latents to train on: always the same ones, never held-out ones, and coded rightly."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from decmem.codec import Autoencoder
from decmem.errors import UserError
from decmem.model.conditioning import camera_centres, conditions_of_frames
from decmem.training import latent_cache, walk_cache
from decmem.training.latent_cache import LatentCache, log_depths
from decmem.training.walk_cache import WALKS_PER_WORLD, WalkBatch, rendered_walks
from decmem.world.actions import action_values
from decmem.world.episode import Episode, render_episode
from decmem.world.generation import build_world
from decmem.world.training_walk import train_walks
from decmem.world.version import HELD_OUT_SEED_BASE

CPU = torch.device("cpu")
SIZE = (32, 48)
FRAMES = 21  # the walks of the cache, and the first world's first
HELD_WALK = WALKS_PER_WORLD * HELD_OUT_SEED_BASE


def walks(first: int, count: int, frames: int = 9) -> list[WalkBatch]:
    return list(rendered_walks(first, count, frames, SIZE, CPU))


@pytest.fixture(scope="module")
def twelve() -> WalkBatch:
    """Walks 4 to 15: the end of one world and the whole next."""
    (batch,) = walks(4, 12)
    return batch


def test_a_walk_is_the_same_in_any_company(
    twelve: WalkBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk_cache, "_WORLDS_AT_ONCE", 1)
    several = walks(6, 9)
    assert [len(batch.frames) for batch in several] == [8, 1]
    for name in ("frames", "world_to_camera", "actions"):
        parts = np.concatenate([np.asarray(getattr(batch, name)) for batch in several])
        np.testing.assert_array_equal(parts, np.asarray(getattr(twelve, name))[2:11])


def test_walks_differ_and_ranks_are_disjoint(
    twelve: WalkBatch, codec: Autoencoder, cache: LatentCache
) -> None:
    frames = twelve.frames[:, -1].flatten(1)
    assert len(torch.unique(frames, dim=0)) == 12
    # Rank 1 goes on where rank 0 ends: walk 3 of three each is walk 3 of four.
    second = LatentCache(codec, 3, 6, SIZE, CPU, rank=1)
    whole = LatentCache(codec, 4, 6, SIZE, CPU, rank=0)
    assert torch.equal(whole.latents[:3], cache.latents)
    assert torch.equal(whole.latents[3], second.latents[0])
    assert torch.equal(whole.actions[3], second.actions[0])
    assert not torch.equal(whole.latents[0], second.latents[0])


def test_the_first_walk_of_a_world_is_its_episode() -> None:
    """Eight walks share a world; walk w starts from the spawn that its own number draws."""
    (batch,) = walks(0, 1)
    truth = render_episode(0, "train", 9, SIZE)
    np.testing.assert_array_equal(batch.frames[0].numpy(), truth.frames)
    np.testing.assert_array_equal(batch.world_to_camera[0], truth.world_to_camera)
    np.testing.assert_array_equal(batch.actions[0], truth.actions)
    np.testing.assert_array_equal(batch.intrinsics, truth.intrinsics[0])


@pytest.mark.parametrize(
    ("first", "count"), [(HELD_WALK, 1), (HELD_WALK - 2, 3), (0, HELD_WALK + 1)], ids=str
)
def test_held_out_worlds_are_refused(first: int, count: int) -> None:
    with pytest.raises(UserError, match=r"walks: .*held-out worlds, 10000000 onwards"):
        next(rendered_walks(first, count, 9, SIZE, CPU))


def test_the_last_training_world_is_not_refused() -> None:
    (batch,) = walks(HELD_WALK - 1, 1, frames=5)
    assert batch.frames.shape == (1, 5, *SIZE, 3)


def test_walks_stand_still_where_asked() -> None:
    frames = 150
    (batch,) = rendered_walks(8, 2, frames, (16, 24), CPU, stills=30)
    _, plain = train_walks(build_world(1), [8, 9], frames)
    _, actions = train_walks(build_world(1), [8, 9], frames, stills=30)
    np.testing.assert_array_equal(batch.actions, action_values(actions))
    assert not np.array_equal(plain, actions)


def test_a_cache_asks_for_its_stills(codec: Autoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def spied(*given: Any) -> Iterator[WalkBatch]:
        asked.append(given[6])
        return rendered_walks(*given)

    monkeypatch.setattr(latent_cache, "rendered_walks", spied)
    LatentCache(codec, 1, 2, SIZE, CPU, rank=0, stills=7)
    LatentCache(codec, 1, 2, SIZE, CPU, rank=0)
    assert asked == [7, 0]


@pytest.fixture(scope="module")
def episode() -> Episode:
    return render_episode(0, "train", FRAMES, SIZE)


def test_cached_latents_are_the_codec_s(
    cache: LatentCache, codec: Autoencoder, episode: Episode
) -> None:
    coded = codec.encode(torch.from_numpy(episode.frames[None]))[0]
    assert cache.latents.dtype == torch.float16
    assert cache.latents[0].equal(coded.half())
    assert cache.latents.shape[:2] == (3, 6)


def test_clips_are_steered_as_in_a_roll_out(cache: LatentCache, episode: Episode) -> None:
    """A clip of the cache and the session's own conditions tell the same story."""
    latents, clip = cache.clips(torch.tensor([0, 1]), torch.tensor([0, 2]), 4)
    assert latents.dtype == torch.float32
    assert latents[0].equal(cache.latents[0, :4].float())
    assert latents[1].equal(cache.latents[1, 2:6].float())
    frames = 13
    truth = conditions_of_frames(
        torch.from_numpy(episode.actions[None, :frames]),
        torch.from_numpy(episode.world_to_camera[None, :frames]),
        clip.lens[:1, :1].expand(1, frames, 4),
        0,
    )
    assert clip.actions[0].equal(truth.actions[0])
    assert clip.time.tolist() == [0, 1, 2, 3]
    # Cameras stand where the episode's do, up to one shift of the whole world.
    ours, theirs = clip.world_to_camera[0].double(), truth.world_to_camera[0]
    assert (ours[..., :3, :3] - theirs[..., :3, :3]).abs().max() < 1e-6
    shift = camera_centres(ours) - camera_centres(theirs)
    assert (shift - shift[0, 0]).abs().max() < 1e-4
    # Small numbers, so that fp32 holds them well: the walk's middle is the origin.
    middle = camera_centres(cache.world_to_camera[0, FRAMES // 8 + 1, :].double())
    assert camera_centres(clip.cameras.double()).norm(dim=-1).max() < 20
    assert middle.norm(dim=-1).min() < 1.0


def test_lens_is_that_of_the_renderer(cache: LatentCache, episode: Episode) -> None:
    fx, fy, cx, cy = cache.lens.tolist()
    intrinsics = episode.intrinsics[0]
    assert fx * SIZE[1] / 2 == pytest.approx(intrinsics[0, 0])
    assert fy * SIZE[0] / 2 == pytest.approx(intrinsics[1, 1])
    assert (cx + 1) * SIZE[1] / 2 == pytest.approx(intrinsics[0, 2])
    assert (cy + 1) * SIZE[0] / 2 == pytest.approx(intrinsics[1, 2])


def test_depths_are_those_of_the_tokens_patches(codec: Autoencoder, cache: LatentCache) -> None:
    """Against an episode's own depth maps, at the reference frames of the latents."""
    grid = (2, 3)
    probed = LatentCache(codec, 1, 6, SIZE, CPU, rank=0, grid=grid)
    assert torch.equal(probed.latents, cache.latents[:1])
    truth = render_episode(0, "train", FRAMES, SIZE).depth
    assert truth is not None
    assert probed.depths is not None
    got = probed.patch_depths(torch.tensor([0]), torch.tensor([1]), 5)
    assert got is not None
    assert torch.equal(got, probed.depths[:, 1:].float())
    for latent, frame in enumerate((0, 3, 7, 11, 15, 19)):
        for token in range(6):
            row, column = divmod(token, 3)
            patch = truth[frame, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            logs = np.log(patch).clip(np.log(0.2), np.log(48))
            mean, variance = probed.depths[0, latent, token].tolist()
            # 4 x 4 rays stand for 16 x 16 pixels.
            assert abs(mean - logs.mean()) < 0.12 + 0.3 * logs.std()
            assert abs(variance**0.5 - logs.std()) < 0.1 + 0.3 * logs.std()


def test_log_depths_go_by_patch_and_end_in_the_haze() -> None:
    depth = torch.full((1, 1, 4, 6), 2.0)
    depth[0, 0, 2:, 2:4] = torch.tensor([[1.0, 4.0], [4.0, 1.0]])
    depth[0, 0, :2, 4:] = torch.inf
    found = log_depths(depth, (2, 3))[0, 0]
    log2 = np.log(2)
    np.testing.assert_allclose(found[:, 0], [log2, log2, np.log(48), log2, log2, log2], rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], [0, 0, 0, 0, log2**2, 0], atol=1e-6)
