"""The demo from end to end with a fake session, and its failures."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from decmem.errors import UserError
from decmem.evaluation import demo
from decmem.evaluation.screening import Screening
from decmem.evaluation.take import CURVES

from .fakes import CODEC_ERROR, FULL_ERROR, OFF_ERROR, FakeSession, fake_episode, psnr_of

BANK, FRAMES, SEEDS = 5, 12, [3, 4]
HEADER = {"preset": "fake", "steps": 4, "weights_sha256": "0" * 64, "world_version": "w/0"}


@pytest.fixture(scope="module")
def shot() -> demo.Shoot:
    episodes = {seed: fake_episode(seed, BANK + FRAMES) for seed in SEEDS}
    return demo.shoot(FakeSession(episodes), episodes.__getitem__, SEEDS, BANK)


def test_the_report_says_what_the_issue_names(shot: demo.Shoot) -> None:
    report = demo.demo_report(shot, HEADER)
    assert report["first_frame"] == BANK + 1
    assert report["seeds"] == SEEDS
    assert report["seconds"] == {"prefill": 0.5, "rollout": 2.0, "decode": 0.25}
    expected = {
        "full": psnr_of(FULL_ERROR),
        "without_global_memory": psnr_of(OFF_ERROR),
        "codec": psnr_of(CODEC_ERROR),
    }
    for name, value in expected.items():
        assert np.asarray(report["psnr"][name]) == pytest.approx([value] * FRAMES, abs=1e-3)
    assert [episode["seed"] for episode in report["per_episode"]] == SEEDS
    assert "38.6 dB" in demo.in_one_sentence(report)
    assert "18.6 dB" in demo.in_one_sentence(report)


def test_the_files_are_all_there_and_play(shot: demo.Shoot, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    stages: list[tuple[str, int, int]] = []
    report = demo.write_demo(shot, HEADER, out, lambda *stage: stages.append(stage))
    assert sorted(path.name for path in out.iterdir()) == [
        "contact_sheet.png", "demo.mp4", "psnr.png", "report.json"
    ]  # fmt: skip
    stored = json.loads((out / "report.json").read_text())
    assert len(stored["psnr"]["full"]) == FRAMES
    assert stored["weights_sha256"] == report["weights_sha256"]
    screening = Screening(shot.takes[0])
    with av.open(str(out / "demo.mp4")) as film:
        assert film.streams.video[0].codec_context.name == "h264"
        pictures = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(pictures) == 2 * len(screening) == stages[-1][1] == stages[-1][2]
    assert pictures[0].shape == (*screening.size, 3)
    # The truth panel of the last frame of the first world shows its last frame, enlarged.
    shown = pictures[len(screening) - 1].astype(float)
    left, top = screening.lefts[0], 148
    scale = screening.panel[0] // shot.takes[0].truth.shape[2]
    panel = shown[top : top + screening.panel[1], left : left + screening.panel[0]]
    coarse = panel.reshape(-1, scale, panel.shape[1] // scale, scale, 3).mean(axis=(1, 3))
    assert np.abs(coarse - shot.takes[0].truth[-1]).mean() < 6
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 1000


def test_nothing_is_left_behind_when_drawing_fails(
    shot: demo.Shoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "contact_sheet", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.write_demo(shot, HEADER, tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


def test_the_curve_grows_with_time(shot: demo.Shoot) -> None:
    screening = Screening(shot.takes[0])
    strip = screening.strip
    empty, half, whole = (np.asarray(strip.picture(i)) for i in (None, FRAMES // 2, FRAMES - 1))
    drawn_half = (half != empty).any(axis=(0, 2)).nonzero()[0]
    drawn_whole = (whole != empty).any(axis=(0, 2)).nonzero()[0]
    assert drawn_half.max() < 0.65 * strip.size[0] < drawn_whole.max()
    assert set(shot.takes[0].psnr) == set(CURVES)
    shown = np.asarray(screening.dream(FRAMES // 2))
    part = shown[screening.foot : screening.foot + strip.size[1], screening.lefts[1] :]
    assert (part[:, : strip.size[0]] == half).all()


def test_keys_light_up_when_used(shot: demo.Shoot) -> None:
    from dataclasses import replace

    quiet = replace(shot.takes[0], actions=np.zeros_like(shot.takes[0].actions))
    for column, value in [(0, 1), (0, -1), (1, 1), (2, -5), (3, 5), (4, 1), (5, 1)]:
        actions = quiet.actions.copy()
        actions[4, column] = value
        busy = Screening(replace(quiet, actions=actions))
        changed = np.asarray(busy.dream(4)) != np.asarray(Screening(quiet).dream(4))
        rows, columns = changed.any(axis=2).nonzero()
        assert len(rows) > 500
        assert rows.min() > busy.foot
        assert columns.max() < busy.lefts[1]


@pytest.mark.parametrize(("seconds", "frames"), [(12.0, 120), (60.0, 600), (0.4, 4), (1.3, 12)])
def test_a_demo_is_a_whole_number_of_latents(seconds: float, frames: int) -> None:
    assert demo.dreamt_frames(seconds) == frames


@pytest.mark.parametrize("seconds", [0.0, -3.0, 1e9, float("nan")])
def test_impossible_lengths_are_refused(seconds: float) -> None:
    with pytest.raises(UserError, match="--seconds"):
        demo.dreamt_frames(seconds)
