"""Position of a latent: groups undo each other, and only relative positions count."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from decmem.errors import UserError
from decmem.memory import PositionConfig, TokenLayout
from decmem.memory.position import (
    Position,
    camera_matrices,
    decode_output,
    draw_in,
    encode_key,
    encode_query,
    encode_time,
    make_position,
    time_rotation,
)

CONFIG = PositionConfig(camera=8, space=8, time=4, space_base=100.0, time_base=100.0)
LAYOUT = TokenLayout((2, 3), (1, 1))


def positions(cameras: Tensor, config: PositionConfig = CONFIG) -> Position:
    T = cameras.shape[1]
    lens = torch.tensor([1.4, 2.1, 0.05, -0.1]).expand(len(cameras), T, 4)
    return make_position(config, cameras.float(), lens, torch.arange(T), LAYOUT.coordinates, (2, 3))


def heads(T: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, T, LAYOUT.S, CONFIG.head_dim, generator=generator)


def test_values_come_back_from_their_own_frame(walk: Callable[..., Tensor]) -> None:
    at, v = positions(walk(3)), heads(3)
    back = decode_output(CONFIG, at, encode_key(CONFIG, at, v))
    torch.testing.assert_close(back, v, atol=1e-4, rtol=1e-4)


def test_queries_and_keys_of_one_place_meet_as_they_are(walk: Callable[..., Tensor]) -> None:
    at, q, k = positions(walk(3)), heads(3), heads(3, seed=1)
    encoded = encode_query(CONFIG, at, q) * encode_key(CONFIG, at, k)
    torch.testing.assert_close(encoded.sum(-1), (q * k).sum(-1), atol=1e-4, rtol=1e-4)


def test_groups_keep_to_their_channels(walk: Callable[..., Tensor]) -> None:
    q = heads(2)
    here, there = positions(walk(5)[:, :2]), positions(walk(5)[:, 3:].flip(0))
    changed = (encode_query(CONFIG, here, q) != encode_query(CONFIG, there, q)).flatten(0, 3)
    assert changed.any(0).tolist() == [True] * 8 + [False] * 12
    later = encode_time(CONFIG, q, time_rotation(CONFIG, torch.tensor([5, 6])))
    assert (later != q).flatten(0, 3).any(0).tolist() == [False] * 16 + [True] * 4


def test_first_half_of_space_tells_columns_second_rows() -> None:
    space = positions(torch.eye(4).expand(2, 1, 4, 4)).space
    rows, columns = LAYOUT.coordinates.unbind(-1)
    angles = torch.atan2(space.sin, space.cos)
    assert angles.shape == (6, 4)
    torch.testing.assert_close(angles[:, 0], columns.float())
    torch.testing.assert_close(angles[:, 2], rows.float())


def test_moving_the_world_changes_no_logit(walk: Callable[..., Tensor]) -> None:
    q, k = heads(3), heads(3, seed=1)

    def logits(cameras: Tensor) -> Tensor:
        at = positions(cameras)
        encoded = (encode(CONFIG, at, x) for encode, x in ((encode_query, q), (encode_key, k)))
        return torch.einsum("bhtsd,bhund->bhtsun", *encoded)

    before = logits(walk(3))
    torch.testing.assert_close(logits(walk(3, at=(9.0, -4.0, 5.0))), before, atol=1e-4, rtol=1e-4)
    turned = walk(3) @ torch.tensor(
        [[0.0, 0, -1, 2], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64
    )
    torch.testing.assert_close(logits(turned), before, atol=1e-4, rtol=1e-4)


def test_metre_weighs_translations() -> None:
    camera = torch.eye(4)
    camera[0, 3] = 6.0
    lens = torch.tensor([1.0, 1.0, 0.0, 0.0])
    matrix, inverse = camera_matrices(PositionConfig(metre=0.5), camera, lens)
    assert (matrix[0, 3].item(), inverse[0, 3].item()) == (3.0, -3.0)


def test_draw_in_pulls_far_cameras_to_the_reach() -> None:
    camera = torch.eye(4)
    camera[:3, 3] = torch.tensor([3.0, 0.0, 4.0])
    near, far = draw_in(camera, 6.0), draw_in(camera, 2.5)
    assert torch.equal(near, camera)
    torch.testing.assert_close(far[:3, 3], torch.tensor([1.5, 0.0, 2.0]))
    assert torch.equal(far[:, :3], camera[:, :3])
    assert draw_in(camera, 0.0) is camera


def test_reach_bounds_the_matrices() -> None:
    camera = torch.eye(4)
    camera[2, 3] = 1e5
    lens = torch.tensor([1.0, 1.0, 0.0, 0.0])
    bounded, _ = camera_matrices(PositionConfig(metre=0.5, reach=8.0), camera, lens)
    assert bounded.abs().max() == 4.0


@pytest.mark.parametrize("groups", [(6, 8, 4), (8, 6, 4), (8, 8, 3), (8, 8, 4, 4)])
def test_groups_that_do_not_split_are_refused(groups: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="position"):
        PositionConfig(*groups)


def test_dtype_follows_the_input(walk: Callable[..., Tensor]) -> None:
    at, x = positions(walk(2)), heads(2).bfloat16()
    for code in (encode_query, encode_key, decode_output):
        assert code(CONFIG, at, x).dtype == torch.bfloat16
    assert encode_time(CONFIG, x, at.time).dtype == torch.bfloat16
