"""Experiments: every preset builds, configurations survive plain JSON, weights load strictly."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from decmem.codec import CodecConfig
from decmem.errors import UserError
from decmem.experiment import (
    Experiment,
    from_plain,
    load_codec,
    load_model,
    pick_device,
    shipped_weights,
    to_plain,
)
from decmem.memory import TokenLayout, training_plan
from decmem.model import ModelConfig
from decmem.presets import PAPER, PRESETS, TINY, preset
from decmem.shards import save_weights

every_preset = pytest.mark.parametrize("experiment", PRESETS.values(), ids=PRESETS)

# Parameters of model and codec.
PARAMETERS = {
    "tiny": (185_680, 100_200),
    "pocket": (21_638_480, 5_382_416),
    "paper": (1_043_271_360, 5_333_760),
}


@every_preset
def test_presets_build_with_the_parameters_they_state(experiment: Experiment) -> None:
    with torch.device("meta"):
        parts = experiment.build_model(), experiment.build_codec()
    counts = tuple(sum(p.numel() for p in part.parameters()) for part in parts)
    assert counts == PARAMETERS[experiment.name], "update PARAMETERS if this was meant"


def test_the_paper_is_the_papers() -> None:
    model = PAPER.model
    assert (model.heads, model.position.head_dim, model.width, model.layers) == (24, 72, 1728, 20)
    assert model.layout == TokenLayout((22, 40), (2, 3))
    reading = model.reading
    assert (reading.retrieved, reading.reach.window, model.chunk) == (80, 8, 4)
    assert reading.per_head
    assert reading.reach.own_candidates
    assert reading.reach.window_includes_chunk
    assert (PAPER.sampler.steps, PAPER.sampler.guidance) == (20, 7.5)
    # None of the departures of the small presets.
    assert not model.rays
    assert not model.patch_position
    assert model.position.global_time
    assert model.position.reach == 0
    assert PAPER.memory_training.history_noised == 0
    assert PAPER.flow.shift == 1


@every_preset
def test_parts_of_a_preset_fit_together(experiment: Experiment) -> None:
    model, codec = experiment.model, experiment.codec
    assert model.latent_channels == codec.channels
    assert model.codec_stride == 8
    assert model.chunk in model.chunk_sizes
    training = experiment.memory_training
    for chunk in model.chunk_sizes:
        for latents in (training.latents, training.short_latents):
            training_plan(model.reading.reach, latents, chunk)  # divides


@every_preset
def test_configurations_survive_plain_json(experiment: Experiment) -> None:
    plain = json.loads(json.dumps(to_plain(experiment)))
    assert from_plain(Experiment, plain) == experiment


@pytest.mark.parametrize(
    ("where", "name"),
    [((), "colour"), (("model",), "widht"), (("model", "reading", "reach"), "windwo")],
)
def test_unknown_keys_are_errors_that_name_the_path(where: tuple[str, ...], name: str) -> None:
    plain = to_plain(TINY)
    inner = plain
    for key in where:
        inner = inner[key]
    inner[name] = 1
    path = "".join(f"{key}." for key in where)
    with pytest.raises(UserError, match=f"config: unknown key {path}'{name}'.*Known keys: "):
        from_plain(Experiment, plain)


def test_missing_keys_take_their_default_where_there_is_one() -> None:
    plain = to_plain(TINY)
    del plain["model"]["ffn_multiple"]
    assert from_plain(Experiment, plain) == TINY
    del plain["name"]
    with pytest.raises(UserError, match="config: 'name' is missing"):
        from_plain(Experiment, plain)


def test_a_configuration_that_is_no_table_is_refused() -> None:
    for plain in ({"model": 3}, {"model": None}, []):
        with pytest.raises(UserError, match="config"):
            from_plain(Experiment, plain)  # pyright: ignore


def test_configurations_check_themselves() -> None:
    plain = to_plain(TINY.model)
    plain["width"] = 65
    with pytest.raises(UserError, match="width"):
        from_plain(ModelConfig, plain)


def test_presets_are_found_by_name() -> None:
    assert preset("tiny") is TINY
    with pytest.raises(UserError, match=r"preset: 'huge' is unknown.*tiny.*pocket.*paper"):
        preset("huge")
    assert all(name == e.name and e.reproduces for name, e in PRESETS.items())


def save(path: Path, kind: str, part: torch.nn.Module, config: Any) -> Path:
    save_weights(path, part.state_dict(), {kind: to_plain(config)})
    return path


def test_models_and_codecs_come_back_with_their_configuration(tmp_path: Path) -> None:
    model, codec = TINY.build_model(seed=1), TINY.build_codec()
    codec.deviation.fill_(2.0)
    loaded = load_model(save(tmp_path / "m.safetensors", "model", model, TINY.model))
    assert loaded.config == TINY.model
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(loaded.patchify.weight, model.patchify.weight, atol=1e-3, rtol=1e-3)
    back = load_codec(save(tmp_path / "c.safetensors", "codec", codec, TINY.codec))
    assert back.config == TINY.codec
    assert back.deviation.tolist() == [2.0] * 16
    assert not back.training


def test_the_wrong_kind_of_weights_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "c.safetensors", "codec", TINY.build_codec(), TINY.codec)
    with pytest.raises(UserError, match=r"holds codec, not a model"):
        load_model(path)


def test_weights_that_do_not_fit_their_configuration_are_refused(tmp_path: Path) -> None:
    other = dataclasses.replace(TINY.codec, channels=8)
    path = save(tmp_path / "c.safetensors", "codec", TINY.build_codec(), other)
    with pytest.raises(UserError, match="does not fit"):
        load_codec(path)
    state = TINY.build_codec().state_dict()
    del state["mean"]
    save_weights(path, state, {"codec": to_plain(TINY.codec)})
    with pytest.raises(UserError, match=r"does not fit.*mean"):
        load_codec(path)
    save_weights(path, state, {"codec": to_plain(TINY.codec) | {"channel": 3}})
    with pytest.raises(UserError, match="unknown key 'channel'"):
        load_codec(path)


def test_fresh_models_depend_on_the_seed() -> None:
    one, same, other = (TINY.build_model(seed=s).patchify.weight for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "toaster"):
        with pytest.raises(UserError, match=f"device: '{name}' is not available"):
            pick_device(name)


def test_shipped_weights_lie_in_the_package() -> None:
    assert shipped_weights("pocket").parent.name == "weights"
    assert CodecConfig() == PRESETS["pocket"].codec
