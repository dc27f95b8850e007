"""`decmem train` from the command line, with the tiny preset: what it writes, what it refuses."""

import dataclasses
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from decmem import __version__, experiment, shards
from decmem.cli import main
from decmem.codec import Autoencoder
from decmem.experiment import load_codec, load_model, to_plain
from decmem.presets import TINY
from decmem.rollout import Session
from decmem.shards import load_weights, save_weights, weights_sha256
from decmem.training import checkpoint, runs
from decmem.training.codec_task import CodecTask
from decmem.world.episode import render_episode
from decmem.world.version import HELD_OUT_SEED_BASE, WORLD_VERSION

SMALL = ["--preset", "tiny", "--walks", "2", "--device", "cpu"]
HEIGHT, WIDTH = TINY.model.size


@pytest.fixture(scope="module", autouse=True)
def _as_before() -> Iterator[None]:
    """A command may set up its process; these tests share theirs with others."""
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", autouse=True)
def _cheap() -> Iterator[None]:
    """All the sheets show the same held-out worlds; a few clips are enough for statistics."""
    with pytest.MonkeyPatch.context() as patch:
        measure = functools.partialmethod(CodecTask.measure, clips=8)
        patch.setattr(CodecTask, "measure", measure)
        patch.setattr(runs, "render_episode", functools.cache(render_episode))
        yield


def train(*command: str) -> None:
    assert main(["train", command[0], *SMALL, *command[1:]]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def codec(folder: Path) -> Path:
    """A codec after two steps."""
    train("codec", "--steps", "2", "--out", str(folder / "codec"))
    return folder / "codec" / "tiny-codec.safetensors"


@pytest.fixture(scope="module")
def causal(folder: Path, codec: Path) -> Path:
    """A causal backbone after two steps."""
    train("causal", "--steps", "2", "--codec", str(codec), "--out", str(folder / "causal"))
    return folder / "causal" / "tiny.safetensors"


@pytest.fixture(scope="module")
def memory(folder: Path, codec: Path, causal: Path) -> Path:
    """The second stage, with rates so small that the first one's weights stay."""
    command = ["--steps", "1", "--rate", "1e-12", "--from", str(causal), "--seed", "3", "--int8"]
    train("memory", *command, "--codec", str(codec), "--out", str(folder / "memory"))
    return folder / "memory" / "tiny.safetensors"


def card_of(weights: Path) -> dict:
    return json.loads(weights.with_suffix(".json").read_text())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_codec_run(codec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert names(codec.parent) == {
        "log.jsonl", "sheet.png", "step_00000002", "tiny-codec.json", "tiny-codec.safetensors"
    }  # fmt: skip
    card = card_of(codec)
    training = dataclasses.replace(TINY.codec_training, steps=2, walks=2)
    assert card.pop("seconds") > 0
    assert card == {
        "weights": ["tiny-codec.safetensors"],
        "sha256": weights_sha256(codec),
        "decmem": __version__,
        "world_version": WORLD_VERSION,
        "stage": "codec",
        "training": to_plain(training),
        "size": [HEIGHT, WIDTH],
        "preset": "tiny",
        "seed": 0,
        "steps": 2,
        "processes": 1,
        "device": "cpu",
        "torch": torch.__version__,
        "init": None,
        "codec": to_plain(TINY.codec),
    }
    # The average of the weights is what is given away; matrices as fp16.
    state = load_file(codec.parent / "step_00000002" / "state.safetensors")
    made = load_codec(codec)
    for name, x in made.named_parameters():
        average = state[f"average/{name}"]
        assert x.equal(average.half().float() if x.dim() >= 2 else average), name
    assert made.mean.any(), "the statistics of the latents were measured"
    assert not made.deviation.eq(1).any()
    # Three worlds, truth above reconstruction, six frames each.
    sheet = np.asarray(Image.open(codec.parent / "sheet.png"))
    assert sheet.shape == (6 * HEIGHT, 6 * WIDTH, 3)
    truth = runs.render_episode(HELD_OUT_SEED_BASE + 2, "train", 65, TINY.model.size, device="cpu")
    np.testing.assert_array_equal(sheet[4 * HEIGHT : 5 * HEIGHT, -WIDTH:], truth.frames[-1])


def test_causal_run(causal: Path, codec: Path) -> None:
    assert names(causal.parent) == {
        "log.jsonl", "sheet.png", "step_00000002", "tiny.json", "tiny.safetensors"
    }  # fmt: skip
    card = card_of(causal)
    assert card["stage"] == "dense"
    assert card["codec_sha256"] == weights_sha256(codec)
    assert card["training"] == to_plain(dataclasses.replace(TINY.memory_training, steps=2, walks=2))
    assert card["flow"] == to_plain(TINY.flow)
    model = load_model(causal)
    assert card["model"] == to_plain(model.config)
    assert model.config.memory == "dense"
    assert model.config.reading.reach.window is None
    assert not any("gate" in name for name, _ in model.named_parameters())
    with Image.open(causal.parent / "sheet.png") as sheet:
        assert sheet.size == (8 * WIDTH, 6 * HEIGHT)


def test_a_window_model_starts_from_weights_with_a_gate(
    memory: Path, codec: Path, tmp_path: Path
) -> None:
    train(
        "memory", "--codec", str(codec), "--memory", "window", "--steps", "1",
        "--rate", "1e-12", "--from", str(memory), "--out", str(tmp_path / "window"),
    )  # fmt: skip
    after, _ = load_weights(tmp_path / "window" / "tiny.safetensors")
    before, _ = load_weights(memory)
    assert before.keys() - after.keys() == {n for n in before if ".gate." in n}
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], atol=2e-2, rtol=2e-2)


