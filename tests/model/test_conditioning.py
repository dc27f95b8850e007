"""Rays, frames and lenses worked by hand; what steers the model tells nothing absolute."""

import math

import pytest
import torch
from torch import Tensor

from decmem.memory import TokenLayout
from decmem.model.conditioning import (
    RAY_FEATURES,
    REFERENCE_FRAME,
    ActionFusion,
    TimeEmbedding,
    camera_centres,
    group_frames,
    normalised_lens,
    patch_rays,
    relative_to,
)

GRID = (3, 5)
COORDINATES = TokenLayout(GRID, (1, 1)).coordinates
CENTRE, RIGHT, BOTTOM = 7, 9, 12  # slots of the middle patch, of the right and the bottom edge
LENS = torch.tensor([1.0, 2.0, 0.0, 0.0])


def look(yaw: float, pitch: float = 0.0, at: tuple[float, float, float] = (0, 0, 0)) -> Tensor:
    """World-to-camera, fp64: degrees, yaw 0 looks along -z, pitch positive up."""
    y, p = math.radians(yaw), math.radians(pitch)
    ahead = [math.sin(y) * math.cos(p), math.sin(p), -math.cos(y) * math.cos(p)]
    forward = torch.tensor(ahead, dtype=torch.float64)
    right = torch.tensor([math.cos(y), 0.0, math.sin(y)], dtype=torch.float64)
    rotation = torch.stack((right, torch.linalg.cross(forward, right), forward))
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = -rotation @ torch.tensor(at, dtype=torch.float64)
    return matrix


def rays(*frames: Tensor, lens: Tensor = LENS) -> tuple[Tensor, Tensor, Tensor]:
    """Directions, waves and displacements (S, 4, n) of one latent with these four cameras."""
    features = patch_rays(torch.stack(frames)[None, None], lens[None, None], COORDINATES, GRID)
    assert features.shape == (1, 1, 15, RAY_FEATURES)
    return features[0, 0].unflatten(-1, (4, -1)).split((3, 18, 3), dim=-1)


def close(got: Tensor, *expected: float) -> None:
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("yaw", [0.0, 90.0, -135.0, 200.0])
def test_directions_by_hand(yaw: float) -> None:
    direction, _, _ = rays(*[look(yaw)] * 4)
    close(direction[CENTRE, 0], 0.0, 0.0, -1.0)  # right, up, backwards
    # Column 4 of 5 has its centre at x = 0.8 half widths; one half width is at 45 degrees.
    norm = math.hypot(0.8, 1.0)
    close(direction[RIGHT, 0], 0.8 / norm, 0.0, -1 / norm)
    # Row 2 of 3 has its centre 2/3 half heights down; f is two half heights.
    norm = math.hypot(1 / 3, 1.0)
    close(direction[BOTTOM, 0], 0.0, -1 / 3 / norm, -1 / norm)


def test_pitch_is_told_and_yaw_only_within_the_latent() -> None:
    pitched, _, _ = rays(*[look(30.0, pitch=20.0)] * 4)
    up = math.radians(20)
    close(pitched[CENTRE, 0], 0.0, math.sin(up), -math.cos(up))
    turning, _, _ = rays(look(20.0), look(25.0), look(30.0), look(40.0))
    turn = math.radians(10)
    close(turning[CENTRE, REFERENCE_FRAME], 0.0, 0.0, -1.0)
    close(turning[CENTRE, 3], math.sin(turn), 0.0, -math.cos(turn))
    close(turning[CENTRE, 0], -math.sin(turn), 0.0, -math.cos(turn))


def test_displacements_are_told_from_the_reference_frame() -> None:
    frames = [look(90.0, at=(10.0 + 0.1 * f, 5.0, 7.0 + 0.2 * f)) for f in range(4)]
    _, _, displacement = rays(*frames)
    # Facing east, east is ahead and south is right.
    close(displacement[CENTRE, 3], 0.2, 0.0, -0.1)
    close(displacement[RIGHT, 0], -0.4, 0.0, 0.2)
    close(displacement[CENTRE, REFERENCE_FRAME], 0.0, 0.0, 0.0)


