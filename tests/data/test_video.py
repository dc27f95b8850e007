"""Videos survive the disk; broken ones are told apart."""

import errno
import logging
import os
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pytest

from decmem.data import video
from decmem.data.video import (
    VideoWriter,
    read_provenance,
    read_video,
    video_writer,
    write_video,
)
from decmem.errors import UserError


def noise(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    rng = np.random.default_rng(42)
    return rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def ramp(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frame t is grey of level 10 t: a frame can be told by its level."""
    levels = np.arange(count, dtype=np.uint8)[:, None, None, None] * 10
    return np.broadcast_to(levels, (count, height, width, 3)).copy()


def levels(frames: np.ndarray) -> list[int]:
    return np.rint(frames.mean((1, 2, 3)) / 10).astype(int).tolist()


@pytest.mark.parametrize("size", [(64, 96), (65, 97)], ids=["even", "odd"])
def test_lossless_is_exact(size: tuple[int, int], tmp_path: Path) -> None:
    frames = noise(7, *size)
    write_video(tmp_path / "x.mkv", frames, 10, lossless=True)
    back, fps = read_video(tmp_path / "x.mkv")
    np.testing.assert_array_equal(back, frames)
    assert fps == 10


@pytest.mark.parametrize("codec", [c for c in get_args(video.VideoCodec) if c != "ffv1"])
def test_lossy_keeps_count_rate_and_colours(codec: str, tmp_path: Path) -> None:
    frames = np.zeros((12, 64, 96, 3), np.uint8)
    frames[:, :, :48], frames[:, :, 48:] = (200, 30, 40), (20, 60, 180)
    write_video(tmp_path / "x.mp4", frames, 29.97, codec=codec)
    back, fps = read_video(tmp_path / "x.mp4")
    assert back.shape == frames.shape
    assert fps == pytest.approx(29.97, abs=0.001)
    inner = np.abs(back.astype(int) - frames)[:, :, [10, 85]]
    assert inner.max() <= 4


def test_colours_are_labelled_for_players(tmp_path: Path) -> None:
    write_video(tmp_path / "x.mp4", noise(2), 10)
    with av.open(str(tmp_path / "x.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (6, 1)


def test_index_comes_before_the_pictures(tmp_path: Path) -> None:
    write_video(tmp_path / "x.mp4", noise(3), 10)
    content = (tmp_path / "x.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_pieces_equal_the_whole(tmp_path: Path) -> None:
    frames = noise(9)
    with video_writer(tmp_path / "pieces.mkv", (64, 96), 10, lossless=True) as writer:
        for start in range(0, 9, 4):
            writer.write(frames[start : start + 4])
    np.testing.assert_array_equal(read_video(tmp_path / "pieces.mkv")[0], frames)


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv"])
def test_provenance_comes_back(name: str, tmp_path: Path) -> None:
    provenance = {"seed": 7, "walk": "retrace"}
    write_video(tmp_path / name, noise(2), 10, provenance=provenance)
    assert read_provenance(tmp_path / name) == provenance
    write_video(tmp_path / name, noise(2), 10)
    assert read_provenance(tmp_path / name) == {}


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(self: VideoWriter, frames: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(VideoWriter, "write", fill_up)
    with pytest.raises(UserError, match=r"x\.mp4: the disk is full"):
        write_video(tmp_path / "new" / "x.mp4", noise(2), 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "size", "options", "message"),
    [
        ("x.mp4", (63, 96), {}, "even height and width, got 63 x 96"),
        ("x.avi", (64, 96), {}, r"end the name in \.mp4"),
        ("x.mp4", (64, 96), {"lossless": True}, r"end the name in \.mkv"),
        ("x.mp4", (64, 96), {"fps": 0}, "0 frames a second"),
    ],
    ids=["odd", "suffix", "lossless", "rate"],
)
def test_bad_requests_name_the_cure(
    name: str, size: tuple[int, int], options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        write_video(tmp_path / name, noise(1, *size), **{"fps": 10, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_encoder_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"ffv1"})
    with pytest.raises(UserError, match=r"no libx264 encoder\. reinstall PyAV"):
        write_video(tmp_path / "x.mp4", noise(1), 10)


def test_frames_of_another_size_are_a_bug(tmp_path: Path) -> None:
    def mix() -> None:
        with video_writer(tmp_path / "x.mp4", (64, 96), 10) as writer:
            writer.write(noise(1, 32, 32))

    with pytest.raises(ValueError, match=r"frames are \(32, 32\), the video is \(64, 96\)"):
        mix()
    assert list(tmp_path.iterdir()) == []


def test_resizing_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_video(tmp_path / "x.mkv", ramp(3, 64, 96), 10, lossless=True)
    with caplog.at_level(logging.WARNING):
        frames, _ = read_video(tmp_path / "x.mkv", size=(32, 48))
    assert frames.shape == (3, 32, 48, 3)
    assert levels(frames) == [0, 1, 2]
    assert "resized to 32 x 48" in caplog.text
    assert "proportions" not in caplog.text
    with caplog.at_level(logging.WARNING):
        read_video(tmp_path / "x.mkv", size=(32, 32))
    assert "proportions" in caplog.text


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (5, [0, 2, 4, 6, 8]),
        (20, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9]),
        (4, [0, 2, 5, 7]),
        (10, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_resampling_takes_the_nearest_frame(
    rate: int, expected: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_video(tmp_path / "x.mkv", ramp(10), 10, lossless=True)
    with caplog.at_level(logging.WARNING):
        frames, fps = read_video(tmp_path / "x.mkv", fps=rate)
    assert levels(frames) == expected
    assert fps == rate
    assert ("resampled" in caplog.text) == (rate != 10)


def test_limit_stops_early(tmp_path: Path) -> None:
    write_video(tmp_path / "x.mkv", ramp(10), 10, lossless=True)
    assert levels(read_video(tmp_path / "x.mkv", limit=3)[0]) == [0, 1, 2]


def test_unreadable_files_are_told_apart(tmp_path: Path) -> None:
    whole = tmp_path / "whole.mp4"
    write_video(whole, noise(30), 10)
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name, message in {
        "absent.mp4": "does not exist. check the path",
        "cut.mp4": "is damaged",
        "text.mp4": "is damaged or not a video",
        "empty.mp4": "is damaged or not a video",
        ".": "is a folder",
    }.items():
        with pytest.raises(UserError, match=rf"^--memory: .*{message}"):
            read_video(tmp_path / name, argument="--memory")


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        silence = np.zeros((2, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="has no video in it"):
        read_video(tmp_path / "a.mp4")
