"""Means, intervals, paired differences and the files they go to, with numbers worked by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from decmem.evaluation import record, report
from decmem.evaluation.protocol import Protocol, Window
from decmem.evaluation.scoring import METRICS, ROWS, EpisodeScore

PROTOCOL = Protocol((1, 2, 3), ("retrace", "free"), (Window(6, 7), Window(9, 10)), bank=5)
HEADER = {
    "preset": "tiny",
    "steps": 4,
    "world_version": "blockworld/0",
    "commit": "abc",
    "weights_sha256": "0" * 64,
}


def score(seed: int, walk: str, value: float, seen: float, window: bool = False) -> EpisodeScore:
    """Decoupled at ``value`` dB, without its global memory 2 * seed dB lower."""

    def row(psnr: float) -> dict[str, float | None]:
        return {**dict.fromkeys(METRICS, 0.5), "psnr_per_frame": psnr}

    rows = {
        "truth": {"gradient_energy": 0.002},
        "decoupled": row(value),
        "without_global_memory": row(value - 2 * seed),
    }
    curves: dict[str, list[float | None]] = {
        "decoupled": [value] * 5,
        "oracle_warp": [value, value, None, None, None],
    }
    if window:
        rows["window"] = row(value - 1)
    names = [w.name for w in PROTOCOL.windows]
    return EpisodeScore(seed, walk, dict.fromkeys(names, seen), curves, dict.fromkeys(names, rows))


EPISODES = [
    score(1, "retrace", 20.0, 1.0),
    score(2, "retrace", 24.0, 1.0, window=True),
    score(3, "retrace", 28.0, 1.0),
    score(1, "free", 15.0, 0.9),
    score(2, "free", 11.0, 0.1),
    score(3, "free", 13.0, 0.5),
]


def find(rows: list[dict], **wanted: str) -> dict:
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1
    return found[0]


def test_means_count_the_episodes_that_have_the_row() -> None:
    rows = report.tabulate(PROTOCOL, EPISODES)
    here = {"walk": "retrace", "window": "6-7", "metric": "psnr_per_frame"}
    ours = find(rows, memory="decoupled", **here)
    assert (ours["value"], ours["n"]) == (24.0, 3)
    assert ours["ci95"] == [20.0, 28.0]  # three values: the extremes have 1/27 each
    window = find(rows, memory="window", **here)
    assert (window["value"], window["n"], window["ci95"]) == (23.0, 1, None)


def test_what_was_not_measured_is_null() -> None:
    rows = report.tabulate(PROTOCOL, EPISODES)
    absent = find(rows, memory="codec", walk="retrace", window="9-10", metric="ssim")
    assert (absent["value"], absent["ci95"], absent["n"]) == (None, None, 0)
    cells = {(r["memory"], r["walk"], r["window"], r["metric"]) for r in rows}
    assert len(cells) == len(rows) == 3 * 2 * (1 + len(ROWS) * (len(METRICS) + 1) - 1)


def test_differences_are_paired() -> None:
    rows = report.tabulate(PROTOCOL, EPISODES)
    off = find(
        rows,
        memory="without_global_memory",
        walk="retrace",
        window="6-7",
        metric=report.DIFFERENCE,
    )
    assert off["value"] == -4.0  # -2, -4, -6: the spread of the levels does not enter
    assert off["ci95"] == [-6.0, -2.0]
    window = find(rows, memory="window", walk="retrace", window="6-7", metric=report.DIFFERENCE)
    assert (window["value"], window["n"]) == (-1.0, 1)


def test_free_walks_split_into_seen_and_novel() -> None:
    rows = report.tabulate(PROTOCOL, EPISODES)
    here = {"memory": "decoupled", "window": "6-7", "metric": "psnr_per_frame"}
    assert find(rows, walk="free_seen", **here)["value"] == 15.0
    assert find(rows, walk="free_novel", **here)["value"] == 11.0


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(20.0, 2.0, 400).tolist()
    interval = report.bootstrap_interval(values)
    assert interval is not None
    half = 1.96 * np.std(values) / np.sqrt(400)
    assert interval == pytest.approx([np.mean(values) - half, np.mean(values) + half], abs=0.03)
    assert interval == report.bootstrap_interval(values)


def test_curves_leave_out_what_was_not_drawn() -> None:
    curves = report.mean_curves(EPISODES, "retrace")
    assert set(curves) == {"decoupled", "oracle_warp"}
    assert curves["decoupled"].tolist() == [24.0] * 5
    assert curves["oracle_warp"][:2].tolist() == [24.0, 24.0]
    assert np.isnan(curves["oracle_warp"][2:]).all()


def test_the_files_say_the_same(tmp_path: Path) -> None:
    results = record.write_results(tmp_path, PROTOCOL, EPISODES, HEADER)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored == json.loads(json.dumps(results))
    assert (stored["episodes"], stored["complete"], stored["steps"]) == (3, True, 4)
    for name in ("schema_version", "world_version", "commit", "weights_sha256", "conventions"):
        assert stored[name]
    assert set(stored["rows"][0]) == {
        "memory", "walk", "window", "metric", "value", "ci95", "n"
    }  # fmt: skip
    table = (tmp_path / "table.md").read_text()
    assert "| memory | 6-7 | vs decoupled | 9-10 | vs decoupled |" in table
    assert "| decoupled | 24.00 [20.00, 28.00] |  | 24.00 [20.00, 28.00] |  |" in table
    assert "| -4.00 [-6.00, -2.00] |" in table
    assert "| codec | - | - | - | - |" in table
    assert "| episodes | 3 |  | 3 |  |" in table
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert curves["first_frame"] == 6
    assert curves["mean"]["retrace"]["oracle_warp"] == [24.0, 24.0, None, None, None]
    assert len(curves["episodes"]) == 6
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.json", "curves.png", "results.json", "table.md"
    ]  # fmt: skip


def test_a_walk_s_table_has_its_own_windows(tmp_path: Path) -> None:
    still = (Window(6, 7), Window(19, 20))
    protocol = Protocol((1,), ("retrace", "still"), PROTOCOL.windows, 5, still)
    row = score(1, "still", 20.0, 1.0).windows["6-7"]
    curves: dict[str, list[float | None]] = {"decoupled": [20.0] * 15}
    stood = EpisodeScore(1, "still", {"6-7": 1.0, "19-20": 1.0}, curves, {"6-7": row, "19-20": row})
    results = record.write_results(tmp_path, protocol, [EPISODES[0], stood], HEADER)
    assert results["windows"] == ["6-7", "9-10", "19-20"]
    assert {r["window"] for r in results["rows"] if r["walk"] == "still"} == {"6-7", "19-20"}
    before, after = (tmp_path / "table.md").read_text().split("## still")
    assert "| memory | 6-7 | vs decoupled | 9-10 | vs decoupled |" in before
    assert "| memory | 6-7 | vs decoupled | 19-20 | vs decoupled |" in after
    assert "9-10" not in after


def test_kept_episodes_count_only_under_equal_settings(tmp_path: Path) -> None:
    settings = {"steps": 4, "size": (16, 24)}
    for episode in EPISODES[:2]:
        record.save_score(tmp_path, settings, episode)
    (tmp_path / "episodes" / "retrace_9.json").write_text('{"settings": {"st')  # cut off
    kept = record.load_scores(tmp_path, settings)
    assert kept == {("retrace", 1): EPISODES[0], ("retrace", 2): EPISODES[1]}
    assert record.load_scores(tmp_path, {**settings, "steps": 8}) == {}
    assert record.load_scores(tmp_path / "nowhere", settings) == {}