def test_waves_are_the_directions_at_three_rates() -> None:
    direction, waves, _ = rays(*[look(0.0, pitch=10.0)] * 4)
    expected = [f(direction * math.pi * r) for r in (1, 2, 4) for f in (torch.sin, torch.cos)]
    torch.testing.assert_close(waves, torch.cat(expected, -1), atol=1e-5, rtol=1e-5)


def test_rays_do_not_know_where_in_the_world_they_are() -> None:
    here = [look(10.0 * f, at=(0.3 * f, 1.6, -0.2 * f)) for f in range(4)]
    away = torch.tensor([3000.0, 20.0, -5000.0], dtype=torch.float64)
    turn = look(123.0)[:3, :3].mT @ look(0.0)[:3, :3]  # about the world's up axis
    there = []
    for camera in here:
        moved = camera.clone()
        moved[:3, :3] = camera[:3, :3] @ turn.mT
        moved[:3, 3] = camera[:3, 3] - moved[:3, :3] @ away
        there.append(moved)
    for before, after in zip(rays(*here), rays(*there), strict=True):
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_principal_point_shifts_the_rays() -> None:
    direction, _, _ = rays(*[look(0.0)] * 4, lens=torch.tensor([1.0, 2.0, 0.8, 0.0]))
    close(direction[RIGHT, 0], 0.0, 0.0, -1.0)


def test_first_frame_stands_for_a_whole_latent() -> None:
    frames = torch.arange(5.0)[None, :, None]
    grouped = group_frames(frames, first_alone=True)[0, ..., 0]
    assert grouped.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4]]
    assert group_frames(frames[:, 1:], first_alone=False)[0, ..., 0].tolist() == [[1, 2, 3, 4]]


def test_lens_is_in_half_pictures() -> None:
    pixels = torch.tensor([[300.0, 0.0, 240.0], [0.0, 200.0, 50.0], [0.0, 0.0, 1.0]])
    close(normalised_lens(pixels, (200, 400)), 1.5, 2.0, 0.2, -0.5)


def test_camera_centres() -> None:
    cameras = torch.stack([look(40.0, 10.0, at=(1.0, 2.0, 3.0)), look(0.0, at=(-4.0, 0.0, 0.5))])
    expected = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 0.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(camera_centres(cameras), expected)


@pytest.mark.parametrize("frames", [1, 4])
def test_relative_to_an_anchor_moves_the_origin(frames: int) -> None:
    at = torch.tensor([[1e6, 2.0, 3.0], [0.0, 5.0, 0.0]], dtype=torch.float64)
    cameras = torch.stack([look(40.0, at=tuple(a.tolist())) for a in at])
    cameras = cameras[:, None, None].expand(-1, 2, frames, -1, -1)
    moved = relative_to(cameras, at)
    torch.testing.assert_close(moved[..., :3, 3], torch.zeros(2, 2, frames, 3, dtype=torch.float64))
    assert torch.equal(moved[..., :3, :3], cameras[..., :3, :3])


def test_actions_in_degrees_and_fractions_have_a_common_size() -> None:
    fusion = ActionFusion(6, 8)
    assert fusion.scale.tolist() == pytest.approx([1.0, 1.0, 0.1, 0.1, 1.0, 1.0])
    one = torch.zeros(1, 1, 4, 6)
    assert fusion(one).shape == (1, 1, 8)
    changed = one.clone()
    changed[0, 0, 3, 2] = 5.0
    assert not torch.equal(fusion(one), fusion(changed)), "the last frame's yaw is heard"


def test_times_of_denoising_are_told_apart() -> None:
    embedding = TimeEmbedding(8)
    a, b, c = embedding(torch.tensor([[0.0, 0.001, 1.0]]))[0]
    assert (a - b).abs().max() > 1e-4
    assert (a - c).abs().max() > 1e-2
