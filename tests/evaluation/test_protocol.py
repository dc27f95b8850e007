"""Windows, seeds, batches, and which group an episode counts in."""

import numpy as np
import pytest

from decmem.errors import UserError
from decmem.evaluation.protocol import (
    LONG_WINDOW,
    WINDOWS,
    Protocol,
    Window,
    batches,
    group_of,
    groups_of,
    held_out_seeds,
)


def test_windows_count_from_one_and_include_both_ends() -> None:
    window = Window(222, 229)
    assert window.name == "222-229"
    clip = np.arange(1, 342)  # frame numbers
    assert clip[window.of_clip()].tolist() == list(range(222, 230))
    assert clip[221:][window.of_dream(221)].tolist() == list(range(222, 230))


def test_the_paper_windows_set_the_length() -> None:
    assert Protocol((1,)).dreamt_of("free") == 120
    long = Protocol((1,), windows=(*WINDOWS, LONG_WINDOW))
    assert (long.frames_of("retrace"), long.dreamt_of("retrace") % 4) == (805, 0)
    assert long.groups == ("retrace", "free_seen", "free_novel")


def test_still_walks_have_windows_of_their_own() -> None:
    mixed = Protocol((1,), ("still", "free"))
    assert mixed.frames_of("still") == 221 + 300, "30 s at 10 frames a second"
    assert mixed.frames_of("free") == 341
    first, *later = mixed.windows_of("still")
    assert first == mixed.windows_of("free")[0]
    for window, seconds in zip(later, (5, 15, 30), strict=True):
        assert window.first <= 221 + 10 * seconds <= window.last
        assert (window.first - 222) % 4 == 0, "whole latents"
        assert window.last - window.first == 7
    assert mixed.groups == ("still", "free_seen", "free_novel")
    assert mixed.window_names == ("222-229", "270-277", "370-377", "514-521", "334-341")


def test_held_out_seeds_start_where_training_ends() -> None:
    assert held_out_seeds(10_000_000, 3) == (10_000_000, 10_000_001, 10_000_002)
    with pytest.raises(UserError, match="--seed-base: 9999999 lies among the training seeds"):
        held_out_seeds(9_999_999, 3)
    with pytest.raises(UserError, match="--episodes: 0"):
        held_out_seeds(10_000_000, 0)


@pytest.mark.parametrize(
    ("walk", "seen", "group"),
    [
        ("retrace", 0.1, "retrace"),
        ("still", 0.1, "still"),
        ("free", 0.8, "free_seen"),
        ("free", 0.79, None),
        ("free", 0.21, None),
        ("free", 0.2, "free_novel"),
    ],
)
def test_free_walks_are_split_by_what_the_bank_shows(
    walk: str, seen: float, group: str | None
) -> None:
    assert group_of(walk, seen) == group
    assert group is None or group in groups_of(walk)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 65, 127])
@pytest.mark.parametrize("size", [1, 2, 4, 64])
def test_batches_keep_order_and_company(count: int, size: int) -> None:
    groups = batches(range(count), size)
    assert [seed for group in groups for seed in group] == list(range(count))
    assert max(map(len, groups)) <= max(size, 2) + 1
    assert count == 1 or min(map(len, groups)) >= 2


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="--batch: 0"):
        batches((1, 2), 0)
