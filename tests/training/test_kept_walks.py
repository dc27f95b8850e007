"""Kept walks: taken up under the same key only, and never half of them."""

from pathlib import Path

import pytest
import torch

from decmem.codec import Autoencoder
from decmem.training.kept_walks import kept_walks
from decmem.training.latent_cache import LatentCache

CPU = torch.device("cpu")


@pytest.mark.parametrize("grid", [None, (2, 3)])
def test_what_was_kept_is_taken_up(
    grid: tuple[int, int] | None, codec: Autoencoder, tmp_path: Path
) -> None:
    path, made = tmp_path / "run" / "walks.safetensors", []

    def make() -> LatentCache:
        made.append(LatentCache(codec, 2, 4, (32, 48), CPU, rank=0, grid=grid))
        return made[-1]

    fresh = kept_walks(path, {"walks": 2}, CPU, make)
    again = kept_walks(path, {"walks": 2}, CPU, make)
    assert len(made) == 1
    assert fresh is made[0]
    walk, start = torch.tensor([1, 0]), torch.tensor([0, 1])
    for one, other in zip(fresh.clips(walk, start, 3), again.clips(walk, start, 3), strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert torch.equal(one.world_to_camera, other.world_to_camera)
            assert torch.equal(one.lens, other.lens)
    depths = [cache.patch_depths(walk, start, 3) for cache in (fresh, again)]
    if grid is None:
        assert depths == [None, None]
    else:
        assert torch.equal(*depths)

    kept_walks(path, {"walks": 3}, CPU, make)
    assert len(made) == 2
    path.write_bytes(path.read_bytes()[:1000])
    kept_walks(path, {"walks": 3}, CPU, make)
    assert len(made) == 3
