"""``decmem rollout``: your own clip as memory, your actions, and what the world does next."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from decmem.errors import UserError


@dataclass(frozen=True)
class RollOut:
    """Continue a video: its frames become memory, then the model dreams on from actions.

    The video needs a track (npz): its poses, intrinsics and actions, as `decmem world render`
    writes them and docs/method.md describes. Any size and rate: frames are resized and resampled.

    Example: decmem rollout --memory out/world/video.mp4 --track out/world/track.npz
    --actions "forward 20, turn-left 9x10, back 20" --out out/rollout
    """

    memory: Path
    """Video of what is known so far."""

    track: Path
    """Its track (npz). Rows beyond the video's end are the future, unless --actions is given."""

    actions: str | None = None
    """The future: an .npz or .csv file, or a script like "forward 20, turn-left 9x10, back 20"
    (frames; degrees x frames). Poses follow from the motion law unless the file holds them."""

    out: Path = Path("out/rollout")
    """Folder for dream.mp4, whole.mp4 (memory, then dream), track.npz and report.json."""

    preset: str = "pocket"
    """Which model."""

    weights: Path | None = None
    """Other weights of the same preset."""

    codec_weights: Path | None = None
    """The codec those weights were trained with, where it is not the shipped one."""

    steps: int = 4
    """Denoising steps per chunk."""

    guidance: float | None = None
    """Strength of action guidance; without, one pass a step instead of two."""

    chunk: int | None = None
    """Latents generated together (4 frames each); default the largest the model knows."""

    seed: int = 0
    """Of the noise: same seed, same dream."""

    device: str = "auto"
    """auto, cpu or cuda."""

    gemm: Literal["auto", "fp8"] = "auto"
    """Of the blocks' matrix products: fp8 rounds weights and activations to 8 bits, row by row."""

    lossless: bool = False
    """Write exact pixels, as .mkv."""

    def run(self) -> None:
        """Remember, dream, write."""
        import numpy as np

        from decmem.commands.progress import track as bar
        from decmem.data.clip import load_actions, load_clip, whole_latents
        from decmem.data.video import check_video, write_video
        from decmem.ops.fp8 import FP8
        from decmem.rollout import Session
        from decmem.storage import atomic_folder, write_json
        from decmem.world.episode import Episode
        from decmem.world.kinematics import integrate
        from decmem.world.track_file import save_track
        from decmem.world.version import FPS

        session = Session.open(
            self.preset,
            self.weights,
            self.codec_weights,
            device=self.device,
            steps=self.steps,
            guidance=self.guidance,
            chunk=self.chunk,
            seeds=[self.seed],
            gemm_dtype=FP8 if self.gemm == "fp8" else None,
        )
        size = session.config.size
        suffix, stale = (".mkv", ".mp4")[:: 1 if self.lossless else -1]
        check_video(self.out / f"dream{suffix}", size, FPS, lossless=self.lossless)
        names = {"track.npz", *(f"{n}{s}" for n in ("dream", "whole") for s in (suffix, stale))}
        for given in (self.memory, self.track):
            if given.name in names and given.parent.resolve() == self.out.resolve():
                raise UserError("--out", f"{given} would be overwritten", "choose another folder")
        clip, future = load_clip(self.memory, self.track, size, FPS)
        clip = whole_latents(clip)
        poses = None
        if self.actions is not None:
            actions, poses = load_actions(self.actions, FPS)
        elif future is not None and future.actions is not None:
            actions, poses = future.actions, future.world_to_camera
        else:
            raise UserError(
                "--actions",
                "nothing says what happens next: the track ends with the video",
                'give a file or a script such as "forward 20, turn-left 9x10"',
            )
        if not len(actions):
            raise UserError("--actions", "no actions in it", "ask for at least one frame")
        if poses is None:
            start = np.concatenate((np.zeros_like(actions[:1]), actions))
            poses = integrate(clip.world_to_camera[-1], start)[1:]

        # Whole latents come out: the end is padded with standing still, and cut off again.
        unit = 4 * min(session.config.chunk_sizes)
        spare = -len(actions) % unit
        padded = np.concatenate((actions, np.zeros((spare, actions.shape[1]), np.float32)))
        held = np.concatenate((poses, np.repeat(poses[-1:], spare, axis=0)))
        # First of all, so that a forbidden place is told before the work.
        with atomic_folder(self.out) as folder:
            session.observe(clip.frames, clip.actions, clip.world_to_camera, clip.intrinsics)
            made = []
            piece = 4 * session.chunk
            starts = range(0, len(padded), piece)
            for first in bar(starts, "dreaming", total=len(starts)):
                part = slice(first, first + piece)
                made.append(session.step(padded[part], held[part]))
            dream = np.concatenate(made)[: len(actions)]

            whole = Episode(
                frames=np.concatenate((clip.frames, dream)),
                world_to_camera=np.concatenate((clip.world_to_camera, poses)),
                intrinsics=np.concatenate(
                    (clip.intrinsics, np.repeat(clip.intrinsics[-1:], len(dream), axis=0))
                ),
                actions=np.concatenate((clip.actions, actions)),
                fps=clip.fps,
                provenance=clip.provenance | {"dreamed_from_frame": len(clip) + 1},
            )
            report = {
                "memory_frames": len(clip),
                "dreamed_frames": len(dream),
                "preset": self.preset,
                "weights_sha256": session.weights_sha256,
                "steps": self.steps,
                "guidance": session.guidance,
                "gemm": self.gemm,
                "seed": self.seed,
                "seconds": session.timings,
                "provenance": whole.provenance,
            }
            for name, frames in (("dream", dream), ("whole", whole.frames)):
                write_video(
                    folder / f"{name}{suffix}",
                    frames,
                    clip.fps,
                    lossless=self.lossless,
                    provenance=report,
                )
            save_track(folder / "track.npz", whole)
            write_json(folder / "report.json", report)
        # The new track belongs to the new videos; earlier ones beside it would be taken for them.
        for name in ("dream", "whole"):
            (self.out / f"{name}{stale}").unlink(missing_ok=True)
        seconds = session.timings["rollout"] + session.timings["decode"]
        print(f"{len(dream)} frames in {self.out}, {len(dream) / seconds:.1f} a second")
