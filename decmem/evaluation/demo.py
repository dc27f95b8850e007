"""The demo: held-out worlds shown to the model, dreamt on with and without its global memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decmem.data.video import video_writer
from decmem.errors import UserError
from decmem.evaluation import quality
from decmem.evaluation.curves import draw_demo_curves
from decmem.evaluation.dreaming import Dreamer, Watch, dream, remember, through_codec, unwatched
from decmem.evaluation.filmstrip import contact_sheet
from decmem.evaluation.screening import Screening
from decmem.evaluation.take import CURVES, Take
from decmem.machine import usable_cores
from decmem.storage import atomic_folder, write_json
from decmem.world.episode import Episode
from decmem.world.version import FPS

SCHEMA_VERSION = 1
WALK = "retrace"
FILM, SHEET, PLOT, REPORT = "demo.mp4", "contact_sheet.png", "psnr.png", "report.json"
_FRAMES_PER_LATENT = 4


@dataclass(frozen=True)
class Shoot:
    """Everything that was dreamt, and ``seconds`` one full roll-out took on average, by stage."""

    takes: list[Take]
    seconds: dict[str, float]


def dreamt_frames(seconds: float) -> int:
    """Frames to dream for a demo of this length: the nearest whole number of latents.

    Raises:
        UserError: not a number from 0.4 (one latent) to 3600.
    """
    if not _FRAMES_PER_LATENT / FPS <= seconds <= 3600:
        raise UserError("--seconds", f"{seconds:g}, expected 0.4 to 3600", "12 is the default")
    return _FRAMES_PER_LATENT * round(seconds * FPS / _FRAMES_PER_LATENT)


def shoot(
    session: Dreamer,
    render: Callable[[int], Episode],
    seeds: Sequence[int],
    bank: int,
    watch: Watch = unwatched,
) -> Shoot:
    """Render each seed's episode, show its first ``bank`` frames, and dream the rest twice."""
    takes, clocks = [], []
    for number, (seed, episode) in enumerate(_rendered(render, seeds, watch)):
        count = len(episode.frames) - bank
        total = 2 * count * len(seeds)
        dreams, latents = [], None
        for run, global_memory in enumerate((True, False)):
            before = (2 * number + run) * count

            def report(frames: int, before: int = before, total: int = total) -> None:
                watch("Remembering and dreaming", before + frames, total)

            report(0)
            latents = remember(
                session,
                [episode],
                bank,
                seeds=[seed],
                global_memory=global_memory,
                latents=latents,
            )
            dreams.append(dream(session, [episode], bank, watch=report)[0])
            if global_memory:
                clocks.append(dict(session.timings))
        coded = through_codec(session, episode, bank, seed)
        truth = episode.frames[bank:]
        shown = dict(zip(CURVES, (*dreams, coded), strict=True))
        takes.append(
            Take(
                seed=seed,
                walk=WALK,
                fps=float(episode.fps),
                bank=episode.frames[:bank],
                actions=episode.actions[bank:],
                truth=truth,
                full=dreams[0],
                without_global_memory=dreams[1],
                psnr={name: quality.psnr_per_frame(shown[name], truth) for name in CURVES},
            )
        )
    stages = ("prefill", "rollout", "decode")
    seconds = {name: float(np.mean([clock[name] for clock in clocks])) for name in stages}
    return Shoot(takes, seconds)


def _rendered(
    render: Callable[[int], Episode], seeds: Sequence[int], watch: Watch
) -> Iterator[tuple[int, Episode]]:
    """Seeds with their episodes, as many at a time as there are cores: a walk is planned on one."""
    cores = usable_cores()
    with ThreadPoolExecutor(max_workers=cores) as pool:
        for first in range(0, len(seeds), cores):
            group = seeds[first : first + cores]
            watch("Rendering the worlds", first, len(seeds))
            episodes = list(pool.map(render, group))
            watch("Rendering the worlds", first + len(group), len(seeds))
            yield from zip(group, episodes, strict=True)


def demo_report(shot: Shoot, header: Mapping[str, Any]) -> dict[str, Any]:
    """report.json: PSNR per dreamt frame, mean over the worlds and for each, and how it was made.

    ``header`` holds what is known of the run besides (preset, steps, machine, weights, ...).
    """
    takes = shot.takes
    return {
        "schema_version": SCHEMA_VERSION,
        **header,
        "walk": WALK,
        "fps": takes[0].fps,
        "bank_frames": len(takes[0].bank),
        "first_frame": takes[0].first_frame,
        "frames": len(takes[0].truth),
        "seeds": [take.seed for take in takes],
        "psnr": {
            name: np.mean([take.psnr[name] for take in takes], axis=0).round(4) for name in CURVES
        },
        "per_episode": [
            {"seed": take.seed, "psnr": {name: take.psnr[name].round(4) for name in CURVES}}
            for take in takes
        ],
        "seconds": {name: round(value, 3) for name, value in shot.seconds.items()},
        "conventions": {
            "psnr": "10 log10(1 / MSE) per frame on uint8 frames before video coding, images in "
            "[0, 1], against the raw render, capped at 60 dB",
            "frames": "count from 1; one value per dreamt frame, from first_frame on",
            "seconds": "wall time of one world's full roll-out, mean over the worlds",
            "full": "the row decoupled of decmem eval",
        },
    }


def write_demo(
    shot: Shoot, header: Mapping[str, Any], out: Path, watch: Watch = unwatched
) -> dict[str, Any]:
    """Film, contact sheet, plot and report in ``out``, all of them or none. Returns the report.

    Raises:
        UserError: the folder cannot be written, or this FFmpeg has no H.264.
    """
    report = demo_report(shot, header)
    screenings = [Screening(take) for take in shot.takes]
    drawn = (frame for screening in screenings for frame in screening.frames())
    total = sum(len(screening) for screening in screenings)
    with atomic_folder(out) as folder:
        size, fps = screenings[0].size, shot.takes[0].fps
        with (
            video_writer(folder / FILM, size, fps, provenance=dict(header)) as film,
            ThreadPoolExecutor(max_workers=1) as artist,
        ):
            # The next frame is drawn while this one is coded.
            coming = artist.submit(next, drawn)
            for done in range(1, total + 1):
                frame = coming.result()
                coming = artist.submit(next, drawn, frame)
                film.write(frame[None])
                watch("Drawing the film", done, total)
        contact_sheet(shot.takes).save(folder / SHEET)
        draw_demo_curves(shot.takes, folder / PLOT)
        write_json(folder / REPORT, report)
    return report


def in_one_sentence(report: Mapping[str, Any]) -> str:
    """What came out, for the end of the command."""
    means = {name: float(np.mean(report["psnr"][name])) for name in CURVES}
    worlds = len(report["seeds"])
    return (
        f"Over {report['frames']} dreamt frames in {worlds} world{'s' if worlds > 1 else ''} the "
        f"model stays at {means['full']:.1f} dB of the truth; with its global memory off at "
        f"{means['without_global_memory']:.1f} dB; the codec alone allows {means['codec']:.1f} dB."
    )
