"""Actions and the script that spells them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decmem.errors import UserError
from decmem.world.actions import ACTION_FIELDS, action_values, quantise_actions, validate_actions
from decmem.world.script import parse_script


def test_columns_and_limits() -> None:
    names = [field.name for field in ACTION_FIELDS]
    assert names == ["forward", "right", "yaw", "pitch", "jump", "sprint"]
    highs = np.array([[field.high for field in ACTION_FIELDS]], np.float32)
    np.testing.assert_array_equal(validate_actions(highs), highs)


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ([1.5, 0, 0, 0, 0, 0], "forward"),
        ([0, 0, 16, 0, 0, 0], "yaw"),
        ([0, 0, 0, np.nan, 0, 0], "pitch"),
        ([0, 0, 0, 0, 0.5, 0], "jump"),
    ],
)
def test_values_out_of_range_are_named(row: list[float], word: str) -> None:
    with pytest.raises(UserError, match=f"{word} is .* in frame 2"):
        validate_actions([[0] * 6, row])


@pytest.mark.parametrize("actions", [[[0] * 5], [0] * 6, "forward", [[0] * 6, [0] * 5]])
def test_wrong_shapes_are_refused(actions: object) -> None:
    with pytest.raises(UserError):
        validate_actions(actions)  # pyright: ignore[reportArgumentType]


@given(st.lists(st.integers(-64, 64), min_size=2, max_size=2), st.integers(-120, 120))
def test_whole_steps_survive_the_round_trip(moves: list[int], yaw: int) -> None:
    steps = np.array([[*moves, yaw, -yaw, 1, 0]], np.int64)
    np.testing.assert_array_equal(quantise_actions(action_values(steps)), steps)


def test_a_script_in_full() -> None:
    actions = parse_script(
        "forward 2, turn-left 9x1, back 1, look-up 4x1, wait 1, jump 1, sprint-forward 1, left 1,"
        " forward+turn-right 2.5x2"
    )
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 0, -9, 0, 0, 0],
        [-1, 0, 0, 0, 0, 0],
        [0, 0, 0, 4, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, 0, 1],
        [0, -1, 0, 0, 0, 0],
        [1, 0, 2.5, 0, 0, 0],
        [1, 0, 2.5, 0, 0, 0],
    ]
    np.testing.assert_array_equal(actions, np.array(expected, np.float32))
    validate_actions(actions)


@pytest.mark.parametrize(
    "token",
    [
        "fly 3",
        "forward",
        "forward 3x4",
        "turn-left 4",
        "turn-left 40x2",
        "forward -1",
        "",
        "jump 1 2",
    ],
)
def test_a_bad_token_is_named(token: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_script(f"wait 1, {token}", "--actions")
    assert caught.value.argument == "--actions"
    assert f"'{token}'" in caught.value.problem
