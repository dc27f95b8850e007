"""``decmem eval``: roll every episode out under every memory, score it, and keep what is done."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decmem.evaluation.dreaming import Dreamer, Watch, dream, remember, through_codec, unwatched
from decmem.evaluation.protocol import Protocol, Window, batches
from decmem.evaluation.record import load_scores, save_score
from decmem.evaluation.scoring import EpisodeScore, Frames, score_episode
from decmem.evaluation.yardsticks import Geometry, copy_last, nearest_pose, oracle_warp
from decmem.world.episode import Episode
from decmem.world.visibility import seen_fraction
from decmem.world.walks import WalkKind

logger = logging.getLogger(__name__)

Pieces = dict[int, Frames]


@dataclass(frozen=True)
class Runner:
    """One evaluation under way.

    Args:
        protocol: worlds, walks and windows.
        session: the model that is measured.
        window_session: the model trained with a sliding window only; None leaves its row out.
        render: gives the episode of a seed and a walk, ``protocol.frames_of`` it long, with depth.
        out: results go here; ``out/episodes`` keeps every finished episode.
        settings: what the figures depend on; kept episodes count only under equal settings.
        batch: worlds advanced together.
        threads: for rendering and warping.
    """

    protocol: Protocol
    session: Dreamer
    window_session: Dreamer | None
    render: Callable[[int, WalkKind], Episode]
    out: Path
    settings: Mapping[str, Any]
    batch: int = 2
    threads: int = 1

    def finish(self, watch: Watch = unwatched) -> Iterator[list[EpisodeScore]]:
        """Compute what is missing, one batch of worlds at a time; yields all scores so far after
        every batch (at once, if nothing is missing), sorted by walk and seed."""
        kept = load_scores(self.out, self.settings)
        wanted = [(walk, seed) for walk in self.protocol.walks for seed in self.protocol.seeds]
        scores = {key: kept[key] for key in wanted if key in kept}
        if scores:
            logger.info("%d of %d episodes were done before", len(scores), len(wanted))
        groups: list[tuple[WalkKind, tuple[int, ...]]] = [
            (walk, seeds)
            for walk in self.protocol.walks
            for seeds in batches(self.protocol.seeds, self.batch)
            if any((walk, seed) not in scores for seed in seeds)
        ]
        total = sum(self._work(walk, seeds) for walk, seeds in groups)
        done = 0
        for walk, seeds in groups:

            def report(stage: str, count: int, before: int = done, walk: str = walk) -> None:
                watch(f"{walk}: {stage}", before + count, total)

            for score in self._score_batch(walk, seeds, report):
                scores[walk, score.seed] = score
                save_score(self.out, self.settings, score)
            done += self._work(walk, seeds)
            watch(f"{walk}: scored", done, total)
            logger.info("%d of %d episodes done", len(scores), len(wanted))
            yield [scores[key] for key in wanted if key in scores]
        if not groups:
            yield [scores[key] for key in wanted]

    def _work(self, walk: WalkKind, seeds: Sequence[int]) -> int:
        """Frames rolled out for one batch of worlds, the measure of the bar."""
        return len(seeds) * self.protocol.dreamt_of(walk) * (3 + (self.window_session is not None))

    def _score_batch(
        self, walk: WalkKind, seeds: Sequence[int], report: Callable[[str, int], None]
    ) -> Iterator[EpisodeScore]:
        report("rendering", 0)
        with ThreadPoolExecutor(max_workers=self.threads) as pool:
            episodes = list(pool.map(lambda seed: self.render(seed, walk), seeds))
        dreams = self._dreams(episodes, seeds, report)
        report("yardsticks", self._work(walk, seeds))
        bank = self.protocol.bank
        dreams["codec"] = np.stack(
            [
                through_codec(self.session, episode, bank, seed)
                for seed, episode in zip(seeds, episodes, strict=True)
            ]
        )

        def score(i: int) -> EpisodeScore:
            rows = {name: {0: frames[i]} for name, frames in dreams.items()}
            windows = self.protocol.windows_of(walk)
            yardsticks, seen = self._yardsticks(episodes[i], windows)
            truth = episodes[i].frames[bank:]
            return score_episode(seeds[i], walk, truth, {**rows, **yardsticks}, seen, windows, bank)

        with ThreadPoolExecutor(max_workers=self.threads) as pool:
            yield from pool.map(score, range(len(seeds)))

    def _dreams(
        self,
        episodes: Sequence[Episode],
        seeds: Sequence[int],
        report: Callable[[str, int], None],
    ) -> dict[str, np.ndarray]:
        """Every row that needs a model: (B, F, H, W, 3) each."""
        # Frames are coded once, and recorded once where only the reading differs.
        runs: list[tuple[str, Dreamer, bool, bool]] = [("decoupled", self.session, True, False)]
        if len(seeds) > 1:
            runs.append(("shuffled_memory", self.session, True, True))
        runs.append(("without_global_memory", self.session, False, False))
        if self.window_session is not None:
            runs.append(("window", self.window_session, True, False))
        made, latents, coder = {}, None, None
        bank = self.protocol.bank
        for number, (name, session, global_memory, foreign) in enumerate(runs):
            before = number * len(seeds) * (len(episodes[0]) - bank)

            def watch(frames: int, before: int = before, name: str = name) -> None:
                report(name, before + len(seeds) * frames)

            watch(0)
            if not foreign:
                before_this, coder = coder, session.codec_sha256 or id(session)
                latents = remember(
                    session,
                    episodes,
                    bank,
                    seeds=seeds,
                    global_memory=global_memory,
                    latents=latents if coder == before_this else None,
                )
            made[name] = dream(session, episodes, bank, foreign_memory=foreign, watch=watch)
        return made

    def _yardsticks(
        self, episode: Episode, windows: Sequence[Window]
    ) -> tuple[dict[str, Pieces], dict[str, float]]:
        """Rows that need no model, and per window the share of pixels the bank shows."""
        bank = self.protocol.bank
        shown = episode.frames[:bank]
        poses = episode.world_to_camera
        rows: dict[str, Pieces] = {
            "copy_last": {0: copy_last(shown, len(poses) - bank)},
            "nearest_pose": {0: nearest_pose(shown, poses[:bank], poses[bank:])},
            "oracle_warp": {},
        }
        for window in windows:
            rows["oracle_warp"][window.of_dream(bank).start] = self._warp(episode, window)
        return rows, {window.name: self._seen(episode, window) for window in windows}

    def _warp(self, episode: Episode, window: Window) -> Frames:
        bank = slice(0, self.protocol.bank)
        frames, _ = oracle_warp(
            episode.frames[bank],
            geometry(episode, bank),
            geometry(episode, window.of_clip()),
        )
        return frames

    def _seen(self, episode: Episode, window: Window) -> float:
        """Share of a window's pixels whose surface some frame of the bank sees."""
        bank = geometry(episode, slice(0, self.protocol.bank))
        here = geometry(episode, window.of_clip())
        shares = [
            seen_fraction(depth, pose, bank.depth, bank.world_to_camera, lens)
            for depth, pose, lens in zip(
                here.depth, here.world_to_camera, here.intrinsics, strict=True
            )
        ]
        return round(float(np.mean(shares)), 4)


def geometry(episode: Episode, part: slice) -> Geometry:
    """Cameras and depth of some frames of an episode that was rendered with depth."""
    if episode.depth is None:
        raise ValueError("episode: rendered without depth, which the yardsticks need")
    return Geometry(episode.world_to_camera[part], episode.intrinsics[part], episode.depth[part])
