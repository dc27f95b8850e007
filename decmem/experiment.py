"""An experiment: the whole configuration of a run, and the one place that builds its parts."""

import dataclasses
import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from decmem.codec import Autoencoder, CodecConfig
from decmem.errors import UserError
from decmem.flow import FlowConfig
from decmem.memory import MemoryName
from decmem.model import ModelConfig, WorldModel, initialise
from decmem.shards import load_weights, weights_sha256


@dataclass(frozen=True)
class SamplerConfig:
    """How chunks are generated: Euler steps, action guidance (None: one branch), k at run time."""

    steps: int = 4
    guidance: float | None = None
    retrieved: int | None = None


@dataclass(frozen=True)
class CodecTraining:
    """Training of the codec.

    Args:
        steps: optimiser steps. batch: clips a step, of `latents` latents each.
        walks, frames: clips are cut from so many rendered walks of so many frames.
        lr: peak learning rate of AdamW, linear to zero after `warmup` steps.
        noise: added to unit-RMS latents, so that the decoder bears a generator's errors.
        l1, mse, gradient: weights of the losses.
        lone: share of clips cut from the start of a walk, where one frame is a latent.
        equivariance: weight of the loss that halved latents are a halved picture (EQ-VAE, arXiv
            2502.09509: latents of this kind are easier to generate). 0 leaves it out.
    """

    steps: int = 12_000
    batch: int = 28
    latents: int = 5
    walks: int = 1536
    frames: int = 97
    lr: float = 1.2e-3
    warmup: int = 100
    noise: float = 0.1
    l1: float = 1.0
    mse: float = 8.0
    gradient: float = 0.5
    lone: float = 0.2
    equivariance: float = 0.0
    average: float = 0.999


@dataclass(frozen=True)
class MemoryTraining:
    """Training of the world model.

    Args:
        steps: optimiser steps. batch: clips a step at the full `latents`.
        walks: walks in the latent cache; each holds `latents` latents. stills: how often, in 100,
            a stretch of a walk stands still.
        short_latents, short_until: clips are this short for this first part of the training
            (with more of them a step), because revisits at small gaps teach retrieval.
        noisy_streams: noised copies of each clip that share its clean stream.
        muon_lr, adam_lr, warmup: rates of layer matrices (Muon) and of all else (AdamW).
        decay_from: part of the training after which rates fall linearly to zero.
        history_noise: largest noise on the clean stream; history_noised: share of clips with it.
        history_dreamt: share of steps, once clips are whole, whose clean stream is the model's own
            painting from some chunk on. history_generations: it is painted once to so many times
            over, every time behind the painting before. history_shift: moves the times from which
            it is painted, [0.5, 1], towards noise as in `FlowConfig`.
        drop_actions: share of clips whose actions are dropped, for guidance.
        depth_weight: weight of the true depth's likelihood under what the surface group assumes;
            0 leaves the depth to be found by its use, as on data without depth.
        average: decay of the weight average.
        compile: compile the blocks (GPU). recompute: keep no block's activations for the way back,
            a third more arithmetic for a fraction of the memory.
    """

    steps: int = 8_000
    batch: int = 6
    latents: int = 84
    walks: int = 6_144
    stills: int = 0
    short_latents: int = 24
    short_until: float = 0.3
    noisy_streams: int = 2
    muon_lr: float = 0.02
    adam_lr: float = 8e-4
    warmup: int = 150
    decay_from: float = 0.4
    history_noise: float = 0.3
    history_noised: float = 0.7
    history_dreamt: float = 0.0
    history_generations: int = 1
    history_shift: float = 1.0
    drop_actions: float = 0.1
    depth_weight: float = 0.0
    average: float = 0.999
    compile: bool = False
    recompute: bool = False


