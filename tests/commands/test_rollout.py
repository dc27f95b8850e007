"""`decmem rollout` from the command line, with a small random model, on clips of one's own."""

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from decmem.cli import main
from decmem.codec import Autoencoder, CodecConfig
from decmem.data import video as video_module
from decmem.data.video import read_provenance, read_video, write_video
from decmem.experiment import load_codec, load_model, to_plain
from decmem.memory import MemoryConfig, PositionConfig, Reach
from decmem.model import ModelConfig, WorldModel, initialise
from decmem.presets import TINY
from decmem.rollout import Session
from decmem.shards import save_weights, weights_sha256
from decmem.world.actions import FORWARD, YAW, A
from decmem.world.episode import Episode, render_episode
from decmem.world.kinematics import integrate
from decmem.world.track_file import load_track, save_track

SIZE = (32, 48)
KNOWN, ALL = 13, 19  # the video shows so many frames, the track goes on
MODEL = ModelConfig(
    size=SIZE,
    latent_channels=4,
    width=40,
    layers=1,
    ffn_multiple=2,
    time_width=16,
    reading=MemoryConfig(Reach(window=2, write_chunk=1), retrieved=4),
    position=PositionConfig(
        camera=8, space=8, time=4, space_base=100.0, time_base=100.0, reach=64.0, global_time=False
    ),
    chunk_sizes=(1, 2, 4),
)
CODEC = CodecConfig(
    channels=4, widths=(8, 8, 8), encoder_depths=(1, 1, 1), decoder_depths=(1, 1, 1)
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights everywhere: a fresh model answers nothing but silence."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model, codec = WorldModel(MODEL), Autoencoder(CODEC)
    initialise(model)
    with torch.no_grad():
        for p in (*model.parameters(), *codec.parameters()):
            p.add_(torch.randn_like(p) * 0.1)
    paths = {"weights": folder / "m.safetensors", "codec": folder / "c.safetensors"}
    save_weights(paths["weights"], model.state_dict(), {"model": to_plain(MODEL)})
    save_weights(paths["codec"], codec.state_dict(), {"codec": to_plain(CODEC)})
    return paths


@pytest.fixture(scope="module")
def walk() -> Episode:
    return render_episode(3, "free", ALL, SIZE, supersample=1)


def cut(walk: Episode, frames: slice) -> Episode:
    parts = {
        name: getattr(walk, name)[frames]
        for name in ("frames", "world_to_camera", "intrinsics", "actions")
    }
    return Episode(**parts, fps=walk.fps, provenance={"world_seed": 3})


@pytest.fixture(scope="module")
def clip(walk: Episode, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A video, the track of its frames alone, and a longer one."""
    folder = tmp_path_factory.mktemp("clip")
    write_video(folder / "video.mkv", walk.frames[:KNOWN], 10, lossless=True)
    save_track(folder / "track.npz", cut(walk, slice(KNOWN)))
    save_track(folder / "longer.npz", cut(walk, slice(None)))
    return {name: folder / name for name in ("video.mkv", "track.npz", "longer.npz")}


@pytest.fixture
def command(weights: dict[str, Path], clip: dict[str, Path], tmp_path: Path) -> list[str]:
    """A roll-out to tmp_path/out; what is given later replaces it."""
    flags = {
        "--memory": clip["video.mkv"],
        "--track": clip["track.npz"],
        "--out": tmp_path / "out",
        "--preset": "tiny",
        "--weights": weights["weights"],
        "--codec-weights": weights["codec"],
        "--steps": "2",
        "--device": "cpu",
    }
    return ["rollout", *(str(word) for pair in flags.items() for word in pair)]


@pytest.fixture
def dreamt(
    weights: dict[str, Path], walk: Episode
) -> Callable[[np.ndarray, np.ndarray, int], np.ndarray]:
    """The session's own answer, in one go."""

    def made(actions: np.ndarray, poses: np.ndarray, seed: int = 0) -> np.ndarray:
        session = Session(
            load_codec(weights["codec"]).to(memory_format=torch.channels_last),
            load_model(weights["weights"]),
            flow_config=TINY.flow,
            steps=2,
            seeds=[seed],
        )
        known = cut(walk, slice(KNOWN))
        session.observe(known.frames, known.actions, known.world_to_camera, known.intrinsics)
        spare = -len(actions) % 4
        still = np.concatenate((actions, np.zeros((spare, A), np.float32)))
        held = np.concatenate((poses, np.repeat(poses[-1:], spare, axis=0)))
        return session.step(still, held)[: len(actions)]

    return made


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_script_and_the_motion_law(
    command: list[str],
    dreamt: Callable,
    walk: Episode,
    weights: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    asked = ["--actions", "forward 2, turn-left 9x3", "--lossless"]
    assert main([*command, *asked]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"5 frames in {out}, ")
    assert said.err == ""
    assert names(out) == {"dream.mkv", "whole.mkv", "track.npz", "report.json"}

    actions = np.zeros((5, A), np.float32)
    actions[:2, FORWARD], actions[2:, YAW] = 1, -9
    poses = integrate(
        walk.world_to_camera[KNOWN - 1], np.concatenate((np.zeros((1, A), np.float32), actions))
    )[1:]
    dream, fps = read_video(out / "dream.mkv")
    assert fps == 10
    np.testing.assert_array_equal(dream, dreamt(actions, poses))
    whole, _ = read_video(out / "whole.mkv")
    np.testing.assert_array_equal(whole, np.concatenate((walk.frames[:KNOWN], dream)))

    track = load_track(out / "track.npz")
    assert (track.size, track.fps) == (SIZE, 10)
    known = walk.world_to_camera[:KNOWN]
    np.testing.assert_array_equal(track.world_to_camera, np.concatenate((known, poses)))
    np.testing.assert_array_equal(track.actions, np.concatenate((walk.actions[:KNOWN], actions)))
    np.testing.assert_array_equal(track.intrinsics, np.tile(walk.intrinsics[0], (18, 1, 1)))

    report = json.loads((out / "report.json").read_text())
    assert set(report.pop("seconds")) == {"encode", "prefill", "rollout", "decode"}
    assert report == {
        "memory_frames": 13,
        "dreamed_frames": 5,
        "preset": "tiny",
        "weights_sha256": weights_sha256(weights["weights"]),
        "steps": 2,
        "guidance": None,
        "gemm": "auto",
        "seed": 0,
        "provenance": {
            "video": "video.mkv", "track": "track.npz", "world_seed": 3, "dreamed_from_frame": 14
        },
    }  # fmt: skip
    assert read_provenance(out / "dream.mkv")["memory_frames"] == 13


def test_the_track_s_own_future_is_followed(
    command: list[str], dreamt: Callable, clip: dict[str, Path], walk: Episode, tmp_path: Path
) -> None:
    asked = ["--track", str(clip["longer.npz"]), "--seed", "4", "--lossless"]
    assert main([*command, *asked]) == 0
    later = slice(KNOWN, ALL)
    dream, _ = read_video(tmp_path / "out" / "dream.mkv")
    poses = walk.world_to_camera[later]
    np.testing.assert_array_equal(dream, dreamt(walk.actions[later], poses, 4))
    assert (dream != dreamt(walk.actions[later], poses, 0)).any(), "another seed, another dream"
    track = load_track(tmp_path / "out" / "track.npz")
    np.testing.assert_array_equal(track.world_to_camera, walk.world_to_camera)
    np.testing.assert_array_equal(track.actions, walk.actions)
    # A file of actions goes before the track's own future, and brings its own poses.
    moved = cut(walk, slice(KNOWN, KNOWN + 4))
    moved = dataclasses.replace(moved, world_to_camera=moved.world_to_camera[::-1].copy())
    save_track(tmp_path / "future.npz", moved)
    again = ["--actions", str(tmp_path / "future.npz"), "--out", str(tmp_path / "again")]
    assert main([*command, *asked, *again]) == 0
    track = load_track(tmp_path / "again" / "track.npz")
    np.testing.assert_array_equal(track.world_to_camera[KNOWN:], moved.world_to_camera)
    dream, _ = read_video(tmp_path / "again" / "dream.mkv")
    np.testing.assert_array_equal(dream, dreamt(moved.actions, moved.world_to_camera, 4))


def test_any_size_rate_and_length(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    walk = render_episode(4, "free", 23, (48, 72), supersample=1)
    fast = dataclasses.replace(walk, fps=20.0)
    write_video(tmp_path / "v.mp4", fast.frames, 20)
    save_track(tmp_path / "t.npz", fast)
    given = ["--memory", str(tmp_path / "v.mp4"), "--track", str(tmp_path / "t.npz")]
    assert main([*command, *given, "--actions", "forward 4", "--chunk", "1"]) == 0
    warned = capsys.readouterr().err.splitlines()
    assert len(warned) == 3
    assert "is 48 x 72 pixels (height x width), resized to 32 x 48" in warned[0]
    assert "runs at 20 frames per second, resampled to 10" in warned[1]
    assert "the memory has 12 frames and needs 1 + 4n: the oldest 3 are left out" in warned[2]
    assert all(line.startswith("warning: ") for line in warned)
    whole, fps = read_video(tmp_path / "out" / "whole.mp4")
    assert whole.shape == (13, *SIZE, 3)
    assert fps == 10
    track = load_track(tmp_path / "out" / "track.npz")
    np.testing.assert_array_equal(track.world_to_camera[:9], walk.world_to_camera[6::2])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["memory_frames"] == 9


def test_an_output_folder_keeps_what_is_not_ours(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("notes.txt", "dream.mkv", "whole.mkv"):
        (out / name).write_text("old")
    assert main([*command, "--actions", "wait 4"]) == 0
    assert names(out) == {"notes.txt", "dream.mp4", "whole.mp4", "track.npz", "report.json"}
    assert (out / "notes.txt").read_text() == "old"
    assert main([*command, "--actions", "wait 4", "--lossless"]) == 0
    assert names(out) == {"notes.txt", "dream.mkv", "whole.mkv", "track.npz", "report.json"}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([], "--actions: nothing says what happens next"),
        (["--actions", "wait 0"], "--actions: no actions in it"),
        (["--actions", "hop 3"], "--actions: 'hop 3' has the unknown word 'hop'"),
        (["--actions", "none.npz"], "--actions: no file none.npz"),
        (["--actions", "none.csv"], "--actions: none.csv cannot be read"),
        (["--actions", "steep.csv"], "--actions: pitch is 40 in frame 1"),
        (["--actions", "wait 4", "--memory", "none.mp4"], "--memory: none.mp4 does not exist"),
        (["--actions", "wait 4", "--memory", "text.mp4"], "--memory: text.mp4 is damaged or not"),
        (["--actions", "wait 4", "--track", "none.npz"], "--track: no file none.npz"),
        (["--actions", "wait 4", "--track", "text.mp4"], "--track: text.mp4 is not a readable"),
        (["--actions", "wait 4", "--track", "short.npz"], "--track: 12 poses for a video of 13"),
        (["--actions", "wait 4", "--track", "bent.npz"], "--track: pose 2 is not rigid"),
        (["--actions", "wait 4", "--preset", "huge"], "--preset: 'huge' is unknown"),
        (["--actions", "wait 4", "--weights", "none"], "--weights: none is missing"),
        (["--actions", "wait 4", "--weights", "text.mp4"], "--weights: text.mp4 is damaged"),
        (["--actions", "wait 4", "--steps", "0"], "--steps: 0 denoising steps"),
        (["--actions", "wait 4", "--chunk", "3"], "--chunk: 3 latents, trained with (1, 2, 4)"),
        (["--actions", "wait 4", "--device", "abacus"], "--device: 'abacus' is not available"),
        (["--actions", "wait 4", "--out", "text.mp4"], "--out: cannot write text.mp4: a file of"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_bad_requests_are_one_line_and_write_nothing(
    asked: list[str],
    told: str,
    command: list[str],
    clip: dict[str, Path],
    walk: Episode,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.mp4").write_text("text")
    (tmp_path / "steep.csv").write_text("0,0,0,40,0,0\n")
    save_track(tmp_path / "short.npz", cut(walk, slice(KNOWN - 1)))
    with np.load(clip["track.npz"]) as track:
        bent = {name: track[name] for name in track.files}
    bent["world_to_camera"][1, :3, :3] *= 1.1
    np.savez(tmp_path / "bent.npz", **bent)
    before = names(tmp_path)
    assert main([*command, *asked]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {told}")
    assert err.count("\n") == 1
    assert out == ""
    assert names(tmp_path) == before


def test_the_clip_itself_is_never_overwritten(
    command: list[str], clip: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = clip["track.npz"].parent
    before = {path: path.read_bytes() for path in folder.iterdir()}
    elsewhere = os.path.relpath(folder)  # the same folder by another name
    assert main([*command, "--actions", "wait 4", "--out", elsewhere]) == 2
    assert "track.npz would be overwritten. choose another folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_disk_that_fills_up_leaves_nothing_half_written(
    existing: bool,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "dream.mp4").write_text("earlier")
    written: list[int] = []
    write = video_module.VideoWriter.write

    def full(writer: video_module.VideoWriter, frames: np.ndarray) -> None:
        written.append(len(frames))
        if len(written) == 2:  # dream.mp4 is done, whole.mp4 does not fit
            raise OSError(28, os.strerror(28))
        write(writer, frames)

    monkeypatch.setattr(video_module.VideoWriter, "write", full)
    assert main([*command, "--actions", "wait 4"]) == 2
    assert written == [4, KNOWN + 4]
    err = capsys.readouterr().err
    assert err.startswith("error: --out: cannot write ")
    assert "the disk is full" in err
    assert err.count("\n") == 1
    assert names(tmp_path) == ({"out"} if existing else set())
    if existing:
        assert names(out) == {"dream.mp4"}
        assert (out / "dream.mp4").read_text() == "earlier"


def test_a_forbidden_place_is_told_before_the_dream(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def observed(*given: object) -> None:
        raise AssertionError("dreamt first")

    monkeypatch.setattr(Session, "observe", observed)
    (tmp_path / "file").write_text("in the way")
    asked = ["--actions", "wait 4", "--out", str(tmp_path / "file" / "out")]
    assert main([*command, *asked]) == 2
    assert capsys.readouterr().err.startswith("error: --out: cannot write ")
    assert names(tmp_path) == {"file"}
