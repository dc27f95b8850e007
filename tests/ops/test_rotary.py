"""Rotary positions: angles by hand, a true rotation, and only differences count."""

import math

import pytest
import torch

from decmem.ops.rotary import rotary_angles, rotate_pairs, rotation


def test_angles_by_hand() -> None:
    angles = rotary_angles(torch.tensor([0, 1, 5]), channels=4, base=100.0)
    torch.testing.assert_close(angles, torch.tensor([[0.0, 0.0], [1.0, 0.1], [5.0, 0.5]]))


def test_quarter_turn_by_hand() -> None:
    x = torch.tensor([1.0, 0.0, 0.0, 2.0])  # the pairs (1, 0) and (0, 2), by halves
    turned = rotate_pairs(x, rotation(torch.tensor([math.pi / 2, math.pi / 2])))
    torch.testing.assert_close(turned, torch.tensor([0.0, -2.0, 1.0, 0.0]))


def test_inverse_turns_back() -> None:
    x, angles = torch.randn(3, 5, 8), torch.randn(5, 4) * 10
    turn = rotation(angles)
    back = rotate_pairs(rotate_pairs(x, turn), turn, inverse=True)
    torch.testing.assert_close(back, x)


def test_only_differences_of_the_index_count() -> None:
    q, k = torch.randn(2, 16)

    def logit(query: int, key: int) -> torch.Tensor:
        at_query, at_key = rotary_angles(torch.tensor([query, key]), 16, 100.0)
        return rotate_pairs(q, rotation(at_query)) @ rotate_pairs(k, rotation(at_key))

    torch.testing.assert_close(logit(7, 3), logit(107, 103), atol=1e-4, rtol=1e-4)
    assert (logit(7, 3) - logit(8, 3)).abs() > 1e-3


def test_result_is_fp32() -> None:
    x, angles = torch.randn(2, 4, dtype=torch.bfloat16), torch.randn(2)
    assert rotate_pairs(x, rotation(angles)).dtype == torch.float32


@pytest.mark.parametrize("inverse", [False, True], ids=["there", "back"])
def test_the_short_cut_of_the_cpu(inverse: bool) -> None:
    x = torch.randn(2, 5, 3, 8).movedim(2, 1)  # heads side by side
    turn = rotation(torch.randn(5, 4) * 10)
    plain = rotate_pairs(x, turn, inverse)
    with torch.no_grad():
        short = rotate_pairs(x, turn, inverse)
        assert short.stride() == x.stride()
        place = torch.full((2, 3, 5, 12), 7.0)
        rotate_pairs(x, turn, inverse, out=place[..., 2:10])
    torch.testing.assert_close(short, plain)
    torch.testing.assert_close(place[..., 2:10], plain)
    assert (place[..., :2] == 7).all()
    assert (place[..., 10:] == 7).all()
