"""A server that stops while work is under way: quietly, and nobody is left waiting."""

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from decmem.play.defaults import PACES, Bounds
from decmem.play.journey import Chunk
from decmem.play.steering import Steering
from decmem.play.studio import Stopped, Studio
from decmem.play.troupe import Troupe
from decmem.rollout import Session


@pytest.fixture
def busy() -> Iterator[threading.Event]:
    """Set, it ends the work that waits for it."""
    free = threading.Event()
    yield free
    free.set()


def faults(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_server_stops_quietly_while_all_wait_for_the_worker(
    live: Callable, busy: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    server = live(sessions=3)
    walker, leaver, starter = (server.visitor()[0] for _ in range(3))
    for seed, client in enumerate((walker, leaver)):
        client.say("start", **{"from": "seed", "seed": seed})
        client.chunk()
    queued, behind = server.client(), server.client()
    behind.hear("queue")
    server.lobby.studio.worker.submit(busy.wait)
    leaver.say("bye")
    starter.say("start", **{"from": "seed", "seed": 5})
    walker.say("rewind", latent=2)
    asked = threading.Thread(target=lambda: answers.append(server.fetch("/memory")))
    answers: list[tuple[int, bytes]] = []
    asked.start()
    waiting = server.lobby.studio.worker._work_queue
    assert server.settles(lambda: waiting.qsize() >= 4)
    server.server.should_exit = True
    server.thread.join(30)
    assert not server.thread.is_alive()
    assert not busy.is_set()  # nobody waited for what the worker was at
    asked.join(30)
    assert answers[0][0] == 503
    assert json.loads(answers[0][1])["error"]["argument"] == "server"
    assert walker.hear("bye")["reason"] == "the server stops"
    for client in (leaver, starter, queued, behind):
        with pytest.raises(ConnectionClosed):
            client.hear("never")
    assert {message["type"] for message in behind.said} == {"queue"}  # nor did it move up
    assert faults(caplog) == []


def test_who_leaves_while_its_world_is_made_leaves_nothing_in_the_log(
    live: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    server = live(memory_frames=61)
    good, _ = server.visitor()
    good.say("start", **{"from": "seed", "seed": 3})
    good.chunk()
    for seed in range(3):
        client, _ = server.visitor()
        client.say("start", **{"from": "seed", "seed": seed})
        client.hear("progress")
        client.say("bye")
        client.hear("bye")
    assert server.settles(lambda: len(server.lobby.guests) == 1)
    assert good.chunk()["chunk"]
    assert faults(caplog) == []


def test_work_that_will_not_be_done_is_told(
    session: Callable[..., Session], busy: threading.Event
) -> None:
    studio = Studio(session(), "tiny", Bounds(), PACES["cpu"])

    async def walk() -> None:
        studio.worker.submit(busy.wait)
        waiting = asyncio.create_task(studio.work(int))
        called_off = asyncio.create_task(studio.work(int))
        await asyncio.sleep(0)
        called_off.cancel()
        studio.close()
        with pytest.raises(Stopped):
            await waiting
        with pytest.raises(asyncio.CancelledError):
            await called_off
        with pytest.raises(Stopped):
            await studio.work(int)
        with pytest.raises(Stopped):
            await studio.go(studio.journey(0), Steering().actions(4))

    asyncio.run(walk())


def test_who_is_put_back_when_the_troupe_closes_is_called_off(
    session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = Studio(session(), "tiny", Bounds(), PACES["cpu"], together=True)
    troupe, actions = studio.troupe, Steering().actions(4)
    assert troupe is not None
    journeys = [studio.journey(i) for i in range(3)]
    first, last = (object.__new__(ThreadPoolExecutor) for _ in range(2))
    for one in (first, last):
        monkeypatch.setattr(one, "submit", lambda piece: None, raising=False)
    answers: list[Future[Chunk]] = [troupe.ask(one, actions, first) for one in journeys]

    def company(waiting: list) -> list:
        studio.close()  # while nobody stands in the queue
        return waiting[:1]

    monkeypatch.setattr(Troupe, "_company", lambda self, waiting: company(waiting))
    troupe.perform()
    assert [answer.done() for answer in answers] == [True] * 3
    assert [answer.cancelled() for answer in answers] == [False, True, True]
    assert troupe.ask(journeys[0], actions, last).cancelled()


def test_painters_show_a_world_as_the_worker_would(session: Callable[..., Session]) -> None:
    shown: list[np.ndarray] = []
    for painters in (0, 2):
        pace = replace(PACES["cpu"], painters=painters)
        studio = Studio(session(), "tiny", Bounds(), pace)

        async def begin(studio: Studio = studio) -> list[tuple[str, bool]]:
            journey = studio.journey(0)
            pieces, told = journey.begin_seed(3, 41), []
            while (progress := await studio.advance(pieces)) is not None:
                told.append((progress.stage, progress.beside is not None))
                if progress.beside is not None:
                    # The worker is free for others while a painter is at it.
                    assert await studio.work(int) == 0
                    await studio.until(progress.beside)
            latents = journey.session.latents
            assert latents is not None
            shown.append(latents.numpy())
            journey.close()
            return told

        told = asyncio.run(begin())
        assert sum(beside for _, beside in told) == (2 if painters else 0)
        assert told[-1][0] == "remember"
        studio.close()
    assert np.array_equal(*shown)
