"""``decmem eval``: the figures of a model, beside its controls and yardsticks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from decmem.commands.stages import stage_bars
from decmem.errors import UserError


@dataclass(frozen=True)
class Evaluate:
    """Measure how well the model remembers, on worlds it never trained on.

    Every world is seen for 221 frames and dreamt on from there; the paper's windows (frames 222-229
    and 334-341) are compared with the rendered truth. Where the camera then stands still for 30 s
    (still), so are frames 222-229, 270-277, 370-377 and 514-521: how far the dream drifts from what
    it shows all the time. Beside the model stand the same weights without global memory or with
    another world's, copies of remembered frames, the memory warped by the true depth, and the codec
    alone.

    Writes results.json, table.md, curves.json and curves.png. Finished episodes are kept in
    OUT/episodes: an interrupted run goes on where it stopped.

    Example: decmem eval --episodes 64 --device cuda --out out/eval
    """

    suite: tyro.conf.Positional[Literal["windows"]] = "windows"
    """What to measure: windows is the paper's protocol."""

    preset: str = "pocket"
    """Which model: pocket is the shipped one."""

    weights: Path | None = None
    """Other weights of the same preset, instead of the shipped ones."""

    codec_weights: Path | None = None
    """The codec those weights were trained with, where it is not the shipped one."""

    window_weights: Path | None = None
    """Weights of a model trained with the sliding window alone, for the row "window"."""

    episodes: int = 16
    """Worlds per walk; 64 or more for figures worth quoting."""

    seed_base: int = 10_000_000
    """The first seed. Those below 10000000 are trained on, and refused."""

    walks: tuple[Literal["retrace", "free", "still"], ...] = ("retrace", "free")
    """retrace returns to seen places; free explores, and is split by what the memory shows; still
    explores first and then stands where it is."""

    long: bool = False
    """Dream on to frame 805 and measure 798-805 too: five times the time. Still walks stay."""

    steps: int = 4
    """Denoising steps for every chunk of frames."""

    chunk: int | None = None
    """Latents (of 4 frames) dreamt at a time: 1, as play does it, 2, or by default 4."""

    retrieved: int | None = None
    """Blocks read from the memory; by default what the preset reads."""

    guidance: float | None = None
    """Strength of action guidance: a second branch in every step. By default what the preset
    says."""

    retrieve_until: int | None = None
    """Steps that retrieve; later ones reuse the lists of the last of them. Default every step."""

    share_lists: bool = False
    """The second branch of guidance reads the lists of the first."""

    gemm: Literal["auto", "fp8"] = "auto"
    """Of the blocks' matrix products: fp8 rounds weights and activations to 8 bits, row by row."""

    batch: int | None = None
    """Worlds advanced together, at least 2; by default 2 on a CPU and 32 on a GPU."""

    device: str = "auto"
    """auto, cpu or cuda: auto takes the GPU where there is one."""

    out: Path = Path("out/eval")
    """Folder for the results."""

    def run(self) -> None:
        """Roll out what is missing, and write the tables after every batch of worlds."""
        from decmem.evaluation.protocol import (
            LONG_WINDOW,
            STILL_WINDOWS,
            WINDOWS,
            Protocol,
            held_out_seeds,
        )
        from decmem.evaluation.record import write_results
        from decmem.evaluation.runner import Runner
        from decmem.experiment import shipped_weights, weights_sha256
        from decmem.machine import code_commit, describe_machine, usable_cores
        from decmem.ops.fp8 import FP8
        from decmem.rollout import Session
        from decmem.sampler import Running
        from decmem.world.episode import Episode, render_episode
        from decmem.world.version import WORLD_VERSION
        from decmem.world.walks import WalkKind

        windows = (*WINDOWS, LONG_WINDOW) if self.long else WINDOWS
        seeds = held_out_seeds(self.seed_base, self.episodes)
        walks = tuple(dict.fromkeys(self.walks))
        if not walks:
            raise UserError("--walks", "none given", "give retrace, free or still")
        if self.steps < 1:
            raise UserError("--steps", f"{self.steps}, expected at least 1", "4 is the default")
        if self.retrieve_until is not None and self.retrieve_until < 1:
            problem = f"{self.retrieve_until}, expected at least 1"
            raise UserError("--retrieve-until", problem, "1 reuses the lists of the first step")
        if self.share_lists and self.guidance is None:
            problem = "guidance is off, so there is no second branch"
            raise UserError("--share-lists", problem, "Give --guidance too, for example 1.5")
        # Many worlds at once keep a GPU busy without graphs.
        running = Running(
            graphs="off", retrieve_until=self.retrieve_until, share_lists=self.share_lists
        )
        protocol = Protocol(seeds, walks, windows, still_windows=STILL_WINDOWS)

        def opened(weights: Path | None) -> Session:
            return Session.open(
                self.preset,
                weights,
                self.codec_weights,
                device=self.device,
                steps=self.steps,
                guidance=self.guidance,
                chunk=self.chunk,
                retrieved=self.retrieved,
                running=running,
                gemm_dtype=FP8 if self.gemm == "fp8" else None,
            )

        session = opened(self.weights)
        window_session = opened(self.window_weights) if self.window_weights else None
        size = session.config.size
        batch = self.batch
        if batch is None:
            batch = 32 if session.device.type == "cuda" else 2

        device = "cuda" if session.device.type == "cuda" else "cpu"

        def render(seed: int, walk: WalkKind) -> Episode:
            return render_episode(
                seed, walk, protocol.frames_of(walk), size, device=device, threads=1
            )

        header = {
            "suite": self.suite,
            "preset": self.preset,
            "steps": self.steps,
            "size": size,
            "world_version": WORLD_VERSION,
            "commit": code_commit(),
            "weights_sha256": session.weights_sha256,
            "codec_weights_sha256": weights_sha256(
                self.codec_weights or shipped_weights(f"{self.preset}-codec")
            ),
            "window_weights_sha256": window_session.weights_sha256 if window_session else None,
            "device": device,
        }
        for name in ("chunk", "retrieved", "guidance", "retrieve_until"):
            if getattr(self, name) is not None:
                header[name] = getattr(self, name)
        if self.share_lists:
            header["share_lists"] = True
        if self.gemm != "auto":
            header["gemm"] = self.gemm
        runner = Runner(
            protocol=protocol,
            session=session,
            window_session=window_session,
            render=render,
            out=self.out,
            settings={**header, "windows": [w.name for w in windows], "bank": protocol.bank},
            batch=batch,
            threads=usable_cores(),
        )
        header["machine"] = describe_machine(session.device)
        with stage_bars(single=True) as watch:
            for scores in runner.finish(watch):
                write_results(self.out, protocol, scores, header)
        print((self.out / "table.md").read_text(encoding="utf-8"))
        print(
            f"{self.out / 'results.json'} holds every figure, {self.out / 'curves.png'} the plot."
        )
