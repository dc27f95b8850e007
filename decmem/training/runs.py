"""Whole training runs: parts built, task set up, trained, and the weights exported."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from decmem.codec import Autoencoder
from decmem.distributed import Place, join, leave
from decmem.errors import UserError
from decmem.experiment import Experiment, load_codec, pick_device, to_plain
from decmem.memory import MemoryName
from decmem.model import WorldModel
from decmem.presets import preset
from decmem.shards import load_weights, weights_sha256
from decmem.training.average import WeightAverage
from decmem.training.checkpoint import latest_checkpoint, require_same_settings
from decmem.training.codec_task import CodecTask
from decmem.training.export import export_weights
from decmem.training.kept_walks import kept_walks
from decmem.training.latent_cache import LatentCache
from decmem.training.memory_task import MemoryTask
from decmem.training.optimiser import Optimisers
from decmem.training.options import RunOptions
from decmem.training.sheets import codec_sheet, memory_sheet, write_sheet
from decmem.training.trainer import Budget, Task, Trainer
from decmem.world.episode import Episode, render_episode
from decmem.world.version import HELD_OUT_SEED_BASE, WORLD_VERSION

Loaded = TypeVar("Loaded")
Network = TypeVar("Network", bound=torch.nn.Module)


def train_codec(options: RunOptions) -> Path | None:
    """Trains the codec of a preset; returns its weights, or None when paused.

    A paused run too exports the average so far.
    """
    experiment, place, run = _start(options, "codec")
    try:
        config = _changed(experiment.codec_training, options)
        made = {
            "stage": "codec",
            "training": to_plain(config),
            "codec": to_plain(experiment.codec),
            "size": list(experiment.model.size),
        }
        settings = _settings(options, made, place, run)
        torch.manual_seed(options.seed)
        codec = _on(place, _started_from(options.init, experiment.build_codec()))
        task = CodecTask(
            codec, config, experiment.model.size, place.device, options.seed, place.rank
        )
        budget = _budget(options, config.steps, config.warmup, decay_from=0.0)
        trainer = _trainer(options, task, place, run, budget, settings, (config.lr, None))
        finished = trainer.run(options.pause_after)
        trainer.average.swap(codec)
        task.measure()
        weights = run / f"{experiment.name}-codec.safetensors"
        if place.first:
            card = made | _origin(options, trainer, place)
            tensors = codec.state_dict()
            export_weights(
                weights, tensors, {"codec": to_plain(experiment.codec)}, card, options.int8
            )
            write_sheet(run / "sheet.png", codec_sheet(codec, _held_out(experiment, place, 65, 3)))
        place.wait()
        return weights if finished else None
    finally:
        leave(place)


def train_memory(
    options: RunOptions, codec_weights: Path, memory: MemoryName | None
) -> Path | None:
    """Trains the world model of a preset; returns its weights, or None when paused.

    A paused run too exports the average so far.
    `memory` replaces the preset's: `dense` is the paper's first stage, `window` the control.
    """
    name = memory or "decoupled"
    experiment, place, run = _start(options, name)
    try:
        config = _changed(experiment.memory_training, options)
        if memory is not None:
            experiment = experiment.with_memory(memory)
        shape = experiment.model
        codec = _given(load_codec, codec_weights, "--codec")
        if codec.latent_channels != shape.latent_channels:
            raise UserError(
                "--codec",
                f"{codec_weights} has {codec.latent_channels} latent channels, "
                f"{experiment.name} {shape.latent_channels}",
                "Give the codec of this preset",
            )
        made = {
            "stage": name,
            "training": to_plain(config),
            "flow": to_plain(experiment.flow),
            "model": to_plain(shape),
            "codec_sha256": weights_sha256(codec_weights),
        }
        # What does not fit is told at once, before walks are rendered.
        settings = _settings(options, made, place, run)
        codec = _on(place, codec)
        model = _started_from(options.init, experiment.build_model(options.seed)).to(place.device)
        grid = shape.layout.grid if shape.position.surface and config.depth_weight else None

        def coded() -> LatentCache:
            return LatentCache(
                codec, config.walks, config.latents, shape.size, place.device, place.rank, grid,
                config.stills,
            )  # fmt: skip

        pausing = options.resume or options.pause_after is not None
        kept = run / f"walks-{place.rank:03d}.safetensors"
        if pausing:
            key = {"world": WORLD_VERSION, "codec": made["codec_sha256"], "walks": config.walks}
            key |= {"latents": config.latents, "size": shape.size, "grid": grid}
            key |= {"stills": config.stills}
            cache = kept_walks(kept, key | {"rank": place.rank}, place.device, coded)
        else:
            cache = coded()
        task = MemoryTask(model, cache, config, experiment.flow, options.seed, place.rank)
        budget = _budget(options, config.steps, config.warmup, config.decay_from)
        rates = (config.adam_lr, config.muon_lr)
        trainer = _trainer(options, task, place, run, budget, settings, rates)
        finished = trainer.run(options.pause_after)
        if finished:
            kept.unlink(missing_ok=True)
        trainer.average.swap(model)
        weights = run / f"{experiment.name}.safetensors"
        if place.first:
            card = made | _origin(options, trainer, place)
            export_weights(
                weights, model.state_dict(), {"model": to_plain(shape)}, card, options.int8
            )
            known = 1 + 4 * (config.latents * 3 // 4 - 1)
            episodes = _held_out(experiment, place, known + 32, 3)
            fresh = WorldModel(shape).to(place.device)
            fresh.load_state_dict(model.state_dict())
            rows = memory_sheet(codec, fresh.eval(), experiment.flow, episodes, known)
            write_sheet(run / "sheet.png", rows)
        place.wait()
        return weights if finished else None
    finally:
        leave(place)


def _start(options: RunOptions, stage: str) -> tuple[Experiment, Place, Path]:
    if options.seconds is not None and options.steps is not None:
        raise UserError("--seconds", "given together with --steps", "Give one of the two")
    for name in ("steps", "batch", "walks", "seconds", "rate"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            problem = f"got {value:g}, expected a finite number above 0"
            raise UserError(f"--{name}", problem, "Give such a number")
    for name in ("checkpoint_every", "pause_after"):
        value = getattr(options, name)
        if value is not None and not value >= 0:
            flag = "--" + name.replace("_", "-")
            raise UserError(flag, f"got {value:g}, expected 0 or more", "Raise it")
    if abs(options.seed) >= 2**63:
        raise UserError("--seed", f"{options.seed} has more than 64 bits", "Give a smaller one")
    experiment = preset(options.preset)
    run = options.out or Path("runs_out") / f"{options.preset}-{stage}"
    if run.exists() and not run.is_dir():
        raise UserError("--out", f"{run} is a file", "Give a folder")
    if not options.resume and latest_checkpoint(run) is not None:
        raise UserError(
            "--out", f"{run} holds a run already", "Add --resume, or choose another folder"
        )
    torch.use_deterministic_algorithms(options.deterministic)
    torch.set_float32_matmul_precision("high")
    return experiment, join(pick_device(options.device)), run


def _changed(config: Any, options: RunOptions) -> Any:
    asked: dict[str, Any] = {"batch": options.batch, "walks": options.walks, "steps": options.steps}
    if options.init is not None and hasattr(config, "short_until"):
        asked["short_until"] = 0.0  # short clips teach to retrieve, which given weights can
    return dataclasses.replace(config, **{k: v for k, v in asked.items() if v is not None})


def _budget(options: RunOptions, steps: int, warmup: int, decay_from: float) -> Budget:
    return Budget(
        steps, options.seconds, warmup, decay_from, checkpoint_every=options.checkpoint_every
    )


def _on(place: Place, codec: Autoencoder) -> Autoencoder:
    device, order = place.device, torch.channels_last
    return codec.to(device, memory_format=order)  # pyright: ignore[reportCallIssue]


def _settings(options: RunOptions, made: dict[str, Any], place: Place, run: Path) -> dict[str, Any]:
    """All that a run depends on; a checkpoint that is to be resumed must agree."""
    settings = made | {
        "preset": options.preset,
        "seed": options.seed,
        "seconds": options.seconds,
        "rate": options.rate_factor,
        "init": None if options.init is None else options.init.name,
        "processes": place.world,
    }
    found = latest_checkpoint(run)
    if found is not None:
        require_same_settings(found, settings)
    return settings


def _trainer(
    options: RunOptions,
    task: Task,
    place: Place,
    run: Path,
    budget: Budget,
    settings: dict[str, Any],
    rates: tuple[float, float | None],
) -> Trainer:
    network = task.network
    adam, muon = rates
    optimisers = Optimisers(
        network, adam * options.rate_factor, None if muon is None else muon * options.rate_factor
    )
    average = WeightAverage(network, settings["training"]["average"])
    trainer = Trainer(
        task, optimisers, average, budget, place, run, settings, title=settings["stage"]
    )
    if options.resume:
        trainer.resume()
    return trainer


def _started_from(path: Path | None, network: Network) -> Network:
    """The network with the weights at `path`, or as it is.

    Gates may be missing there, since a causal backbone has none, or be too many for a model that
    keeps a window alone.
    """
    if path is None:
        return network
    tensors, _ = _given(load_weights, path, "--from")
    own = {name: p for name, p in network.state_dict().items() if _is_gate(name)}
    given = {name: p for name, p in tensors.items() if not _is_gate(name) or name in own}
    try:
        network.load_state_dict(own | given)
    except RuntimeError as error:
        raise UserError(
            "--from", f"{path} does not fit this preset", "Give weights of this preset"
        ) from error
    return network


def _is_gate(name: str) -> bool:
    return ".memory.gate." in name


def _given(load: Callable[[Path], Loaded], path: Path, flag: str) -> Loaded:
    """What lies at `path`; where it cannot be loaded, the error names the flag it came from."""
    try:
        return load(path)
    except UserError as error:
        raise UserError(flag, error.problem, error.cure) from error


def _origin(options: RunOptions, trainer: Trainer, place: Place) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if place.device.type == "cuda" else "cpu"
    return {
        "preset": options.preset,
        "seed": options.seed,
        "steps": trainer.step,
        "seconds": round(trainer.spent, 1),
        "processes": place.world,
        "device": gpu,
        "torch": torch.__version__,
        "init": None if options.init is None else _ancestry(options.init),
    }


def _ancestry(path: Path) -> dict[str, Any]:
    """Where given weights come from: the chief figures of their card, if it lies beside them."""
    card = path.with_name(re.sub(r"-\d{5}-of-\d{5}$", "", path.stem) + ".json")
    told: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # none, or none that can be read
        told = json.loads(card.read_text(encoding="utf-8"))
    kept = ("stage", "world_version", "seed", "steps", "seconds", "processes", "device", "init")
    return {
        "weights": path.name,
        "sha256": weights_sha256(path),
        **{name: told[name] for name in kept if name in told},
        **{name: told["training"][name] for name in ("walks", "batch") if "training" in told},
    }


def _held_out(experiment: Experiment, place: Place, frames: int, count: int) -> list[Episode]:
    size, device = experiment.model.size, "cuda" if place.device.type == "cuda" else "cpu"
    return [
        render_episode(HELD_OUT_SEED_BASE + i, "train", frames, size, device=device)
        for i in range(count)
    ]
