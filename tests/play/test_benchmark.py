"""The benchmark of the live page reports what its known inputs mean."""

import asyncio
import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

MEBI = 2**20


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("play_figures")


@pytest.fixture
def phases(figures: ModuleType) -> ModuleType:
    return importlib.import_module("play_phases")


@pytest.fixture
def soaks(figures: ModuleType) -> ModuleType:
    return importlib.import_module("play_soak")


def memory(
    worlds: int, bank: int, resident: int, gpu: int | None = None, vacant: int = 0
) -> dict[str, Any]:
    return {
        "worlds": worlds,
        "latents": 100 * worlds,
        "stated_bytes": bank,
        "arena_bytes": bank,
        "stable_bytes": vacant,
        "vacant_bytes": vacant,
        "written_bytes": bank // 2,
        "past_bytes": bank // 8,
        "resident_bytes": resident,
        "gpu_bytes": gpu,
        "gpu_reserved_bytes": gpu,
    }


def test_the_rate_is_that_of_the_chunks_and_a_gap_at_the_end_counts(figures: ModuleType) -> None:
    steady = [(0.3 + 0.4 * i, 4) for i in range(24)]
    assert figures.rate(steady, 10) == pytest.approx(10)
    # What stops half way was fast only as long as it went on.
    assert figures.rate(steady[:12], 10) == pytest.approx(5.2)
    assert figures.rate([(0.3 + 0.5 * i, 4) for i in range(20)], 10) == pytest.approx(8)
    assert figures.rate(steady[:1], 10) == 0


def test_medians_are_over_all_visitors(figures: ModuleType) -> None:
    def visitor(wait: float, rate: float, ready: float) -> SimpleNamespace:
        chunks = [
            {
                "at": 4 / rate * i,
                "frames": 4,
                "action_to_frame": wait + i if i else None,
                "times": {"total": wait},
            }
            for i in range(11)
        ]
        return SimpleNamespace(chunks=chunks, ready=ready)

    told = figures.timing([visitor(0, 10, 2.0), visitor(10, 5, 3.0)], 4)
    assert told["frames_per_second"]["slowest"] == pytest.approx(5)
    assert told["frames_per_second"]["median"] == pytest.approx(7.5)
    # Waits of 1 to 20 s: the 19th is the 95th percentile.
    assert told["action_to_frame"] == {"median": 10.5, "p95": 19, "count": 20}
    assert told["seconds_per_chunk"] == {"total": 5}
    assert told["seconds_to_first_chunk"] == 3.0


@pytest.mark.parametrize("largest", [0, 1, 2, 3, 5, 8, 11, 31, 63, 64])
def test_the_search_finds_the_largest_that_holds(figures: ModuleType, largest: int) -> None:
    asked = []

    async def holds(count: int) -> bool:
        asked.append(count)
        return count <= largest

    most, complete = asyncio.run(figures.most_that_hold(holds, 64, lambda: False))
    assert (most, complete) == (largest, True)
    assert len(asked) == len(set(asked)) <= 12
    assert max(asked) <= max(1, 2 * largest)


def test_the_search_stops_in_time_and_says_so(figures: ModuleType) -> None:
    asked = []

    async def holds(count: int) -> bool:
        asked.append(count)
        return True

    found = asyncio.run(figures.most_that_hold(holds, 64, lambda: len(asked) == 3))
    assert found == (4, False)


def test_a_session_takes_what_the_idle_server_did_not_hold(figures: ModuleType) -> None:
    found = figures.per_session(memory(4, 8 * MEBI, 140 * MEBI, 60), memory(0, 0, 100 * MEBI, 20))
    assert found["arena_bytes"] == 2 * MEBI
    assert found["resident_bytes"] == 10 * MEBI
    assert (found["gpu_bytes"], found["latents"], found["worlds"]) == (10, 100, 4)


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, set()),
        ({"told": 7 * MEBI}, {"held_is_exactly_stated"}),
        ({"left": 1}, {"nothing_stays_of_closed_worlds"}),
        ({"vacant": 1}, {"nothing_stays_of_closed_worlds"}),
        ({"after": 106 * MEBI}, {"memory_returns_within_5_percent"}),
        ({"after": 94 * MEBI}, {"memory_returns_within_5_percent"}),
        ({"gpu": 106}, {"memory_returns_within_5_percent"}),
        ({"lost": ["the connection ended"]}, {"nobody_is_dropped"}),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_the_verdict_names_what_was_broken(
    figures: ModuleType, change: dict[str, Any], broken: set[str]
) -> None:
    idle = memory(0, 0, 100 * MEBI, 100)
    samples = [memory(8, x * MEBI, (100 + x) * MEBI, 100 + x) for x in (4, 8)]
    after = memory(
        change.get("left", 0),
        0,
        change.get("after", 104 * MEBI),
        change.get("gpu", 100),
        change.get("vacant", 0),
    )
    told, lost = change.get("told", 8 * MEBI), change.get("lost", [])
    found = figures.verdict(idle, samples, told, after, lost)
    assert {name for name, good in found.items() if not good} == broken


