"""Session: a world that goes on. Observe what is known, step with actions, get frames.

The only generation loop: command line, evaluation, training samples and the browser all call it.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from decmem import flow
from decmem.codec import Codec, DecoderStream, EncoderStream, SideDecoder
from decmem.errors import UserError
from decmem.experiment import load_parts
from decmem.history import History
from decmem.memory import Bank, Lens, Recall
from decmem.model import Conditions, WorldModel
from decmem.model.conditioning import FRAMES_PER_LATENT, conditions_of_frames, normalised_lens
from decmem.observation import (
    check_counts,
    check_frames,
    check_settings,
    checked_seeds,
    conditions_after,
    per_world,
    slices_of,
    valid_actions,
    valid_poses,
    whole_latents,
)
from decmem.presets import preset
from decmem.sampler import Running, Sampler
from decmem.saved_world import SavedWorld, load_world, save_world
from decmem.world.actions import A
from decmem.world.camera import intrinsics as default_intrinsics
from decmem.world.camera import look

_SETTINGS = ("steps", "guidance", "chunk", "retrieved", "global_memory")


class Session:
    """One or more worlds side by side, all of one length.

    Args:
        codec, model: built parts, on `device`.
        steps: Euler steps a chunk. guidance: strength of action guidance, None for none.
        chunk: most latents generated together (one of the sizes the model was trained with).
        batch: worlds. seeds: one noise seed per world; a world's noise depends on its seed and
            the latent's index alone, so neither company nor rewinding changes it.
        retrieved: k, blocks the global memory reads; None takes the trained one.
        dtype: of activations and bank; fp32 on a CPU, bf16 on a GPU where None.
        running: how chunks are computed where the model leaves a choice.
        sha256, codec_sha256: of the weights' files, for what is saved.

    Settings (`steps`, `guidance`, `chunk`, `retrieved`, `global_memory`, `lens`) are attributes
    and may change between steps. With `lens` on, `seen` holds what the last chunk read. With
    `deferred` on, the write pass of a chunk is made along with the next chunk's first step: a pass
    less, and the same but for rounding.

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
        codec_sha256: str | None = None,
        running: Running | None = None,
    ) -> None:
        self.codec = codec
        self.model = model
        self.config = model.config
        self.device = model.head.weight.device
        self.decoder = SideDecoder(codec, self.device)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.flow = flow_config or flow.FlowConfig()
        self.steps, self.guidance = steps, guidance
        self.chunk = self.config.chunk if chunk is None else chunk
        self.retrieved = retrieved
        self.global_memory = True
        self.running = running or Running()
        self.lens = self.deferred = False
        self.batch = batch
        self.seeds = checked_seeds(range(batch) if seeds is None else seeds, batch)
        self.weights_sha256, self.codec_sha256 = sha256, codec_sha256
        self._check_settings()
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
        running: Running | None = None,
        gemm_dtype: torch.dtype | None = None,
    ) -> "Session":
        """A session with a preset's shipped weights, or with those at `weights`; `gemm_dtype` as
        `WorldModel.hold_weights`.

        Raises:
            UserError: for an unknown preset or device, and missing or damaged weights.
        """
        experiment = preset(preset_name)
        codec, model, sums = load_parts(experiment, weights, codec_weights, device)
        sampler = experiment.sampler
        session = cls(
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
            sha256=sums["model"],
            codec_sha256=sums["codec"],
            running=running,
        )
        model.hold_weights(session.dtype, gemm_dtype)
        return session

    def reset(self) -> None:
        """Forgets the world."""
        self.history = History()
        self.seen: Lens | None = None
        self.timings = {"encode": 0.0, "prefill": 0.0, "rollout": 0.0, "decode": 0.0}

    @property
    def length(self) -> int:
        """Latents so far."""
        return self.history.length

    @property
    def frames(self) -> int:
        """Frames so far: the first latent stands for one, every other for four."""
        return max(0, FRAMES_PER_LATENT * (self.length - 1) + 1)

    @property
    def bank(self) -> Bank | None:
        """Keys and values of all latents; None before the first observation."""
        self.history.settle(self.sampler)
        return self.history.bank

    @property
    def conditions(self) -> Conditions | None:
        """What steered the latents so far."""
        return self.history.conditions

    @property
    def latents(self) -> Float[Tensor, "B T C h w"] | None:
        """All latents so far, observed and dreamed."""
        return self.history.latents

    @torch.no_grad()
    def observe(
        self,
        frames: UInt8[np.ndarray, "*batch F H W 3"],
        actions: Float[np.ndarray, "*batch F A"],
        world_to_camera: Float[np.ndarray, "*batch F 4 4"],
        intrinsics: Float[np.ndarray, "*batch F 3 3"],
        latents: Float[Tensor, "B T C h w"] | None = None,
    ) -> None:
        """Writes known frames into memory, all of them in one parallel pass.

        The first call takes 1 + 4n frames, later ones 4n. With one world the batch dimension may
        be left out. `latents` of these very frames, where they are known, need no coding.

        Raises:
            UserError: for counts, sizes, poses or actions that do not fit.
        """
        shown = per_world(frames, 4, "frames", self.batch)
        acted = per_world(actions, 2, "actions", self.batch)
        posed = per_world(world_to_camera, 3, "world_to_camera", self.batch)
        lenses = per_world(intrinsics, 3, "intrinsics", self.batch)
        check_frames(shown, self.config.size, self.length == 0)
        check_counts(shown, actions=acted, world_to_camera=posed, intrinsics=lenses)
        acted, posed = map(torch.from_numpy, (valid_actions(acted), valid_poses(posed)))
        started = time.perf_counter()
        # Whole latents were seen so far, so nothing of the encoder's is pending.
        if latents is None:
            stream = EncoderStream(started=self.length > 0)
            latents = self.codec.encode(torch.from_numpy(shown), stream).to(self.device)
        self._clock("encode", started)
        started = time.perf_counter()
        lens = normalised_lens(torch.from_numpy(lenses), self.config.size)
        conditions = conditions_of_frames(acted, posed, lens, self.length).to(self.device)
        self.history.write(self.sampler, latents, conditions)
        self._clock("prefill", started)

    def observe_picture(
        self,
        picture: UInt8[np.ndarray, "H W 3"],
        world_to_camera: Float[np.ndarray, "4 4"] | None = None,
        intrinsics: Float[np.ndarray, "3 3"] | None = None,
    ) -> None:
        """Begins from a single picture, by default seen level at eye height with a lens of 70
        degrees, as block worlds are.

        Raises:
            UserError: when something is known already, or as `observe`.
        """
        if self.length:
            raise UserError("picture", "a world has begun already", "Call reset first")
        pose = look((0.0, 1.62, 0.0), 0.0, 0.0) if world_to_camera is None else world_to_camera
        lens = default_intrinsics(self.config.size) if intrinsics is None else intrinsics
        self.observe(np.array(picture)[None], np.zeros((1, A), np.float32), pose[None], lens[None])

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
        conditions = self.prepare(actions, world_to_camera)
        bank = self.history.bank
        assert bank is not None
        made = []
        for chunk in slices_of(len(conditions.time), self.config.chunk_sizes, self.chunk):
            started = time.perf_counter()
            steering = conditions[chunk]
            noise = self.sampler.noise(self.seeds, steering.time.tolist())
            self.seen = Lens() if self.lens else None
            if self.lens and self.steps == 1:
                self.history.settle(self.sampler)  # the lens is for the chunk alone
            owed = self.history.pay(self.sampler)
            latents = self.sampler.generate(bank, steering, noise, self.seen, owed)
            self.history.paid()
            made.append(self.decoder.begin(latents, DecoderStream(self.history.last)))
            self.history.write(self.sampler, latents, steering, later=self.deferred)
            self._clock("rollout", started)
        started = time.perf_counter()
        frames = torch.cat([finished().cpu() for finished in made], dim=1).numpy()
        self._clock("decode", started)
        return frames[0] if np.ndim(actions) == 2 else frames

    def prepare(
        self,
        actions: Float[np.ndarray, "*batch F A"],
        world_to_camera: Float[np.ndarray, "*batch poses 4 4"] | None = None,
    ) -> Conditions:
        """What steers the latents that `step` would generate; raises what it would."""
        if self.history.bank is None or self.conditions is None:
            raise UserError("step", "nothing was observed yet", "Call observe first")
        self._check_settings()
        acted = whole_latents(per_world(actions, 2, "actions", self.batch))
        return conditions_after(self.conditions, acted, world_to_camera).to(self.device)

    def codec_roundtrip(
        self, frames: UInt8[np.ndarray, "*batch F H W 3"]
    ) -> UInt8[np.ndarray, "*batch F H W 3"]:
        """Whole clips through the codec and back: the best any model on it could do."""
        clips = torch.from_numpy(per_world(frames, 4, "frames", self.batch))
        coded = self.codec.decode(self.codec.encode(clips)).cpu().numpy()
        return coded[0] if frames.ndim == 4 else coded

    def shuffle_history(self, order: Sequence[int]) -> None:
        """Gives each world another's memory beyond the local window: a control."""
        if self.bank is None:
            raise UserError("order", "nothing was observed yet", "Call observe first")
        reach = self.config.reading.reach
        self.bank.swap_history(torch.tensor(order), min(reach.window or 0, self.length))

    @torch.no_grad()
    def rewind(self, latents: int) -> None:
        """The worlds as they were when this many latents were known.

        The same actions lead on to the same frames.

        Raises:
            UserError: for a number of latents that never were.
        """
        self.history.rewind(self.sampler, latents)
        self.seen = None

    def fork(self) -> "Session":
        """An independent copy that shares the model: both go on from here, each its own way."""
        twin = self.fresh()
        twin.history = self.history.fork(self.sampler)
        twin.timings = dict(self.timings)
        return twin

    def fresh(self, seeds: Sequence[int] | None = None) -> "Session":
        """An empty session with the same parts and settings; other noise seeds where given.

        Raises:
            UserError: for another number of seeds.
        """
        twin = copy.copy(self)
        twin.seeds = checked_seeds(self.seeds if seeds is None else seeds, self.batch)
        twin.reset()
        return twin

    def snapshot(self, provenance: dict[str, Any] | None = None) -> SavedWorld:
        """All that is needed to go on from here later; keys and values are left out.

        Raises:
            UserError: before any observation.
        """
        if self.latents is None or self.conditions is None:
            raise UserError("world", "nothing was observed yet", "Call observe first")
        return SavedWorld(
            self.latents,
            self.conditions,
            tuple(self.history.written),
            tuple(self.seeds),
            {name: getattr(self, name) for name in _SETTINGS},
            self.weights_sha256,
            self.codec_sha256,
            provenance or {},
        )

    def save(self, path: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """Writes a `.world` file that `load` goes on from.

        Raises:
            UserError: before any observation, and where the place cannot be written.
        """
        save_world(path, self.snapshot(provenance))

    def load(self, path: str | Path) -> dict[str, Any]:
        """Takes up a saved world, its settings included; gives back its provenance.

        Raises:
            UserError: for a file that cannot be read or does not fit this session's model.
        """
        saved = load_world(path)
        for _ in self.restore(saved):
            pass
        return saved.provenance

    def restore(self, saved: SavedWorld) -> Iterator[int]:
        """Becomes the saved world by the write passes that made it; yields the latents so far.

        Raises:
            UserError: for a world that does not fit this session's model.
        """
        shape = (self.batch, saved.length, self.config.latent_channels, *self.config.latent_size)
        saved.check_fit(shape, self.weights_sha256, self.codec_sha256)
        for name, value in saved.settings.items():
            if name in _SETTINGS:
                setattr(self, name, value)
        self._check_settings()
        self.seeds = list(saved.seeds)
        self.seen = None
        yield from self.history.rebuild(self.sampler, saved)

    @property
    def sampler(self) -> Sampler:
        """The model with the session's present settings."""
        recall = Recall(self.global_memory, self.retrieved)
        times = flow.sampling_times(self.flow, self.steps)
        return Sampler(self.model, times, self.guidance, self.dtype, recall, self.running)

    def _check_settings(self) -> None:
        check_settings(
            self.config.chunk_sizes, self.chunk, self.steps, self.retrieved, self.guidance
        )

    def _clock(self, name: str, started: float) -> None:
        if self.device.type == "cuda":
            # Not the decoder's stream, which may work on.
            torch.cuda.current_stream(self.device).synchronize()
        self.timings[name] += time.perf_counter() - started
