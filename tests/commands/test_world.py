"""`decmem world render` writes a pair of files that belong together."""

import logging
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from decmem.cli import main
from decmem.commands import world
from decmem.data.video import read_provenance, read_video
from decmem.world.episode import render_episode
from decmem.world.track_file import load_track
from decmem.world.walks import WalkKind

SMALL = ["world", "render", "--walk", "free", "--frames", "5", "--size", "32", "48"]


def test_the_command_knows_every_walk() -> None:
    assert get_args(world.Walk) == get_args(WalkKind)


def test_video_and_track_belong_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*SMALL, "--seed", "7", "--out", str(out), "--lossless", "--depth"]) == 0
    assert "5 frames" in capsys.readouterr().out
    frames, fps = read_video(out / "video.mkv")
    track = load_track(out / "track.npz")
    truth = render_episode(7, "free", 5, (32, 48))
    np.testing.assert_array_equal(frames, truth.frames)
    np.testing.assert_array_equal(track.world_to_camera, truth.world_to_camera)
    np.testing.assert_array_equal(track.actions, truth.actions)
    np.testing.assert_array_equal(track.depth, truth.depth)
    assert fps == track.fps == truth.fps
    assert track.size == (32, 48)
    assert read_provenance(out / "video.mkv")["world_seed"] == 7


def test_a_second_run_leaves_no_stale_video(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for lossless in (["--lossless"], []):
        assert main([*SMALL, "--out", str(tmp_path), *lossless]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "video.mp4", "track.npz"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frames", "0"], "error: --frames: got 0"),
        (["--size", "31", "48"], "error: --size: h264 needs an even height"),
        (["--frames", "9000000000"], "error: --out: "),
    ],
    ids=["frames", "size", "space"],
)
def test_bad_requests_write_nothing(
    flags: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    assert main([*SMALL, *flags, "--out", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    assert text.startswith(message)
    assert text.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
