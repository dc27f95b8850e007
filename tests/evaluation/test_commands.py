"""``decmem demo`` and ``decmem eval`` from the command line, with an untrained tiny model."""

import json
from pathlib import Path

import pytest

from decmem.cli import main
from decmem.evaluation import protocol
from decmem.evaluation.protocol import Window
from decmem.experiment import to_plain
from decmem.presets import TINY
from decmem.shards import save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags that name the weights."""
    folder = tmp_path_factory.mktemp("weights")
    codec, model = folder / "codec.safetensors", folder / "model.safetensors"
    save_weights(codec, TINY.build_codec().state_dict(), {"codec": to_plain(TINY.codec)})
    save_weights(model, TINY.build_model().state_dict(), {"model": to_plain(TINY.model)})
    return ["--preset", "tiny", "--weights", str(model), "--codec-weights", str(codec)]


def test_demo_on_tiny(
    weights: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    asked = ["--seconds", "0.8", "--episodes", "1", "--steps", "1", "--device", "cpu"]
    assert main(["demo", *weights, *asked, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "contact_sheet.png", "demo.mp4", "psnr.png", "report.json"
    ]  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["seeds"] == [10_000_000]
    assert report["first_frame"] == 222
    assert {name: len(curve) for name, curve in report["psnr"].items()} == {
        "full": 8, "without_global_memory": 8, "codec": 8
    }  # fmt: skip
    assert all(report["seconds"][name] > 0 for name in ("prefill", "rollout", "decode"))
    assert report["machine"]["device"] == "cpu"
    assert len(report["weights_sha256"]) == 64
    said = capsys.readouterr().out
    assert "demo.mp4" in said
    assert "8 dreamt frames in 1 world" in said


def test_eval_on_tiny(
    weights: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(protocol, "WINDOWS", (Window(222, 229),))
    monkeypatch.setattr(protocol, "STILL_WINDOWS", (Window(226, 233),))
    out = tmp_path / "eval"
    asked = ["--episodes", "2", "--walks", "free", "--steps", "1", "--device", "cpu"]
    command = ["eval", *weights, *asked, "--out", str(out)]
    assert main(command) == 0
    results = json.loads((out / "results.json").read_text())
    assert (results["episodes"], results["complete"], results["steps"]) == (2, True, 1)
    assert results["seeds"] == [10_000_000, 10_000_001]
    assert {row["walk"] for row in results["rows"]} == {"free_seen", "free_novel"}
    assert {row["window"] for row in results["rows"]} == {"222-229"}
    kept = sorted((out / "episodes").iterdir())
    assert [path.name for path in kept] == ["free_10000000.json", "free_10000001.json"]
    assert "| oracle_warp |" in capsys.readouterr().out
    written = kept[0].stat().st_mtime_ns
    assert main(command) == 0  # everything is kept: nothing is rolled out again
    assert kept[0].stat().st_mtime_ns == written

    asked = ["--episodes", "1", "--walks", "still", "--steps", "1", "--device", "cpu"]
    live = ["--chunk", "1", "--retrieved", "3"]
    live += ["--guidance", "1.5", "--share-lists", "--retrieve-until", "1"]
    assert main(["eval", *weights, *asked, *live, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert (results["chunk"], results["retrieved"]) == (1, 3)
    named = ("guidance", "share_lists", "retrieve_until")
    assert tuple(results[name] for name in named) == (1.5, True, 1)
    assert {(row["walk"], row["window"]) for row in results["rows"]} == {("still", "226-233")}
    copied = next(
        row["value"]
        for row in results["rows"]
        if row["memory"] == "copy_last" and row["metric"] == "psnr_per_frame"
    )
    assert copied == 60, "the truth stands still: the last frame seen is every frame"


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (["demo", "--preset", "huge"], "preset"),
        (["demo", "--seconds", "0"], "--seconds"),
        (["demo", "--episodes", "0"], "--episodes"),
        (["demo", "--steps", "0"], "--steps"),
        (["demo", "--weights", "nowhere.safetensors"], "weights"),
        (["eval", "--seed-base", "9999999"], "--seed-base"),
        (["eval", "--episodes", "-1"], "--episodes"),
        (["eval", "--walks"], "--walks"),
        (["eval", "--window-weights", "nowhere.safetensors"], "weights"),
        (["eval", "--batch", "0"], "--batch"),
        (["eval", "--share-lists"], "--share-lists"),
        (["eval", "--retrieve-until", "0"], "--retrieve-until"),
    ],
)
def test_bad_requests_name_their_flag_and_leave_nothing(
    asked: list[str],
    named: str,
    weights: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [] if {"--preset", "--weights"} & set(asked) else weights
    assert main([asked[0], *given, *asked[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert named in error.split(":")[1]
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
