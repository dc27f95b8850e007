"""Co-visibility against brute force: exact rays, and the faces two frames both show."""

import numpy as np
import pytest

from decmem.world.camera import centres, intrinsics, look
from decmem.world.generation import build_world
from decmem.world.grid import SIZE, World
from decmem.world.marching import NOTHING, march
from decmem.world.motion import state_cameras
from decmem.world.pictures import pictures
from decmem.world.probe import probe_depth
from decmem.world.training_walk import train_walks
from decmem.world.visibility import (
    by_block,
    covisibility,
    last_seen,
    seen_fraction,
    visible,
)

SHAPE = (96, 144)
K = intrinsics(SHAPE)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(1)


@pytest.fixture(scope="module")
def poses(world: World) -> np.ndarray:
    states, _ = train_walks(world, [5], 160)
    return state_cameras(states[0, ::4])


@pytest.fixture(scope="module")
def depth(world: World, poses: np.ndarray) -> np.ndarray:
    return probe_depth(world, poses, SHAPE)


def first_hit(world: World, origin: np.ndarray, direction: np.ndarray) -> tuple[float, tuple]:
    """t and (cell, face) of the first surface along a ray; (inf, ()) for none."""
    cell = np.floor(origin).astype(int)
    inset = (origin - cell).astype(np.float32)
    start = [np.int32(cell[0] % SIZE), np.int32(cell[1]), np.int32(cell[2] % SIZE)]
    t, i, j, k, face = march(
        world.buffer, 0, pictures(), *start, *inset, *direction.astype(np.float32),
        np.float32(1e4), np.float32(1 / K[0, 0]),
    )  # fmt: skip
    if face == NOTHING:
        return np.inf, ()
    return t, (cell[0] + i, cell[1] + j, cell[2] + k, face)


def pixel_rays(pose: np.ndarray) -> np.ndarray:
    rows, columns = np.mgrid[0 : SHAPE[0], 0 : SHAPE[1]]
    camera = np.stack([columns + 0.5, rows + 0.5, np.ones_like(rows)], -1) @ np.linalg.inv(K).T
    return camera @ pose[:3, :3]


def test_agrees_with_a_ray_cast_to_every_point(
    world: World, poses: np.ndarray, depth: np.ndarray
) -> None:
    """The truth: a point is visible if it projects inside and is the first that ray meets."""
    agree = []
    for i, j in ((0, 3), (8, 2), (20, 26), (35, 30)):
        ours = visible(depth[i], poses[i], depth[j], poses[j], K)
        rays, eye = pixel_rays(poses[i]), centres(poses[j])
        for row, column in np.argwhere(np.isfinite(depth[i]))[::25]:
            point = centres(poses[i]) + rays[row, column] * depth[i, row, column]
            seen_from = poses[j, :3, :3] @ point + poses[j, :3, 3]
            u, v = K[:2, :2] @ seen_from[:2] / seen_from[2] + K[:2, 2]
            inside = seen_from[2] > 0.01 and 0 <= u < SHAPE[1] and 0 <= v < SHAPE[0]
            meets = inside and abs(first_hit(world, eye, point - eye)[0] - 1) < 1e-3
            agree.append(ours[row, column] == meets)
    assert len(agree) > 1000
    assert np.mean(agree) > 0.985


def test_visible_surfaces_are_faces_that_both_frames_show(
    world: World, poses: np.ndarray, depth: np.ndarray
) -> None:
    i, j = 8, 2
    faces = []
    for number in (i, j):
        eye, rays = centres(poses[number]), pixel_rays(poses[number]).reshape(-1, 3)
        faces.append([first_hit(world, eye, ray)[1] for ray in rays])
    pixels = visible(depth[i], poses[i], depth[j], poses[j], K) & np.isfinite(depth[i])
    there = set(faces[1])
    shared = np.array([face in there for face in faces[0]]).reshape(SHAPE)
    # Farther off, a face may lie between the other frame's rays.
    pixels &= depth[i] < 8
    assert pixels.mean() > 0.05
    assert shared[pixels].mean() > 0.98


def test_a_frame_sees_itself(poses: np.ndarray, depth: np.ndarray) -> None:
    for number in range(0, 40, 7):
        grid = covisibility(depth[number], poses[number], depth[number], poses[number], K, (3, 4))
        assert grid.shape == (3, 4)
        np.testing.assert_array_equal(grid, 1)


def test_opposite_views_share_nothing(world: World) -> None:
    pair = np.stack([look((100.5, 45, 100.5), yaw, 0) for yaw in (0, 180)])
    both = probe_depth(world, pair, SHAPE)
    assert not visible(both[0], pair[0], both[1], pair[1], K).any()


def test_sky_is_seen_where_its_direction_falls_on_sky(world: World) -> None:
    pair = np.stack([look((100.5 + x, 50, 100.5), yaw, 40) for x, yaw in ((0, 0), (9, 20))])
    both = probe_depth(world, pair, SHAPE)
    assert np.isinf(both).all()
    pixels = visible(both[0], pair[0], both[1], pair[1], K)
    inside = (pixel_rays(pair[0]) @ pair[1, :3, :3].T) @ K.T
    inside = inside[..., :2] / inside[..., 2:]
    expected = ((inside >= 0) & (inside < (SHAPE[1], SHAPE[0]))).all(-1)
    np.testing.assert_array_equal(pixels, expected)
    assert 0.1 < pixels.mean() < 0.9


def test_last_seen_is_the_latest_of_the_bank(poses: np.ndarray, depth: np.ndarray) -> None:
    now, bank = 30, slice(0, 24)
    seen = last_seen(depth[now], poses[now], depth[bank], poses[bank], K)
    single = np.stack([visible(depth[now], poses[now], depth[n], poses[n], K) for n in range(24)])
    expected = np.where(single.any(0), 23 - single[::-1].argmax(0), -1)
    np.testing.assert_array_equal(seen, expected)
    share = seen_fraction(depth[now], poses[now], depth[bank], poses[bank], K)
    assert share == (expected >= 0).mean()


def test_blocks_of_the_grid_are_means_of_their_pixels() -> None:
    pixels = np.zeros((4, 6), bool)
    pixels[:2, :2] = True
    pixels[2, 5] = True
    np.testing.assert_array_equal(by_block(pixels), [[1, 0, 0], [0, 0, 0.25]])
