"""``decmem world``: look at the block world, or make data from it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from decmem.commands.progress import busy
from decmem.storage import atomic_folder, require_free_space

# The same names as `decmem.world.walks.WalkKind`, which would load numba; a test compares them.
Walk = Literal["free", "there_and_back", "loop", "pan", "retrace", "train", "still"]


@dataclass(frozen=True)
class RenderWorld:
    """Render one walk through one world: a video, and a track of its poses and actions.

    Example: decmem world render --seed 10000000 --walk retrace --frames 341 --out out/world
    """

    seed: int = 10_000_000
    """Which world, 0 or more. Seeds from 10,000,000 on are never trained on."""

    walk: Walk = "retrace"
    """How the player moves. A retrace ends among places it has seen: the test of memory. Train is
    what the training episodes are made of."""

    frames: int = 341
    """Length in frames; the world runs at 10 frames per second."""

    out: Path = Path("out/world")
    """Folder for video.mp4 (video.mkv when lossless) and track.npz."""

    size: tuple[int, int] = (128, 192)
    """Height and width in pixels; even numbers."""

    supersample: int = 2
    """Rays per pixel and direction: 2 averages 2 x 2 rays for smooth edges, 1 is fastest."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to render; both give the same picture."""

    depth: bool = False
    """Also store every pixel's depth (metres) in the track file."""

    lossless: bool = False
    """Store the exact pixels, in video.mkv."""

    def run(self) -> None:
        """Render, then write both files."""
        from decmem.data.video import check_video, write_video
        from decmem.world.episode import render_episode
        from decmem.world.track_file import save_track
        from decmem.world.version import FPS

        video, stale = ("video.mkv", "video.mp4")[:: 1 if self.lossless else -1]
        check_video(self.out / video, self.size, FPS, lossless=self.lossless)
        pixels = self.frames * self.size[0] * self.size[1]
        require_free_space(self.out, pixels * (3 * self.lossless + 4 * self.depth + 1))
        with busy(f"rendering {self.frames} frames"):
            episode = render_episode(
                self.seed,
                self.walk,
                self.frames,
                self.size,
                self.supersample,
                self.device,
                threads=os.cpu_count() or 1,
            )
        with atomic_folder(self.out) as folder:
            write_video(
                folder / video,
                episode.frames,
                episode.fps,
                lossless=self.lossless,
                provenance=episode.provenance,
            )
            save_track(folder / "track.npz", episode, with_depth=self.depth)
        # The new track belongs to the new video; an earlier one beside it would be taken for it.
        (self.out / stale).unlink(missing_ok=True)
        print(f"{self.out / video} and track.npz: {len(episode)} frames")
