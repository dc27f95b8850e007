"""The files of an evaluation: one per finished episode, so that nothing is lost, and the results.

``OUT/episodes/WALK_SEED.json``, ``OUT/results.json``, ``OUT/table.md``, ``OUT/curves.json`` and
``OUT/curves.png``.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decmem.evaluation.curves import draw_row_curves
from decmem.evaluation.protocol import Protocol
from decmem.evaluation.report import (
    CONVENTIONS,
    SCHEMA_VERSION,
    curves_json,
    markdown,
    mean_curves,
    tabulate,
)
from decmem.evaluation.scoring import EpisodeScore
from decmem.storage import atomic_file, write_json
from decmem.world.version import FPS

logger = logging.getLogger(__name__)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(settings)))


def save_score(out: Path, settings: Mapping[str, Any], score: EpisodeScore) -> None:
    """Keep one finished episode, together with the settings its figures depend on."""
    path = out / "episodes" / f"{score.walk}_{score.seed}.json"
    text = json.dumps({"settings": _plain(settings), "score": score.to_plain()})
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def load_scores(out: Path, settings: Mapping[str, Any]) -> dict[tuple[str, int], EpisodeScore]:
    """Episodes kept under ``out`` with equal settings, by walk and seed. Others (of other weights,
    another version, damaged) are left out and said to be."""
    kept: dict[tuple[str, int], EpisodeScore] = {}
    others = 0
    for path in sorted((out / "episodes").glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["settings"] != _plain(settings):
                others += 1
                continue
            score = EpisodeScore(**record["score"])
        except (ValueError, KeyError, TypeError):
            others += 1
            continue
        kept[score.walk, score.seed] = score
    if others:
        logger.warning(
            "%d episodes in %s are of other weights or settings, and are not used", others, out
        )
    return kept


def write_results(
    out: Path,
    protocol: Protocol,
    episodes: Sequence[EpisodeScore],
    header: Mapping[str, Any],
) -> dict[str, Any]:
    """results.json, table.md, curves.json and a plot per walk, from the episodes so far.

    ``header`` holds the top-level keys that say what was run (preset, steps, machine, ...).
    Returns the content of results.json.
    """
    done = min(sum(e.walk == walk for e in episodes) for walk in protocol.walks)
    results = {
        "schema_version": SCHEMA_VERSION,
        **header,
        "conventions": CONVENTIONS,
        "bank_frames": protocol.bank,
        "windows": list(protocol.window_names),
        "seeds": list(protocol.seeds),
        "episodes": done,
        "complete": len(episodes) == len(protocol.seeds) * len(protocol.walks),
        "rows": tabulate(protocol, episodes),
    }
    write_json(out / "results.json", results)
    with atomic_file(out / "table.md") as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    with atomic_file(out / "curves.json") as temporary:
        temporary.write_text(json.dumps(curves_json(protocol, episodes)) + "\n", encoding="utf-8")
    counts = {walk: sum(e.walk == walk for e in episodes) for walk in protocol.walks}
    draw_row_curves(
        {walk: mean_curves(episodes, walk) for walk, count in counts.items() if count},
        protocol.bank + 1,
        FPS,
        {walk: f"{walk} walk, mean over {n} held-out worlds" for walk, n in counts.items()},
        out / "curves.png",
    )
    return results
