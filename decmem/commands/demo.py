"""``decmem demo``: see whether the model remembers."""

from dataclasses import dataclass
from pathlib import Path

from decmem.commands.stages import stage_bars
from decmem.errors import UserError


@dataclass(frozen=True)
class Demo:
    """Show the model a world it never trained on, then let it dream on from actions alone.

    Truth, dream, and the same weights with the global memory switched off, side by side: a film, a
    contact sheet, the PSNR of every frame, and report.json with all figures.

    Example: decmem demo --seconds 60 --out out/minute
    """

    preset: str = "pocket"
    """Which model: pocket is the shipped one (128x192, 10 frames per second)."""

    seconds: float = 12.0
    """How long to dream after the 22 seconds of memory. A minute takes five times as long."""

    episodes: int = 2
    """How many held-out worlds: the first ones, 10000000 onwards, never chosen ones."""

    steps: int = 4
    """Denoising steps for every chunk of frames."""

    weights: Path | None = None
    """Other weights of the same preset, instead of the shipped ones."""

    codec_weights: Path | None = None
    """The codec those weights were trained with, where it is not the shipped one."""

    device: str = "auto"
    """auto, cpu or cuda: auto takes the GPU where there is one."""

    out: Path = Path("out/demo")
    """Folder for demo.mp4, contact_sheet.png, psnr.png and report.json."""

    def run(self) -> None:
        """Dream, draw, and say what came out."""
        from decmem.evaluation.demo import (
            FILM,
            WALK,
            dreamt_frames,
            in_one_sentence,
            shoot,
            write_demo,
        )
        from decmem.evaluation.protocol import BANK_FRAMES, held_out_seeds
        from decmem.experiment import shipped_weights, weights_sha256
        from decmem.machine import code_commit, describe_machine, usable_cores
        from decmem.rollout import Session
        from decmem.world.episode import Episode, render_episode
        from decmem.world.version import HELD_OUT_SEED_BASE, WORLD_VERSION

        frames = BANK_FRAMES + dreamt_frames(self.seconds)
        seeds = held_out_seeds(HELD_OUT_SEED_BASE, self.episodes)
        if self.steps < 1:
            raise UserError("--steps", f"{self.steps}, expected at least 1", "4 is the default")
        session = Session.open(
            self.preset, self.weights, self.codec_weights, device=self.device, steps=self.steps
        )
        size = session.config.size

        def render(seed: int) -> Episode:
            return render_episode(seed, WALK, frames, size, threads=usable_cores())

        header = {
            "world_version": WORLD_VERSION,
            "commit": code_commit(),
            "weights_sha256": session.weights_sha256,
            "codec_weights_sha256": weights_sha256(
                self.codec_weights or shipped_weights(f"{self.preset}-codec")
            ),
            "preset": self.preset,
            "steps": self.steps,
            "size": size,
            "machine": describe_machine(session.device),
        }
        with stage_bars() as watch:
            shot = shoot(session, render, seeds, BANK_FRAMES, watch)
            report = write_demo(shot, header, self.out, watch)
        print(f"{self.out / FILM} and, beside it, the contact sheet, the curves and the report.")
        print(in_one_sentence(report))