def test_an_arena_that_is_larger_than_it_says_is_told(figures: ModuleType) -> None:
    idle = memory(0, 0, 100)
    wrong = memory(8, 8, 100) | {"arena_bytes": 9}
    found = figures.verdict(idle, [wrong, memory(8, 8, 100)], 8, idle, [])
    assert not found["held_is_exactly_stated"]


def test_growth_that_no_world_accounts_for_is_told(figures: ModuleType) -> None:
    # 400 more are history, 100 more are latents and steering.
    found = figures.growth([memory(8, 800, 1000), memory(8, 1600, 2000)], memory(0, 0, 50))
    assert found["resident_beyond_worlds"] == 1000 - 500
    assert "gpu_beyond_worlds_since_idle" not in found
    # On a GPU the worlds are there, and reserved as a whole.
    there = [memory(8, 800, 1000, 600 + 800), memory(8, 1600, 2000, 700 + 1600, vacant=100)]
    found = figures.growth(there, memory(0, 0, 50, 500))
    assert found["resident_beyond_worlds"] == 1000
    assert found["gpu_beyond_worlds_since_idle"] == 600 + 1600 - 500 - 1600 - 200


@pytest.mark.parametrize("known", [(4, True), (4, False), (64, True), (1, False), (100, True)])
def test_a_search_asks_for_nothing_that_is_known(
    figures: ModuleType, known: tuple[int, bool]
) -> None:
    count, held = known
    largest = 11 if held else 2
    largest = max(largest, count) if held else min(largest, count - 1)
    asked = []

    async def holds(count: int) -> bool:
        asked.append(count)
        return count <= largest

    found = asyncio.run(figures.most_that_hold(holds, 64, lambda: False, known))
    assert found == (min(largest, 64), True)
    assert count not in asked
    assert all((one > count) == held for one in asked)


def test_a_phase_that_is_overdue_says_what_it_waits_for(
    phases: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    run = phases.Phases()

    async def walk() -> None:
        async with run.phase("entering", 60):
            pass
        async with run.phase("leaving", 0.01, lambda: "2 are there"):
            await phases.until(lambda: False)

    with pytest.raises(phases.Overdue, match=r"leaving took longer than 0 s: 2 are there"):
        asyncio.run(walk())
    assert list(run.took) == ["entering", "leaving"]
    assert "leaving: overdue" in capsys.readouterr().err


class Host:
    """A server that tells of its memory as often as it is `patient`."""

    resident = 100 * MEBI

    def __init__(self, patient: int) -> None:
        self.patient = patient
        self.inside = 0

    async def memory(self, limit: float) -> dict[str, Any]:
        if self.patient == 0:
            await asyncio.sleep(3600)
        self.patient -= 1
        return memory(self.inside, self.inside * MEBI, self.resident)


class Walker:
    """A visitor who does as it is told, and enters if it is `welcome`."""

    welcome = True

    def __init__(self, server: Host, seed: int, settings: dict[str, Any]) -> None:
        self.server = server
        self.seed = seed
        self.hello = {"preset": "tiny", "weights": "x"}
        self.ready, self.stage, self.lost = 0.1, "render 3 of 5", None
        self.told_bytes, self.stands = 0, False

    async def enter(self) -> None:
        if not self.welcome and self.seed:
            await asyncio.sleep(3600)
        self.told_bytes = MEBI
        self.server.inside += 1

    async def walk(self, on: bool) -> None:
        self.stands = not on

    async def leave(self) -> None:
        self.server.inside -= 1

    def vanish(self) -> None:
        pass

    def forget(self) -> None:
        self.heard_at = asyncio.get_running_loop().time() + 3600
        self.chunks = [
            {"at": i, "frames": 4, "action_to_frame": None, "times": {"total": 0.1}}
            for i in range(9)
        ]


@pytest.mark.parametrize(
    ("patient", "welcome", "stage"),
    [(99, True, None), (99, False, "render 3 of 5"), (1, True, "stalls"), (0, True, "first visit")],
    ids=["whole", "shut out", "stalled", "silent"],
)
def test_a_soak_that_breaks_off_keeps_what_it_has(
    soaks: ModuleType,
    phases: ModuleType,
    figures: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    patient: int,
    welcome: bool,
    stage: str | None,
) -> None:
    for name, value in {"Visitor": Walker, "SILENCE": 0.3, "_CALM": 0.0}.items():
        monkeypatch.setattr(soaks, name, value)
    monkeypatch.setattr(Walker, "welcome", welcome)

    async def at_once(server: Host, settings: dict[str, Any], clients: int) -> dict[str, Any]:
        return await server.memory(1)

    monkeypatch.setattr(soaks, "warmed", at_once)
    coming = 60 if welcome and patient else 0.3
    soak = soaks.Soak(Host(patient), phases.Phases(), 2, 0.3, coming, {})
    found = asyncio.run(soak.run())
    assert found["verdict"]["nothing_is_overdue"] == (stage is None)
    assert figures.told(found)
    if stage is None:
        assert all(found["verdict"].values())
        assert len(found["verdict"]) == 5
        assert found["rows"][0]["clients"] == 2
    else:
        assert stage in found["overdue"]
        assert (found["memory"]["idle"] is None) == (patient == 0)
        assert found["rows"] == found["memory"]["samples"] == []