@dataclass(frozen=True)
class Experiment:
    """A named, complete configuration.

    Args:
        reproduces: the number or the use this experiment stands for.
    """

    name: str
    reproduces: str
    codec: CodecConfig = field(default_factory=CodecConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    codec_training: CodecTraining = field(default_factory=CodecTraining)
    memory_training: MemoryTraining = field(default_factory=MemoryTraining)

    def with_memory(self, memory: MemoryName) -> "Experiment":
        """The same with another memory; `dense` sees all history in its window."""
        reading = self.model.reading
        if memory == "dense":
            reading = dataclasses.replace(
                reading, reach=dataclasses.replace(reading.reach, window=None)
            )
        model = dataclasses.replace(self.model, memory=memory, reading=reading)
        return dataclasses.replace(self, model=model)

    def build_codec(self) -> Autoencoder:
        """A codec with fresh weights."""
        return Autoencoder(self.codec)

    def build_model(self, seed: int = 0) -> WorldModel:
        """A world model with fresh weights."""
        model = WorldModel(self.model)
        if not model.head.weight.is_meta:
            initialise(model, seed)
        return model


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_plain(kind: type, plain: Any, path: str = "") -> Any:
    """A configuration back from plain values; a key left out takes its default.

    Raises:
        UserError: for an unknown key, a key that must be there, and a value where keys belong.
    """
    if not isinstance(plain, dict):
        raise UserError(
            "config", f"{path.removesuffix('.') or 'it'} is {plain!r}", "Give a table of keys"
        )
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(plain) - set(fields))
    if unknown:
        raise UserError(
            "config",
            f"unknown key {path}{unknown[0]!r}",
            f"Known keys: {', '.join(fields)}",
        )
    absent = dataclasses.MISSING
    for name, known in fields.items():
        if name not in plain and known.default is absent and known.default_factory is absent:
            raise UserError("config", f"{path}{name!r} is missing", "Give it")
    made: dict[str, Any] = {}
    for name, value in plain.items():
        kind_of_field = fields[name].type
        if dataclasses.is_dataclass(kind_of_field):
            value = from_plain(kind_of_field, value, f"{path}{name}.")  # pyright: ignore
        elif isinstance(value, list):
            value = tuple(value)
        made[name] = value
    return kind(**made)


def shipped_weights(name: str) -> Path:
    """Path of weights that come with the package, such as `pocket` or `pocket-codec`."""
    return Path(str(files("decmem") / "weights" / f"{name}.safetensors"))


def pick_device(device: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU.

    Raises:
        UserError: for a device this machine does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            "device", f"{device!r} is not available here ({error})", "Use auto, cpu or cuda"
        ) from error
    return chosen


def load_codec(path: str | Path) -> Autoencoder:
    """The codec stored at `path`, in evaluation mode on the CPU."""
    tensors, metadata = load_weights(path)
    codec = Autoencoder(_config_of(CodecConfig, metadata, "codec", path))
    _load_strictly(codec, tensors, path)
    return codec.eval()


def load_model(path: str | Path) -> WorldModel:
    """The world model stored at `path`, in evaluation mode on the CPU."""
    tensors, metadata = load_weights(path)
    model = WorldModel(_config_of(ModelConfig, metadata, "model", path))
    _load_strictly(model, tensors, path)
    return model.eval()


def load_parts(
    experiment: Experiment,
    weights: str | Path | None,
    codec_weights: str | Path | None,
    device: str,
) -> tuple[Autoencoder, WorldModel, dict[str, str]]:
    """Codec and model on their device, and the SHA-256 of the `model` and the `codec`.

    Without paths these are the weights shipped for the experiment.

    Raises:
        UserError: for an unknown device, and for weights that are missing, damaged or do not
            belong together.
    """
    place = pick_device(device)
    path = Path(weights) if weights else shipped_weights(experiment.name)
    codec_path = codec_weights or shipped_weights(f"{experiment.name}-codec")
    model = load_model(path).to(place)
    codec = load_codec(codec_path).to(place)
    if model.config.latent_channels != codec.latent_channels:
        raise UserError(
            "weights",
            f"a model of {model.config.latent_channels} latent channels and a codec of "
            f"{codec.latent_channels}",
            "Give weights that were trained together",
        )
    codec = codec.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return codec, model, {"model": weights_sha256(path), "codec": weights_sha256(codec_path)}


def _config_of(kind: type, metadata: dict[str, Any], key: str, path: str | Path) -> Any:
    if key not in metadata:
        raise UserError(
            "weights",
            f"{path} holds {', '.join(sorted(metadata)) or 'nothing'}, not a {key}",
            f"Give the weights of a {key}",
        )
    return from_plain(kind, metadata[key])


def _load_strictly(module: torch.nn.Module, tensors: dict, path: str | Path) -> None:
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise UserError(
            "weights",
            f"{path} does not fit its own configuration ({str(error).splitlines()[-1].strip()})",
            "Export the weights again with this version of decmem",
        ) from error
    module.requires_grad_(False)


__all__ = [
    "CodecTraining",
    "Experiment",
    "MemoryTraining",
    "SamplerConfig",
    "from_plain",
    "load_codec",
    "load_model",
    "load_parts",
    "pick_device",
    "shipped_weights",
    "to_plain",
    "weights_sha256",
]
