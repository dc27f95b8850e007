"""Projective positions: hand-worked matrices, true inverses, only relative frustums count."""

import math

import pytest
import torch
from torch import Tensor

from decmem.ops.projective import projective_matrices, transform_quads


def turn(axis: int, degrees: float) -> Tensor:
    """Rotation about a coordinate axis, fp64."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.eye(3, dtype=torch.float64)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = cos, -sin, sin, cos
    return matrix


def rigid(rotation: Tensor, translation: list[float]) -> Tensor:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = torch.tensor(translation, dtype=torch.float64)
    return matrix


CAMERAS = torch.stack(
    [
        rigid(turn(1, 0), [0.0, 0.0, 0.0]),
        rigid(turn(1, 30) @ turn(0, 10), [0.5, -1.5, 2.0]),
        rigid(turn(1, 200) @ turn(0, -40), [3.0, 0.25, -1.0]),
        rigid(turn(1, -75), [-2.0, 1.0, 4.0]),
    ]
)
LENS = torch.tensor(
    [[1.0, 1.0, 0.0, 0.0], [1.2, 1.8, 0.0, 0.0], [0.9, 1.4, 0.1, -0.2], [1.2, 1.8, -0.05, 0.3]]
)


def test_matrices_by_hand() -> None:
    camera = rigid(turn(1, 90), [1.0, 2.0, 3.0])
    projection, _ = projective_matrices(camera, torch.tensor([2.0, 3.0, 0.5, -0.5]))
    # A point of the world goes to the camera (x, y, z), then to (fx x + cx z, fy y + cy z, z).
    point = torch.tensor([0.3, -0.7, 1.1, 1.0], dtype=torch.float64)
    x, y, z, _ = (camera @ point).tolist()
    expected = torch.tensor([2 * x + 0.5 * z, 3 * y - 0.5 * z, z, 1.0])
    torch.testing.assert_close(projection @ point.float(), expected)


def test_inverse_really_inverts() -> None:
    projection, unprojection = projective_matrices(CAMERAS, LENS)
    identity = torch.eye(4).expand(4, 4, 4)
    torch.testing.assert_close(projection @ unprojection, identity, atol=1e-5, rtol=0)
    torch.testing.assert_close(unprojection @ projection, identity, atol=1e-5, rtol=0)


@pytest.mark.parametrize("transpose", [False, True], ids=["plain", "transposed"])
def test_quads_are_matrix_products(transpose: bool) -> None:
    x, matrix = torch.randn(3, 5, 8), torch.randn(3, 1, 4, 4)
    by = matrix.mT if transpose else matrix
    expected = torch.cat([(by @ x[..., i : i + 4, None])[..., 0] for i in (0, 4)], dim=-1)
    torch.testing.assert_close(transform_quads(x, matrix, transpose), expected)
    assert transform_quads(x.bfloat16(), matrix).dtype == torch.float32


def test_quads_have_the_right_gradient() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    matrix = torch.randn(2, 4, 4, requires_grad=True)
    grad = torch.randn(2, 8)
    got = torch.autograd.grad(transform_quads(x, matrix), (x, matrix), grad)
    parts, grads = x.view(2, 2, 4), grad.view(2, 2, 4)
    torch.testing.assert_close(got[0], (grads @ matrix).flatten(1))
    torch.testing.assert_close(got[1], grads.mT @ parts)


def logits(cameras: Tensor, lens: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Products of encoded queries and keys, all cameras against all."""
    projection, unprojection = projective_matrices(cameras, lens)
    return transform_quads(q, projection, transpose=True) @ transform_quads(k, unprojection).mT


def test_logits_depend_on_relative_frustums_only() -> None:
    q, k = torch.randn(2, 4, 12)
    before = logits(CAMERAS, LENS, q, k)
    # Another world frame: its origin elsewhere, its axes turned.
    other = CAMERAS @ rigid(turn(1, 57) @ turn(2, 20), [4.0, -3.0, 1.0])
    torch.testing.assert_close(logits(other, LENS, q, k), before, atol=1e-4, rtol=1e-4)
    nudged = CAMERAS.clone()
    nudged[1, :3, 3] += 0.1
    assert (logits(nudged, LENS, q, k) - before)[0, 1].abs() > 1e-3


def test_a_camera_is_plain_to_itself() -> None:
    q, k = torch.randn(2, 4, 12)
    same = logits(CAMERAS, LENS, q, k).diagonal()
    torch.testing.assert_close(same, (q * k).sum(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("transpose", [False, True], ids=["matrix", "transposed"])
@pytest.mark.parametrize("side_by_side", [False, True], ids=["apart", "side-by-side"])
def test_the_short_cut_of_the_cpu(transpose: bool, side_by_side: bool) -> None:
    x, matrix = torch.randn(2, 3, 4, 5, 16), torch.randn(2, 1, 4, 1, 4, 4)
    if side_by_side:
        x = x.movedim(1, 3).contiguous().movedim(3, 1)
    part = x[..., 4:12]
    plain = transform_quads(part, matrix, transpose)
    with torch.no_grad():
        torch.testing.assert_close(transform_quads(part, matrix, transpose), plain)
        # Matrices of single tokens or heads are no case for it.
        for other in (torch.randn(2, 1, 4, 5, 4, 4), torch.randn(2, 3, 4, 1, 4, 4)):
            got = transform_quads(part, other, transpose)
            torch.testing.assert_close(
                got,
                (
                    part.unflatten(-1, (2, 4))[..., None, :]
                    @ ((other if transpose else other.mT)[..., None, :, :])
                ).flatten(-3),
            )
