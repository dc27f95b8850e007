"""Session: a world that goes on. Observe what is known, step with actions, get frames.

The only generation loop: command line, evaluation, training samples and the browser all call it.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from decmem import flow
from decmem.codec import Codec, DecoderStream, EncoderStream
from decmem.errors import UserError
from decmem.experiment import load_codec, load_model, pick_device, shipped_weights, weights_sha256
from decmem.memory import Bank, Recall
from decmem.model import Conditions, WorldModel
from decmem.model.conditioning import (
    FRAMES_PER_LATENT,
    camera_centres,
    conditions_of_frames,
    normalised_lens,
)
from decmem.presets import preset
from decmem.sampler import Sampler
from decmem.world.actions import validate_actions
from decmem.world.kinematics import check_rigid, integrate


class Session:
    """One or more worlds side by side, all of one length.

    Args:
        codec, model: built parts, on `device`.
        steps: Euler steps a chunk. guidance: strength of action guidance, None for none.
        chunk: most latents generated together (one of the sizes the model was trained with).
        batch: worlds. seeds: one noise seed per world; a world's noise depends on its seed and
            the latent's index alone, so neither company nor rewinding changes it.
        dtype: of activations and bank; fp32 on a CPU, bf16 on a GPU where None.

    Raises:
        UserError: for settings that do not fit the model.
    """

    def __init__(
        self,
        codec: Codec,
        model: WorldModel,
        *,
        flow_config: flow.FlowConfig | None = None,
        steps: int = 4,
        guidance: float | None = None,
        chunk: int | None = None,
        retrieved: int | None = None,
        batch: int = 1,
        seeds: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        sha256: str | None = None,
    ) -> None:
        self.codec = codec
        self.model = model
        self.config = model.config
        self.device = model.head.weight.device
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.times = flow.sampling_times(flow_config or flow.FlowConfig(), steps)
        self.steps = steps
        self.guidance = guidance
        sizes = self.config.chunk_sizes
        self.chunk = chunk or self.config.chunk
        if self.chunk not in sizes:
            raise UserError(
                "chunk", f"{self.chunk} latents, trained with {sizes}", "Use one of these"
            )
        self.batch = batch
        self.seeds = list(seeds if seeds is not None else range(batch))
        if len(self.seeds) != batch:
            raise UserError("seeds", f"{len(self.seeds)} for {batch} worlds", "Give one per world")
        self.retrieved = retrieved
        self.global_memory = True
        self.weights_sha256 = sha256
        self.reset()

    @classmethod
    def open(
        cls,
        preset_name: str = "pocket",
        weights: str | Path | None = None,
        codec_weights: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        chunk: int | None = None,
        retrieved: int | None = None,
        batch: int = 1,
        seeds: Sequence[int] | None = None,
    ) -> "Session":
        """A session with a preset's shipped weights, or with those at `weights`.

        Raises:
            UserError: for an unknown preset or device, and missing or damaged weights.
        """
        experiment = preset(preset_name)
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
        sampler = experiment.sampler
        return cls(
            codec,
            model,
            flow_config=experiment.flow,
            steps=sampler.steps if steps is None else steps,
            guidance=sampler.guidance if guidance is None else guidance,
            chunk=chunk,
            retrieved=sampler.retrieved if retrieved is None else retrieved,
            batch=batch,
            seeds=seeds,
            dtype=dtype,
            sha256=weights_sha256(path),
        )

    def reset(self) -> None:
        """Forgets the world."""
        self.bank: Bank | None = None
        self.conditions: Conditions | None = None
        self.latents: Tensor | None = None
        self.frames = 0
        self.timings = {"encode": 0.0, "prefill": 0.0, "rollout": 0.0, "decode": 0.0}
        self._encoder = EncoderStream()
        self._decoder = DecoderStream()

    @property
    def length(self) -> int:
        """Latents so far."""
        return 0 if self.bank is None else self.bank.length

    @torch.no_grad()
    def observe(
        self,
        frames: UInt8[np.ndarray, "*batch F H W 3"],
        actions: Float[np.ndarray, "*batch F A"],
        world_to_camera: Float[np.ndarray, "*batch F 4 4"],
        intrinsics: Float[np.ndarray, "*batch F 3 3"],
    ) -> None:
        """Writes known frames into memory, all of them in one parallel pass.

        The first call takes 1 + 4n frames, later ones 4n. With one world the batch dimension may
        be left out.

        Raises:
            UserError: for counts, sizes, poses or actions that do not fit.
        """
        shown, acted, posed, lenses = (
            self._batched(x, dims, name)
            for x, dims, name in (
                (frames, 4, "frames"),
                (actions, 2, "actions"),
                (world_to_camera, 3, "world_to_camera"),
                (intrinsics, 3, "intrinsics"),
            )
        )
        F = shown.shape[1]
        first = self.length == 0
        if (F - first) % FRAMES_PER_LATENT or F == 0:
            form = "1 + 4n" if first else "4n"
            raise UserError("frames", f"{F} frames, expected {form}", "Drop the oldest ones")
        if shown.dtype != np.uint8:
            raise UserError("frames", f"numbers of type {shown.dtype}", "Give uint8 RGB")
        if shown.shape[2:4] != self.config.size:
            raise UserError(
                "frames",
                f"pictures of {shown.shape[2]} x {shown.shape[3]}, the model makes "
                f"{self.config.size[0]} x {self.config.size[1]}",
                "Resize them (decmem rollout does)",
            )
        for name, x in (("actions", acted), ("world_to_camera", posed), ("intrinsics", lenses)):
            if x.shape[1] != F:
                raise UserError(name, f"{x.shape[1]} for {F} frames", "Give one per frame")
        acted, posed = _valid_actions(acted), _valid_poses(posed)
        started = time.perf_counter()
        latents = self.codec.encode(torch.from_numpy(shown), self._encoder).to(self.device)
        # The decoder's context is the latent before, whether it was seen or dreamed.
        self._decoder.previous = latents[:, -1:].clone()
        self._clock("encode", started)
        started = time.perf_counter()
        lens = normalised_lens(torch.from_numpy(lenses), self.config.size)
        conditions = self._conditions(acted, posed, lens)
        if self.bank is None:
            anchor = camera_centres(conditions.cameras[:, -1]).cpu()
            self.bank = self.model.new_bank(anchor, self.dtype)
        self.sampler.write(self.bank, latents, conditions)
        self._remember(latents, conditions, F)
        self._clock("prefill", started)

    @torch.no_grad()
    def step(
        self,
        actions: Float[np.ndarray, "*batch F A"],
        world_to_camera: Float[np.ndarray, "*batch F 4 4"] | None = None,
    ) -> UInt8[np.ndarray, "*batch F H W 3"]:
        """Generates one frame per action; `F` is a multiple of 4.

        Without poses they are integrated from the actions by the world's motion function.

        Raises:
            UserError: before any observation, or for counts and values that do not fit.
        """
        if self.bank is None or self.conditions is None:
            raise UserError("step", "nothing was observed yet", "Call observe first")
        acted = _valid_actions(self._batched(actions, 2, "actions"))
        F = acted.shape[1]
        if F == 0 or F % FRAMES_PER_LATENT:
            raise UserError("actions", f"{F} actions, expected a multiple of 4", "Pad with no-ops")
        if world_to_camera is None:
            last = self.conditions.world_to_camera[:, -1, -1].cpu().numpy()
            posed = np.stack([_continued(p, a) for p, a in zip(last, acted, strict=True)])
        else:
            posed = _valid_poses(self._batched(world_to_camera, 3, "world_to_camera"))
        if posed.shape[1] != F:
            raise UserError("world_to_camera", f"{posed.shape[1]} for {F} actions", "Give one each")
        lens = self.conditions.lens[:, -1:].cpu().expand(-1, F, -1)
        conditions = self._conditions(acted, posed, lens)
        made = []
        for chunk in self._chunks(F // FRAMES_PER_LATENT):
            started = time.perf_counter()
            steering = conditions[chunk]
            noise = self.sampler.noise(self.seeds, steering.time.tolist())
            latents = self.sampler.generate(self.bank, steering, noise)
            self.sampler.write(self.bank, latents, steering)
            self._remember(latents, steering, FRAMES_PER_LATENT * latents.shape[1])
            self._clock("rollout", started)
            started = time.perf_counter()
            made.append(self.codec.decode(latents, self._decoder).cpu())
            self._clock("decode", started)
        frames = torch.cat(made, dim=1).numpy()
        return frames[0] if np.ndim(actions) == 2 else frames

    def codec_roundtrip(
        self, frames: UInt8[np.ndarray, "*batch F H W 3"]
    ) -> UInt8[np.ndarray, "*batch F H W 3"]:
        """Whole clips through the codec and back: the best any model on it could do."""
        clips = torch.from_numpy(self._batched(frames, 4, "frames"))
        coded = self.codec.decode(self.codec.encode(clips)).cpu().numpy()
        return coded[0] if frames.ndim == 4 else coded

    def shuffle_history(self, order: Sequence[int]) -> None:
        """Gives each world another's memory beyond the local window: a control."""
        if self.bank is None:
            raise UserError("order", "nothing was observed yet", "Call observe first")
        reach = self.config.reading.reach
        self.bank.swap_history(torch.tensor(order), min(reach.window or 0, self.length))

    @property
    def sampler(self) -> Sampler:
        """The model with the session's present settings."""
        recall = Recall(self.global_memory, self.retrieved)
        return Sampler(self.model, self.times, self.guidance, self.dtype, recall)

    def _chunks(self, latents: int) -> list[slice]:
        """Slices of the largest trained chunk sizes that fit."""
        sizes = sorted((s for s in self.config.chunk_sizes if s <= self.chunk), reverse=True)
        found, start = [], 0
        while start < latents:
            size = next((s for s in sizes if s <= latents - start), None)
            if size is None:
                raise UserError(
                    "actions",
                    f"{latents - start} latents are left, chunks have {sizes}",
                    f"Give a multiple of {4 * sizes[-1]} actions",
                )
            found.append(slice(start, start + size))
            start += size
        return found

    def _conditions(self, actions: np.ndarray, poses: np.ndarray, lens: Tensor) -> Conditions:
        acted, posed = torch.from_numpy(actions), torch.from_numpy(poses)
        return conditions_of_frames(acted, posed, lens, self.length).to(self.device)

    def _remember(self, latents: Tensor, conditions: Conditions, frames: int) -> None:
        self.frames += frames
        if self.latents is None or self.conditions is None:
            self.latents, self.conditions = latents, conditions
            return
        self.latents = torch.cat((self.latents, latents), 1)
        self.conditions = self.conditions.then(conditions)

    def _batched(self, x: np.ndarray, dims: int, name: str) -> np.ndarray:
        x = np.asarray(x)
        x = x[None] if x.ndim == dims else x
        if x.ndim != dims + 1 or len(x) != self.batch:
            raise UserError(
                name,
                f"shape {x.shape} for {self.batch} worlds",
                f"Give {dims} dimensions for one world, or the worlds stacked in front",
            )
        return x

    def _clock(self, name: str, started: float) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.timings[name] += time.perf_counter() - started


def _valid_actions(actions: np.ndarray) -> np.ndarray:
    return np.stack([validate_actions(world) for world in actions.astype(np.float32)])


def _valid_poses(world_to_camera: np.ndarray) -> np.ndarray:
    check_rigid(poses := world_to_camera.astype(np.float64))
    return poses


def _continued(last: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Poses after `last` under these actions (motion's own first row is the start itself)."""
    padded = np.concatenate((np.zeros_like(actions[:1]), actions))
    return integrate(last, padded)[1:]
