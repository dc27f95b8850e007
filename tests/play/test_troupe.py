"""Worlds of a server that are dreamt together: company changes nothing, and harms nobody."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from torch import Tensor

from decmem.errors import UserError
from decmem.model import WorldModel
from decmem.play.defaults import PACES, Bounds
from decmem.play.journey import Chunk, Journey
from decmem.play.steering import Steering
from decmem.play.studio import Studio
from decmem.play.troupe import Troupe, stall_latents
from decmem.rollout import Session
from decmem.sampler import Running, Sampler

FRAMES = (9, 17, 13)
"""Known frames of three worlds: 3, 5 and 4 latents."""


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Latents of every pass of a model."""
    seen: list[int] = []
    forward = WorldModel.forward

    def counted(model: WorldModel, latents: Tensor, *rest: object) -> Tensor:
        seen.append(latents.shape[1])
        return forward(model, latents, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(WorldModel, "forward", counted)
    return seen


@pytest.fixture
def studio(session: Callable[..., Session]) -> Iterator[Callable[..., Studio]]:
    """Studios of two denoising steps; settings are those of `Bounds`."""
    opened: list[Studio] = []

    def made(company: bool = True, deferred: bool = True, **bounds: int) -> Studio:
        running = Running(graphs="eager" if company else "off")
        walker = session(steps=2, running=running)
        walker.deferred = deferred
        limits = Bounds(**{"together": 40} | bounds)  # pyright: ignore[reportArgumentType]
        opened.append(Studio(walker, "tiny", limits, PACES["cpu"], together=company))
        return opened[-1]

    yield made
    for one in opened:
        one.close()


def begun(studio: Studio, frames: Sequence[int] = FRAMES) -> list[Journey]:
    journeys = [studio.journey(i) for i in range(len(frames))]
    for seed, (journey, count) in enumerate(zip(journeys, frames, strict=True)):
        for _ in journey.begin_seed(seed, count):
            pass
    return journeys


def steered(journey: Journey) -> np.ndarray:
    """Actions that depend on the world and on how far it is."""
    session = journey.session
    steering = Steering()
    steering.hear(["forward"], [3.0 * session.seeds[0] - session.length, 1.0], 1)
    return steering.actions(4 * session.chunk)


def asked(studio: Studio, journeys: Sequence[Journey]) -> list["Future[Chunk]"]:
    """All of them ask while the worker is busy."""
    troupe, free = studio.troupe, threading.Event()
    assert troupe is not None
    studio.worker.submit(free.wait)
    answers = [troupe.ask(one, steered(one), studio.worker) for one in journeys]
    free.set()
    studio.worker.submit(lambda: None).result()
    return answers


def gone(studio: Studio, journeys: Sequence[Journey]) -> list[Chunk]:
    """A chunk of each, in company where the studio has a troupe."""
    if studio.troupe is None:
        return [one.go(steered(one)) for one in journeys]
    return [answer.result(60) for answer in asked(studio, journeys)]


def assert_alike(got: Journey, expected: Journey) -> None:
    mine, theirs = got.session.latents, expected.session.latents
    assert mine is not None
    assert theirs is not None
    assert theirs.std() > 0.1
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert [w.latents for w in got.session.history.written] == [
        w.latents for w in expected.session.history.written
    ]


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_company_changes_no_world(
    guidance: float | None, deferred: bool, studio: Callable[..., Studio], passes: list[int]
) -> None:
    """Three worlds go on, one pauses, one is rewound, one takes up a branch; each as if alone."""
    walked: list[list[Journey]] = []
    shown: list[list[Chunk]] = []
    for together in (True, False):
        one = studio(together, deferred)
        one.session.guidance = guidance
        journeys = begun(one)
        made = gone(one, journeys)
        passes.clear()
        made += gone(one, journeys)
        branches = 1 if guidance is None else 2
        if together:
            # Four rows, two steps, and the write pass.
            assert passes == [4 * branches] * 2 + [4]
        made += gone(one, journeys[1:])  # the first pauses
        kept = journeys[2].snapshot()
        journeys[1].rewind(4)
        made += gone(one, journeys)
        for _ in journeys[2].begin_saved(kept):
            pass
        made += gone(one, journeys)
        made += gone(one, journeys[:1])  # alone again, then in company
        passes.clear()
        made += gone(one, journeys)
        walked.append(journeys)
        shown.append(made)
        for journey in journeys:
            journey.close()
    for mine, theirs in zip(*walked, strict=True):
        assert_alike(mine, theirs)
    for mine, theirs in zip(*shown, strict=True):
        assert np.abs(mine.dream.astype(int) - theirs.dream).max() <= 1
        assert mine.truth is not None
        assert theirs.truth is not None
        assert np.array_equal(mine.truth, theirs.truth)
        assert np.array_equal(mine.world_to_camera, theirs.world_to_camera)
        assert (mine.first_frame, mine.latents) == (theirs.first_frame, theirs.latents)
        assert mine.times.keys() == theirs.times.keys()


def test_who_wants_something_of_its_own_goes_alone(
    studio: Callable[..., Studio], passes: list[int]
) -> None:
    one = studio()
    journeys = begun(one, (9, 9, 13, 9, 9, 5))
    journeys[0].session.lens = True
    journeys[1].session.steps = 1
    journeys[4].session.retrieved = 3
    passes.clear()
    made = gone(one, journeys)
    # The third and the fourth, and the last, with a history that just fills the window.
    assert passes.count(4) == 2 + 1
    assert passes.count(1) == 2 + 1 + 2
    assert made[0].lens is not None
    assert made[2].lens is None


def test_a_short_history_goes_alone(studio: Callable[..., Studio], passes: list[int]) -> None:
    one = studio()
    journeys = begun(one, (9, 1, 9))
    passes.clear()
    gone(one, journeys)
    assert passes == [2, 2, 2, 1, 1]


def test_a_world_alone_waits_for_nobody(studio: Callable[..., Studio]) -> None:
    one = studio()
    journey, other = begun(one, (9, 9))
    assert gone(one, [journey])[0].latents == 4
    assert one.troupe is not None
    assert one.troupe.stable is None
    gone(one, [journey, other])
    assert one.troupe.stable is not None


def test_sixteen_are_the_most_of_a_pass(studio: Callable[..., Studio], passes: list[int]) -> None:
    one = studio(sessions=18)
    journeys = begun(one, (9,) * 18)
    passes.clear()
    gone(one, journeys)
    assert passes == [16, 16, 16, 2, 2, 2]


def test_what_one_asks_wrongly_is_told_to_it_alone(studio: Callable[..., Studio]) -> None:
    one, alone = studio(), studio(company=False)
    journeys, others = begun(one), begun(alone)
    expected = gone(alone, [others[0], others[2]])
    assert one.troupe is not None
    free = threading.Event()
    one.worker.submit(free.wait)
    wrong = np.full((4, 6), 1e6, np.float32)
    actions = [steered(journeys[0]), wrong, steered(journeys[2])]
    answers = [
        one.troupe.ask(journey, acted, one.worker)
        for journey, acted in zip(journeys, actions, strict=True)
    ]
    free.set()
    with pytest.raises(UserError, match="actions"):
        answers[1].result(60)
    for answer, theirs in zip((answers[0], answers[2]), expected, strict=True):
        assert np.abs(answer.result(60).dream.astype(int) - theirs.dream).max() <= 1
    assert journeys[1].session.length == 5
    # Its player stands where it stood, and it goes on.
    assert np.array_equal(gone(one, journeys)[1].truth, gone(alone, [others[1]])[0].truth)


@pytest.mark.parametrize("broken", ["generate_together", "write_together"])
def test_a_pass_that_fails_costs_no_world(
    broken: str, studio: Callable[..., Studio], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, alone = studio(), studio(company=False)
    journeys, others = begun(one), begun(alone)

    def fails(*_: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as now:
        now.setattr(Sampler, broken, fails)
        gone(one, journeys)
        gone(one, journeys)
    gone(one, journeys)
    for _ in range(3):
        gone(alone, others)
    for mine, theirs in zip(journeys, others, strict=True):
        assert_alike(mine, theirs)


def test_a_world_that_fails_harms_no_other(
    studio: Callable[..., Studio], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = studio()
    journeys = begun(one)

    def fails(*_: object, later: bool) -> None:
        raise RuntimeError(f"torn, {later}")

    monkeypatch.setattr(journeys[1].session.history, "write", fails)
    answers = asked(one, journeys)
    with pytest.raises(RuntimeError, match="torn"):
        answers[1].result(60)
    assert [answers[i].result(60).latents for i in (0, 2)] == [4, 5]
    assert [answer.result(60).latents for answer in asked(one, [journeys[0], journeys[2]])] == [
        5,
        6,
    ]


def test_a_request_that_was_withdrawn_is_not_served(studio: Callable[..., Studio]) -> None:
    one = studio()
    journeys = begun(one)
    assert one.troupe is not None
    free = threading.Event()
    one.worker.submit(free.wait)
    answers = [one.troupe.ask(journey, steered(journey), one.worker) for journey in journeys]
    answers[0].cancel()
    free.set()
    assert [answer.result(60).latents for answer in answers[1:]] == [6, 5]
    assert journeys[0].session.length == 3


def test_who_outgrows_its_stall_goes_on_alone(
    studio: Callable[..., Studio], passes: list[int]
) -> None:
    one, alone = studio(together=8), studio(company=False)
    journeys, others = begun(one, (9, 9, 21)), begun(alone, (9, 9, 21))
    troupe = one.troupe
    assert troupe is not None
    stalled = []
    for _ in range(8):
        gone(one, journeys)
        gone(alone, others)
        assert troupe.stable is not None
        banks = [journey.session.history.bank for journey in journeys]
        stalled.append(
            [bank is not None and troupe.stable.stall(bank) is not None for bank in banks]
        )
    assert stalled[0] == [True] * 3
    assert not stalled[-1][2]
    for mine, theirs in zip(journeys, others, strict=True):
        assert_alike(mine, theirs)
    # Rewound, it moves in again.
    journeys[2].rewind(4)
    passes.clear()
    gone(one, journeys[1:])
    assert passes[-1] == 2


def test_stalls_that_are_taken_leave_others_alone(studio: Callable[..., Studio]) -> None:
    one = studio(sessions=2)
    journeys = begun(one)
    assert [chunk.latents for chunk in gone(one, journeys)] == [4, 6, 5]
    troupe = one.troupe
    assert troupe is not None
    assert troupe.stable is not None
    whole = troupe.stable.whole.layers[0].keys.untyped_storage().data_ptr()

    def stalled(journey: Journey) -> bool:
        bank = journey.session.history.bank
        assert bank is not None
        return bank.layers[0].keys.untyped_storage().data_ptr() == whole

    assert [stalled(one) for one in journeys] == [True, True, False]
    # Who leaves makes room.
    journeys.pop(0)
    gone(one, journeys)
    assert [stalled(one) for one in journeys] == [True, True]
    troupe.rest()
    assert troupe.stable is not None
    journeys.clear()
    troupe.rest()
    assert troupe.stable is None


def test_graphs_are_kept_for_few_ways(studio: Callable[..., Studio], passes: list[int]) -> None:
    one = studio(sessions=8)
    journeys = begun(one, (9,) * 8)
    for i, journey in enumerate(journeys):
        journey.session.retrieved = 2 + i // 2
    passes.clear()
    gone(one, journeys)
    assert passes == [2, 2, 2] * 3 + [1, 1] * 2


def test_the_size_of_stalls_is_bounded(studio: Callable[..., Studio]) -> None:
    one = studio()
    chunk = one.session.config.chunk
    assert stall_latents(one.session.sampler, Bounds(sessions=3, together=40)) == (
        40 + chunk,
        3 * (40 + chunk),
    )
    assert isinstance(one.troupe, Troupe)
    # On a CPU nothing is gained by it.
    assert Studio(one.session, "tiny", Bounds(), PACES["cpu"], one.worker).troupe is None


def test_a_server_counts_the_stalls(live: Callable) -> None:
    server = live(together=True, memory_frames=9)
    studio = server.lobby.studio

    def holdings() -> dict[str, int]:
        return json.loads(server.fetch("/memory")[1])

    clients = [server.visitor()[0] for _ in range(2)]
    for seed, client in enumerate(clients):
        client.say("start", **{"from": "seed", "seed": seed})
        client.hear("started")

    def stand_still() -> None:
        for client in clients:
            client.say("pause")
            while client.hear("status")["state"] != "paused":
                pass
            client.say("seen", chunk=99)

    stand_still()
    free = threading.Event()
    studio.worker.submit(free.wait)
    try:
        for client in clients:
            client.say("resume")
        assert server.settles(lambda: studio.troupe.waiting == 2)
    finally:
        free.set()
    for client in clients:
        client.chunk()
    stand_still()
    held = holdings()
    told = [[m for m in client.said if m["type"] == "chunk"][-1] for client in clients]
    assert sum(chunk["memory_bytes"] for chunk in told) == held["stated_bytes"]
    assert held["stated_bytes"] == held["arena_bytes"]
    # Two of the four stalls are taken.
    assert held["stable_bytes"] == 2 * held["arena_bytes"] == 2 * held["vacant_bytes"]
    for client in clients:
        client.say("bye")
        client.hear("bye")
    assert server.settles(lambda: holdings()["worlds"] == 0)
    assert server.settles(lambda: holdings()["stable_bytes"] == 0)
    assert holdings()["arena_bytes"] == 0