def test_memory_starts_from_the_causal_backbone(memory: Path, causal: Path, codec: Path) -> None:
    card = card_of(memory)
    assert (card["stage"], card["seed"]) == ("decoupled", 3)
    before = card["init"]
    assert (before["weights"], before["stage"], before["steps"]) == ("tiny.safetensors", "dense", 2)
    assert before["sha256"] == weights_sha256(causal)
    assert card["training"]["short_until"] == 0.0  # given weights can retrieve
    assert card["model"] == to_plain(TINY.model)
    before, _ = load_weights(causal)
    after, _ = load_weights(memory)
    gates = after.keys() - before.keys()
    assert gates
    assert all(".memory.gate." in name for name in gates)
    assert before.keys() <= after.keys()
    for name, x in before.items():
        # int8 rows: half a step of the row.
        step = x.abs().amax() / 127
        assert (after[name] - x).abs().max() <= 0.51 * step + 1e-9, name
    assert memory.stat().st_size < 0.75 * causal.stat().st_size
    session = Session.open("tiny", memory, codec, device="cpu")
    assert session.weights_sha256 == card["sha256"]


def test_a_paused_run_ends_as_an_unbroken_one(
    codec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)]
    train("codec", "--steps", "2", "--pause-after", "0", *out)
    assert "paused; continue with the same command and --resume" in capsys.readouterr().out
    # What was learned so far can be looked at and used.
    assert names(tmp_path) == {
        "log.jsonl", "sheet.png", "step_00000001", "tiny-codec.json", "tiny-codec.safetensors"
    }  # fmt: skip
    assert card_of(tmp_path / "tiny-codec.safetensors")["steps"] == 1
    train("codec", "--steps", "2", "--resume", *out)
    again = tmp_path / "tiny-codec.safetensors"
    assert f"weights in {again}" in capsys.readouterr().out
    (ours, _), (theirs, _) = load_weights(again), load_weights(codec)
    assert ours.keys() == theirs.keys()
    assert all(x.equal(theirs[name]) for name, x in ours.items())


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The one line that a command is refused with."""
    assert main(["train", *command]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("100.0%")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--preset", "huge"], "--preset: 'huge' is unknown"),
        (["--seconds", "5", "--steps", "2"], "--seconds: given together with --steps"),
        (["--steps", "0"], "--steps: got 0, expected a finite number above 0"),
        (["--steps", "-3"], "--steps: got -3"),
        (["--batch", "0"], "--batch: got 0"),
        (["--walks", "0"], "--walks: got 0"),
        (["--seconds", "nan"], "--seconds: got nan"),
        (["--rate", "nan"], "--rate: got nan"),
        (["--rate", "inf"], "--rate: got inf"),
        (["--rate", "0"], "--rate: got 0"),
        (["--pause-after", "nan"], "--pause-after: got nan"),
        (["--checkpoint-every", "-1"], "--checkpoint-every: got -1"),
        (["--seed", str(2**70)], f"--seed: {2**70} has more than 64 bits"),
        (["--device", "abacus"], "--device: 'abacus' is not available"),
        (["--walks", "90000000"], "--walks: 90000000 from walk 0 on reach held-out worlds"),
        (["--from", "nowhere.safetensors"], "--from: nowhere.safetensors is missing"),
        (["--out", "here"], "--out: here is a file"),
    ],
    ids=lambda value: " ".join(value)[:24] if isinstance(value, list) else "",
)
def test_bad_options_are_told_before_any_work(
    asked: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").write_text("a file")
    given = {**dict(zip(SMALL[::2], SMALL[1::2], strict=True)), "--out": "run"}
    given |= dict(zip(asked[::2], asked[1::2], strict=True))
    flags = [word for pair in given.items() for word in pair]
    assert refused(capsys, "codec", *flags).startswith(told)
    assert names(tmp_path) == {"here"}


@pytest.fixture(scope="module")
def other_codec(folder: Path) -> Path:
    """A codec of eight channels, where the tiny model has sixteen."""
    config = dataclasses.replace(TINY.codec, channels=8)
    path = folder / "other.safetensors"
    save_weights(path, Autoencoder(config).state_dict(), {"codec": to_plain(config)})
    return path


def test_weights_that_do_not_fit_are_told_before_any_work(
    codec: Path,
    causal: Path,
    other_codec: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def worked(*given: object) -> None:
        raise AssertionError("walks were rendered first")

    monkeypatch.setattr(runs, "LatentCache", worked)
    none, cut = tmp_path / "none.safetensors", tmp_path / "cut.safetensors"
    cut.write_bytes(codec.read_bytes()[:1000])
    out = str(tmp_path / "out")
    for stage in ("memory", "causal"):
        for flags, told in (
            (["--codec", str(none)], f"--codec: {none} is missing"),
            (["--codec", str(cut)], f"--codec: {cut} is damaged"),
            (["--codec", str(causal)], f"--codec: {causal} holds model, not a codec"),
            (["--codec", str(other_codec)], f"--codec: {other_codec} has 8 latent channels, tiny"),
            (["--codec", str(codec), "--from", str(codec)], f"--from: {codec} does not fit"),
            (["--codec", str(codec), "--from", str(cut)], f"--from: {cut} is damaged"),
        ):
            line = refused(capsys, stage, *SMALL, *flags, "--out", out)
            assert line.startswith(told)
    assert refused(capsys, "codec", *SMALL, "--from", str(other_codec), "--out", out).startswith(
        f"--from: {other_codec} does not fit this preset"
    )
    # Without the flag it is the preset's own codec, and this preset ships none.
    monkeypatch.setattr(experiment, "shipped_weights", lambda name: tmp_path / name)
    line = refused(capsys, "memory", *SMALL, "--out", out)
    assert line.startswith(f"--codec: {tmp_path / 'tiny-codec'} is missing")
    assert names(tmp_path) == {"cut.safetensors"}


def test_a_run_is_not_mixed_with_another(
    codec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def worked(*given: object) -> None:
        raise AssertionError("walks were rendered first")

    monkeypatch.setattr(runs, "CodecTask", worked)
    out = ["--out", str(codec.parent)]
    before = {path: path.stat().st_mtime_ns for path in codec.parent.rglob("*")}
    assert "holds a run already. Add --resume" in refused(
        capsys, "codec", *SMALL, "--steps", "2", *out
    )
    for flags, named in (
        (["--steps", "3"], "(training.steps differ)"),
        (["--steps", "2", "--seed", "1"], "(seed differ)"),
        (["--steps", "2", "--rate", "0.5"], "(rate differ)"),
    ):
        line = refused(capsys, "codec", *SMALL, *flags, "--resume", *out)
        assert line.startswith("--resume: ")
        assert f"was made with another configuration {named}" in line
    assert {path: path.stat().st_mtime_ns for path in codec.parent.rglob("*")} == before


@pytest.mark.parametrize("where", ["checkpoint", "weights"])
def test_a_full_disk_is_one_line(
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.ERROR)

    def full(tensors: dict, path: Path, **rest: object) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint if where == "checkpoint" else shards, "save_file", full)
    out = tmp_path / "out"
    line = refused(capsys, "codec", *SMALL, "--steps", "1", "--out", str(out))
    assert line.startswith("--out: cannot write ")
    assert "the disk is full. free some space" in line
    left = {"log.jsonl"} if where == "checkpoint" else {"log.jsonl", "step_00000001"}
    assert names(out) == left
    if where == "weights":
        monkeypatch.undo()
        train("codec", "--steps", "1", "--resume", "--out", str(out))
        assert names(out) == left | {"tiny-codec.safetensors", "tiny-codec.json", "sheet.png"}


def test_help_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert all(stage in told for stage in ("codec", "causal", "memory"))


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["train", "codec", "--stepz", "2"])
    assert left.value.code == 2
    assert "stepz" in "".join(capsys.readouterr())
