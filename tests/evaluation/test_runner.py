"""The evaluation from end to end, with a session whose figures are known beforehand."""

from collections.abc import Callable
from pathlib import Path

import pytest

from decmem.evaluation.protocol import Protocol, Window
from decmem.evaluation.runner import Runner
from decmem.evaluation.scoring import ROWS
from decmem.world.episode import Episode

from .fakes import (
    CODEC_ERROR,
    FULL_ERROR,
    OFF_ERROR,
    FakeSession,
    fake_episode,
    psnr_of,
)

BANK, LENGTH = 21, 61
PROTOCOL = Protocol((5, 6, 7), ("retrace", "free"), (Window(22, 29), Window(54, 61)), BANK)


def episodes() -> dict[int, Episode]:
    return {seed: fake_episode(seed, LENGTH, turned_from=50) for seed in PROTOCOL.seeds}


def runner(
    tmp_path: Path, session: FakeSession, window: FakeSession | None = None, **changed: object
) -> Runner:
    render: Callable[[int, str], Episode] = lambda seed, walk: session.episodes[seed]  # noqa: E731
    parts = {
        "protocol": PROTOCOL,
        "session": session,
        "window_session": window,
        "render": render,
        "out": tmp_path,
        "settings": {"steps": 4},
        **changed,
    }
    return Runner(**parts)


def test_every_row_gets_its_own_figures(tmp_path: Path) -> None:
    known = episodes()
    session, window = FakeSession(known), FakeSession(known, error=8)
    *_, scores = runner(tmp_path, session, window).finish()
    assert [(score.walk, score.seed) for score in scores] == [
        ("retrace", 5), ("retrace", 6), ("retrace", 7), ("free", 5), ("free", 6), ("free", 7)
    ]  # fmt: skip
    for score in scores:
        assert set(score.psnr) == set(ROWS)
        expected = {
            "decoupled": FULL_ERROR,
            "window": 8,
            "without_global_memory": OFF_ERROR,
            "shuffled_memory": OFF_ERROR,
            "codec": CODEC_ERROR,
        }
        for name, error in expected.items():
            assert score.psnr[name] == pytest.approx([psnr_of(error)] * (LENGTH - BANK), abs=1e-3)
            value = score.windows["54-61"][name]["psnr_per_frame"]
            assert value == pytest.approx(psnr_of(error), abs=1e-3)
        # Against the coded truth, one value off itself, the model is two values off.
        coded = score.windows["22-29"]["decoupled"]["psnr_vs_codec"]
        assert coded == pytest.approx(psnr_of(FULL_ERROR - CODEC_ERROR), abs=1e-3)
        # The camera turns round at frame 51: all seen before, nothing after.
        assert score.seen == {"22-29": 1.0, "54-61": 0.0}
        warped = score.psnr["oracle_warp"]
        assert [value is not None for value in warped] == [True] * 8 + [False] * 24 + [True] * 8


def test_same_worlds_in_every_row_and_memory_off_while_recording(tmp_path: Path) -> None:
    session = FakeSession(episodes())
    list(runner(tmp_path, session).finish())
    # seeds, global memory, shuffled: one group of three, three roll-outs a walk.
    assert session.rollouts == 2 * [
        ([5, 6, 7], True, False),
        ([5, 6, 7], True, True),
        ([5, 6, 7], False, False),
    ]
    # Both dreams with the memory on read one recording, and frames are coded once a walk.
    assert session.recordings == 2 * [(True, True), (False, False)]
    assert session.global_memory


def test_a_walk_is_measured_in_its_own_windows(tmp_path: Path) -> None:
    """Still walks are longer than the others here, and every row of them is drawn to their end."""
    lengths = {"still": LENGTH, "free": 41}
    free, still = (Window(22, 29), Window(34, 41)), (Window(22, 29), Window(46, 53), Window(54, 61))
    protocol = Protocol((5, 6), ("free", "still"), free, BANK, still)
    session = FakeSession({})

    def render(seed: int, walk: str) -> Episode:
        session.episodes[seed] = fake_episode(seed, lengths[walk])
        return session.episodes[seed]

    stages: list[tuple[str, int, int]] = []
    run = runner(tmp_path, session, protocol=protocol, render=render)
    *_, scores = run.finish(lambda *told: stages.append(told))
    assert stages[-1][1:] == (2 * 3 * (20 + 40),) * 2
    for score in scores:
        windows = still if score.walk == "still" else free
        assert list(score.windows) == [window.name for window in windows]
        assert list(score.seen) == list(score.windows)
        for rows in score.windows.values():
            assert set(rows) == {"truth", *ROWS} - {"window"}
            assert rows["decoupled"]["psnr_per_frame"] == pytest.approx(
                psnr_of(FULL_ERROR), abs=1e-3
            )
        assert len(score.psnr["decoupled"]) == lengths[score.walk] - BANK
        # The fake's camera never moves: the warp shows the mean of what the bank saw.
        assert score.psnr["oracle_warp"][-1] is not None


def test_a_lone_world_has_no_other_memory_to_read(tmp_path: Path) -> None:
    session = FakeSession(episodes())
    lone = Protocol((6,), ("retrace",), PROTOCOL.windows, BANK)
    *_, scores = runner(tmp_path, session, protocol=lone).finish()
    assert set(ROWS) - set(scores[0].psnr) == {"window", "shuffled_memory"}


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    known = episodes()
    session = FakeSession(known)
    first = next(runner(tmp_path, session).finish())
    assert [(score.walk, score.seed) for score in first] == [
        ("retrace", 5), ("retrace", 6), ("retrace", 7)
    ]  # fmt: skip
    again = FakeSession(known)
    *_, scores = runner(tmp_path, again).finish()
    assert len(scores) == 6
    assert len(again.rollouts) == 3  # the free walk only
    done = FakeSession(known)
    *_, same = runner(tmp_path, done).finish()
    assert same == scores
    assert done.rollouts == []
    other = FakeSession(known)
    list(runner(tmp_path, other, settings={"steps": 8}).finish())
    assert len(other.rollouts) == 6


def test_progress_counts_up_to_all(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    run = runner(tmp_path, FakeSession(episodes()))
    list(run.finish(lambda stage, done, total: seen.append((stage, done, total))))
    assert {total for _, _, total in seen} == {2 * 3 * 3 * (LENGTH - BANK)}
    counts = [done for _, done, _ in seen]
    assert counts == sorted(counts)
    assert counts[-1] == seen[-1][2]
    assert {"retrace: rendering", "free: shuffled_memory", "free: yardsticks"} <= {
        stage for stage, _, _ in seen
    }
