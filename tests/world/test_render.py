"""The renderer against the definition of a picture, and against itself."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from decmem.errors import UserError
from decmem.world import cpu_renderer
from decmem.world.blocks import FIRST_PLANT, TEXTURE_NAMES
from decmem.world.camera import centres, intrinsics, look
from decmem.world.generation import build_world
from decmem.world.grid import SIZE, World
from decmem.world.motion import state_cameras
from decmem.world.pictures import CLOUDS, pictures
from decmem.world.probe import probe_depth
from decmem.world.reference import render_reference
from decmem.world.render import Renderer
from decmem.world.textures import mip_levels
from decmem.world.training_walk import train_walks


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(1)


@pytest.fixture(scope="module")
def poses(world: World) -> np.ndarray:
    states, _ = train_walks(world, [1, 2, 3], 60)
    return state_cameras(states[:, [0, 25, 50]]).reshape(-1, 4, 4)


@pytest.mark.parametrize(("size", "supersample"), [((24, 36), 1), ((12, 18), 2), ((9, 13), 3)])
def test_pictures_are_what_the_definition_says(
    world: World, poses: np.ndarray, size: tuple[int, int], supersample: int
) -> None:
    renderer = Renderer(size, supersample=supersample)
    frames = renderer.render(world, poses[:6])
    errors, blocks = [], []
    for frame, pose in enumerate(poses[:6]):
        rgb, depth, block = render_reference(world, pose, renderer.intrinsics, size, supersample)
        expected = np.floor(np.minimum(rgb, 255) + 0.5)
        errors.append(abs(frames.rgb[frame] - expected).max(-1))
        same = frames.block[frame] == block
        blocks.append(same)
        np.testing.assert_allclose(frames.depth[frame][same], depth[same], rtol=1e-4)
    assert (np.array(errors) <= 1).mean() >= 0.999
    assert np.mean(blocks) >= 0.999


def test_the_cuda_kernel_agrees_in_the_simulator() -> None:
    script = Path(__file__).with_name("cuda_simulation.py")
    pytest.importorskip("numba_cuda")
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    run = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "equal"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_cuda_renderer_agrees(world: World, poses: np.ndarray) -> None:
    ours, theirs = (Renderer(device=device).render(world, poses) for device in ("cpu", "cuda"))
    error = abs(ours.rgb.astype(int) - theirs.rgb).max(-1)
    assert (error <= 1).mean() >= 0.999
    assert (ours.block == theirs.block).mean() >= 0.999


def test_depth_and_pose_lead_to_the_face_that_was_hit(world: World, poses: np.ndarray) -> None:
    renderer = Renderer((32, 48), supersample=1)
    frames = renderer.render(world, poses)
    camera = renderer.intrinsics
    rows, columns = np.mgrid[0:32, 0:48]
    rays = np.stack([columns + 0.5, rows + 0.5, np.ones_like(rows)], -1) @ np.linalg.inv(camera).T
    hits = 0
    for frame, pose in enumerate(poses):
        cube = (frames.block[frame] > 0) & (frames.block[frame] < FIRST_PLANT)
        seen = rays[cube] * frames.depth[frame][cube][:, None]
        points = (seen - pose[:3, 3]) @ pose[:3, :3]
        off = abs(points - np.round(points))
        axis = off.argmin(-1)
        assert off.min(-1).max() < 1e-3
        inward = np.sign(points - centres(pose))[np.arange(len(points)), axis]
        points[np.arange(len(points)), axis] += 0.5 * inward
        clear = np.sort(off, -1)[:, 1] > 1e-3
        cells = np.floor(points[clear]).astype(int)
        found = world.blocks[cells[:, 0] % SIZE, cells[:, 2] % SIZE, cells[:, 1]]
        np.testing.assert_array_equal(found, frames.block[frame][cube][clear])
        hits += clear.sum()
    assert hits > 1000


def test_a_batch_is_many_single_frames(world: World, poses: np.ndarray) -> None:
    other = build_world(2)
    for threads in (1, 2):
        renderer = Renderer((16, 24), threads=threads)
        stack = renderer.stack([world, other])
        index = torch.tensor([1, 0, 1, 0])
        batch = renderer.render_batch(stack, index, torch.from_numpy(poses[:4]), depth=True)
        assert batch.depth is not None
        for frame, number in enumerate(index.tolist()):
            single = renderer.render((world, other)[number], poses[frame : frame + 1])
            np.testing.assert_array_equal(batch.rgb[frame].numpy(), single.rgb[0])
            np.testing.assert_array_equal(batch.depth[frame].numpy(), single.depth[0])
    assert renderer.render_batch(stack, index, torch.from_numpy(poses[:4])).depth is None


def test_pictures_repeat_with_the_world(world: World, poses: np.ndarray) -> None:
    far = poses.copy()
    shift = np.array([SIZE * 5.0, 0, -SIZE * 3.0])
    far[:, :3, 3] -= poses[:, :3, :3] @ shift
    renderer = Renderer((16, 24), supersample=1)
    near_rgb, far_rgb = (renderer.render(world, p).rgb.astype(int) for p in (poses, far))
    assert (abs(near_rgb - far_rgb) <= 1).mean() > 0.999


def test_cameras_outside_the_world_see_something_sane(world: World) -> None:
    high = look((8.5, 66, 8.5), 0, -80)
    low = look((8.5, -5, 8.5), 0, 20)
    frames = Renderer((16, 24), supersample=1).render(world, np.stack([high, low]))
    assert (frames.block[1] == 0).all()
    assert np.isfinite(frames.depth[0]).any()


def test_probes_are_the_renderers_depth(world: World, poses: np.ndarray) -> None:
    depth = Renderer((32, 48), supersample=1).render(world, poses).depth
    np.testing.assert_allclose(probe_depth(world, poses), depth, rtol=1e-5)


def test_mip_levels_calm_far_ground(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With textures of pure noise, tiny motions change the picture far less than without levels."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (len(TEXTURE_NAMES), 16, 16, 4), np.uint8)
    noise[..., 3] = 255
    poses = np.stack([look((30.3 + 0.01 * n, 44, 30.7), 20, -25) for n in range(8)])
    renderer = Renderer((32, 48), supersample=1)

    def unrest(levels: Callable[[np.ndarray], list[np.ndarray]]) -> float:
        chains = [[level.reshape(-1, 4) for level in levels(picture)] for picture in noise]
        texels = np.array([np.concatenate(chain) for chain in chains]).reshape(-1, 4)
        raw = pictures().copy()
        raw[:CLOUDS] = np.ascontiguousarray(texels).view(np.uint32)[:, 0]
        monkeypatch.setattr(cpu_renderer, "pictures", lambda: raw)
        return float(renderer.render(world, poses).rgb.astype(float).std(0).mean())

    picked = unrest(lambda picture: [picture[:: 1 << n, :: 1 << n] for n in range(5)])
    assert unrest(mip_levels) < 0.5 * picked


def test_intrinsics_have_square_pixels_and_the_named_angle() -> None:
    matrix = intrinsics((128, 192), 70)
    assert matrix[0, 0] == matrix[1, 1]
    assert np.degrees(2 * np.arctan(96 / matrix[0, 0])) == pytest.approx(70)
    np.testing.assert_array_equal(matrix[:2, 2], (96, 64))


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"size": (0, 8)}, "size"),
        ({"fov": 0.0}, "fov"),
        ({"supersample": 0}, "supersample"),
        ({"device": "cuda"}, "device"),
    ],
)
def test_bad_options_are_named(options: dict, argument: str) -> None:
    if argument == "device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UserError) as caught:
        Renderer(**options)
    assert caught.value.argument == argument
