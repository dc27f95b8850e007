"""``decmem world``: look at the block world, or make data from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from decmem.storage import atomic_folder

Walk = Literal["free", "there_and_back", "loop", "pan", "retrace"]


@dataclass(frozen=True)
class RenderWorld:
    """Render one walk through one world: a video, and a track of its poses and actions.

    Example: decmem world render --seed 7 --walk retrace --frames 341 --out out/world
    """

    seed: int = 10_000_000
    """Which world, 0 or more. Seeds from 10,000,000 on are never trained on."""

    walk: Walk = "free"
    """How the player moves. A retrace ends among places seen before: the test of memory."""

    frames: int = 341
    """Length in frames; the world runs at 10 frames per second."""

    out: Path = Path("out/world")
    """Folder for video.mp4 (video.mkv when lossless) and track.npz."""

    size: tuple[int, int] = (128, 192)
    """Height and width in pixels; even numbers."""

    supersample: bool = True
    """Average 2 x 2 rays per pixel: smooth edges for four times the work."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to render; both give the same picture."""

    depth: bool = False
    """Also store the depth of every pixel (metres) in the track file; some 5 MB per 100 frames."""

    lossless: bool = False
    """Store the exact pixels, in video.mkv."""

    def run(self) -> None:
        """Render, then write both files."""
        from decmem.data.video import write_video
        from decmem.world.episode import render_episode, save_track

        episode = render_episode(
            self.seed, self.walk, self.frames, self.size, self.supersample, self.device
        )
        with atomic_folder(self.out) as folder:
            write_video(
                folder / ("video.mkv" if self.lossless else "video.mp4"),
                episode.frames,
                episode.fps,
                lossless=self.lossless,
                provenance=episode.provenance,
            )
            save_track(folder / "track.npz", episode)
        print(f"{self.frames} frames in {self.out}")
