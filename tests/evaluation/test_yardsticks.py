"""Copying and warping, on a scene whose every ray has a closed form."""

import numpy as np
import pytest

from decmem.evaluation import quality
from decmem.evaluation.warp import fill_from_nearest
from decmem.evaluation.yardsticks import (
    Geometry,
    copy_last,
    nearest_pose,
    nearest_pose_index,
    oracle_warp,
)

HEIGHT, WIDTH, FOCAL = 48, 64, 45.0
INTRINSICS = np.array([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1.0]])


def pose(x: float, z: float, yaw: float = 0.0, height: float = 1.6) -> np.ndarray:
    """World to camera of an eye at (x, height, z) that looks along -z, turned right by ``yaw``."""
    c, s = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))
    forward, right = np.array([s, 0, -c]), np.array([c, 0, s])
    rotation = np.stack([right, [0, -1, 0], forward])
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = -rotation @ np.array([x, height, z])
    return matrix


def hit(origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Distance along ``rays`` (..., 3) to the first of: a wall z = -6 (1 m wide, all heights, round
    x = 0) and the ground y = 0; infinite in the sky."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ground = np.where(rays[..., 1] < 0, -origin[1] / rays[..., 1], np.inf)
        wall = (-6 - origin[2]) / rays[..., 2]
        x = origin[0] + wall * rays[..., 0]
    wall = np.where((wall > 1e-6) & (np.abs(x) < 0.5), wall, np.inf)
    return np.minimum(ground, wall)


def render(poses: list[np.ndarray]) -> tuple[np.ndarray, Geometry]:
    v, u = np.meshgrid(np.arange(HEIGHT) + 0.5, np.arange(WIDTH) + 0.5, indexing="ij")
    camera_rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(INTRINSICS).T
    frames, depths = [], []
    for matrix in poses:
        origin = -matrix[:3, :3].T @ matrix[:3, 3]
        rays = camera_rays @ matrix[:3, :3]
        depth = hit(origin, rays)
        point = origin + np.where(np.isfinite(depth), depth, 0)[..., None] * rays
        texture = np.stack(
            [np.sin(2 * point[..., 0]), np.sin(1.5 * point[..., 2]), np.sin(point.sum(-1))], -1
        )
        up = rays[..., 1] / np.linalg.norm(rays, axis=-1)
        sky = np.stack([0.2 + 0 * up, 0.3 + 0.5 * up, 0.9 + 0 * up], -1)
        haze = np.exp(-np.where(np.isfinite(depth), depth, 0) / 6)[
            ..., None
        ]  # or far ground flickers
        colour = np.where(np.isfinite(depth)[..., None], 0.5 + 0.4 * haze * texture, sky)
        frames.append(np.rint(255 * np.clip(colour, 0, 1)).astype(np.uint8))
        depths.append(depth.astype(np.float32))
    count = len(poses)
    geometry = Geometry(np.stack(poses), np.repeat(INTRINSICS[None], count, 0), np.stack(depths))
    return np.stack(frames), geometry


def test_copy_last_repeats_the_end_of_the_bank() -> None:
    bank, _ = render([pose(0, 0), pose(1, 0)])
    copied = copy_last(bank, 3)
    assert copied.shape == (3, HEIGHT, WIDTH, 3)
    assert (copied == bank[1]).all()


def test_ten_degrees_weigh_as_much_as_one_metre() -> None:
    bank = np.stack([pose(0, 0), pose(0, 0, yaw=9), pose(1, 0), pose(0, 0, yaw=90)])
    wanted = np.stack([pose(0.2, 0), pose(0.9, 0), pose(0, 0, yaw=6), pose(0, 3, yaw=80)])
    # The last is 3 m and 10 degrees from bank frame 3, 3 m and 80 degrees from bank frame 0.
    assert nearest_pose_index(bank, wanted).tolist() == [0, 2, 1, 3]
    frames = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((4, 2, 2, 3), np.uint8)
    assert nearest_pose(frames, bank, wanted)[:, 0, 0, 0].tolist() == [0, 2, 1, 3]


def test_the_latest_of_equal_poses_is_copied() -> None:
    bank = np.stack([pose(0, 0, 7), pose(2, 0), pose(0, 0, 7), pose(3, 0)])
    assert nearest_pose_index(bank, np.stack([pose(0, 0, 7)])).tolist() == [2]


def test_a_pose_of_the_bank_is_returned_nearly_exactly() -> None:
    bank, geometry = render([pose(0, 1), pose(0.4, 0), pose(-0.5, 0.5, yaw=8)])
    target, where = render([pose(0.4, 0)])
    warped, seen = oracle_warp(bank, geometry, where)
    assert seen.all()
    assert quality.psnr_per_frame(warped, target)[0] > 45


def test_warping_beats_copying_beside_the_bank() -> None:
    bank, geometry = render([pose(x / 4, 0) for x in range(-8, 9, 2)])
    target, where = render([pose(0.25, 0.1, yaw=3), pose(-0.7, -0.2, yaw=-4)])
    warped, seen = oracle_warp(bank, geometry, where, threads=2)
    warp = quality.psnr_per_frame(warped, target)
    copied = nearest_pose(bank, geometry.world_to_camera, where.world_to_camera)
    assert (warp > quality.psnr_per_frame(copied, target) + 4).all()
    assert (warp > 31).all()
    assert seen.mean() > 0.94


def test_seen_is_what_the_bank_sees_unobstructed() -> None:
    eye, aside = pose(-2.5, 0), pose(2.0, 0, yaw=-10)
    bank, geometry = render([eye])
    _, where = render([aside])
    _, seen = oracle_warp(bank, geometry, where)
    v, u = np.meshgrid(np.arange(HEIGHT) + 0.5, np.arange(WIDTH) + 0.5, indexing="ij")
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(INTRINSICS).T @ aside[:3, :3]
    depth = where.depth[0]
    solid = np.isfinite(depth) & (depth < 25)
    points = -aside[:3, :3].T @ aside[:3, 3] + np.where(solid, depth, 0)[..., None] * rays
    origin = -eye[:3, :3].T @ eye[:3, 3]
    lines = points - origin
    free = hit(origin, lines) > 1 - 1e-3
    camera = points @ eye[:3, :3].T + eye[:3, 3]
    pixel = camera @ INTRINSICS.T / np.maximum(camera[..., 2:], 1e-6)
    inside = (pixel[..., 0] > 0) & (pixel[..., 0] < WIDTH)
    inside &= (pixel[..., 1] > 0) & (pixel[..., 1] < HEIGHT) & (camera[..., 2] > 0)
    expected = free & inside
    hidden = solid & inside & ~free
    assert hidden.sum() > 20  # the wall hides something, or this test shows nothing
    assert (seen[0] == expected)[solid].mean() > 0.97
    assert seen[0, hidden].mean() < 0.25


def test_looking_away_from_everything_gives_the_last_frame() -> None:
    bank, geometry = render([pose(0, 0), pose(1, 0)])
    _, where = render([pose(0, 0, yaw=180)])
    warped, seen = oracle_warp(bank, geometry, where)
    assert not seen.any()
    assert (warped[0] == bank[1]).all()


def test_holes_take_the_nearest_colour() -> None:
    colour = np.zeros((3, 4, 3), np.float32)
    seen = np.zeros((3, 4), bool)
    colour[0, 0], seen[0, 0] = 10, True
    colour[2, 3], seen[2, 3] = 20, True
    filled = fill_from_nearest(colour, seen)[..., 0]
    assert filled[0, 1] == 10
    assert filled[1, 0] == 10
    assert filled[2, 2] == 20
    assert filled[1, 3] == 20
    assert set(np.unique(filled).tolist()) == {10.0, 20.0}
    assert filled[0, 0] == pytest.approx(10)
