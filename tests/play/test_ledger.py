"""What the server says its worlds hold is what they hold, and nothing of it stays behind."""

import gc
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from decmem.memory.bank import LayerBank
from decmem.play.ledger import ledger
from decmem.rollout import Session
from decmem.world.grid import World

CPU = torch.device("cpu")


def alive(*kinds: type) -> list[Any]:
    """Everything of these kinds that is alive in this process."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) in kinds]


def storage(layers: list[LayerBank]) -> int:
    """Bytes behind their arenas."""
    parts = [t.untyped_storage() for one in layers for t in (one.keys, one.values, one.pooled)]
    return sum({part.data_ptr(): part.nbytes() for part in parts}.values())


def test_an_empty_server_holds_nothing() -> None:
    held = ledger([], CPU)
    assert {name for name, value in held.items() if value is None} == {
        "gpu_bytes",
        "gpu_reserved_bytes",
    }
    assert sum(value or 0 for value in held.values()) == 0


def test_bytes_are_counted_by_hand(session: Callable[..., Session]) -> None:
    one = session()
    one.observe_picture(np.zeros((64, 96, 3), np.uint8))
    one.step(np.zeros((4, 6), np.float32))
    held = ledger([one, session()], CPU)
    # Two layers: two heads of 32 channels, and for every latent its tokens twice and six blocks.
    assert one.bank is not None
    layer = one.bank.layers[0]
    assert layer.keys.shape[1:3] == (2, 64)
    tokens, channels = layer.keys.shape[3:]
    assert channels == 32
    per_latent = 2 * 2 * channels * 4 * (2 * tokens + 6)
    assert held["stated_bytes"] == held["arena_bytes"] == 64 * per_latent
    assert (held["worlds"], held["latents"]) == (2, 2)
    assert held["written_bytes"] == 2 * per_latent
    # Latents of 16 x 8 x 12 floats, then actions, cameras in float64, lens and time.
    past = 4 * 16 * 8 * 12 + 4 * 4 * 6 + 8 * 4 * 16 + 4 * 4 + 8
    assert held["past_bytes"] == 2 * past
    # What two worlds would share is there once, however often it is stated.
    shared = ledger([one, one], CPU)
    assert (shared["stated_bytes"], shared["arena_bytes"]) == (2 * 64 * per_latent, 64 * per_latent)


def test_the_worlds_of_a_server_hold_what_they_state_and_leave_nothing(live: Callable) -> None:
    # What other tests left is held, so that none of it goes meanwhile.
    before = alive(LayerBank, World)
    old = set(map(id, before))

    def new(*kinds: type) -> list[Any]:
        return [thing for thing in alive(*kinds) if id(thing) not in old]

    server = live(latents=200)

    def holdings() -> dict[str, int]:
        status, body = server.fetch("/memory")
        assert status == 200
        return json.loads(body)

    assert holdings()["worlds"] == 0
    clients = [server.visitor()[0] for _ in range(2)]
    for seed, client in enumerate(clients):
        client.say("start", **{"from": "seed", "seed": seed})
        client.chunk()
    # A branch is rebuilt in the same bank; a world begun anew lets the old bank go.
    clients[0].say("fork")
    clients[0].chunk()
    clients[0].say("branch", id=0)
    clients[0].chunk()
    clients[1].say("start", **{"from": "seed", "seed": 7})
    clients[1].hear("started")
    clients[1].chunk()
    for client in clients:
        client.say("pause")
        while client.hear("status")["state"] != "paused":
            pass
    made = [[m for m in client.said if m["type"] == "chunk"] for client in clients]
    held = holdings()
    assert sum(chunks[-1]["memory_bytes"] for chunks in made) == held["stated_bytes"]
    assert held["stated_bytes"] == held["arena_bytes"] == storage(new(LayerBank))
    assert held["worlds"] == len(new(World)) == 2

    for client in clients:
        client.say("bye")
        client.hear("bye")
    assert server.settles(lambda: holdings()["worlds"] == 0)
    assert holdings()["arena_bytes"] == 0
    assert server.settles(lambda: not new(LayerBank, World))
