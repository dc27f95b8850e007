"""Messages: what is sound comes through, everything else is told by name."""

import json

import numpy as np
import pytest

from decmem.errors import UserError
from decmem.play.protocol import KEYS, check_version, packed, read_message
from decmem.play.steering import Steering

LIMIT = 64 * 1024
SOUND = [
    {"type": "hello", "version": 1, "session": None},
    {"type": "hello", "version": 1, "session": "abc"},
    {"type": "start", "from": "seed", "seed": 2**63 - 1},
    {"type": "start", "from": "upload", "upload": "abc"},
    {"type": "input", "keys": list(KEYS), "look": [1.5, -2], "sequence": 4},
    {"type": "set", "guidance": None, "k": 3, "layer": 0, "lens": True},
    {"type": "rewind", "latent": 1},
    {"type": "save", "what": "world"},
    {"type": "bye"},
]
BROKEN = [
    ("", "message"),
    ("{", "message"),
    ("[" * 50_000, "message"),
    ("[]", "message"),
    ("{}", "message"),
    ('{"type": 3}', "message"),
    ('{"type": "launch"}', "type"),
    ('{"type": "bye", "now": true}', "now"),
    ('{"type": "rewind"}', "latent"),
    ('{"type": "rewind", "latent": 0}', "latent"),
    ('{"type": "rewind", "latent": true}', "latent"),
    ('{"type": "rewind", "latent": 1.0}', "latent"),
    ('{"type": "start", "from": "seed"}', "seed"),
    ('{"type": "start", "from": "upload", "seed": 3}', "upload"),
    ('{"type": "start", "from": "seed", "seed": 9223372036854775808}', "seed"),
    ('{"type": "input", "keys": ["fly"], "look": [0, 0], "sequence": 1}', "keys"),
    ('{"type": "input", "keys": [], "look": [NaN, 0], "sequence": 1}', "look"),
    ('{"type": "input", "keys": [], "look": [1e999, 0], "sequence": 1}', "look"),
    ('{"type": "input", "keys": [], "look": [0], "sequence": 1}', "look"),
    ('{"type": "set", "guidance": "strong"}', "guidance"),
    ('{"type": "set", "lens": 1}', "lens"),
    ('{"type": "save", "what": "../../etc"}', "what"),
    (b"\x00\x01", "message"),
    (json.dumps({"type": "hello", "version": 1, "session": "x" * 70_000}), "message"),
]  # fmt: skip


@pytest.mark.parametrize("message", SOUND, ids=lambda m: m["type"])
def test_sound_messages_come_through(message: dict) -> None:
    assert read_message(json.dumps(message), LIMIT) == message


@pytest.mark.parametrize(("text", "argument"), BROKEN, ids=range(len(BROKEN)))
def test_broken_messages_name_what_is_wrong(text: str | bytes, argument: str) -> None:
    with pytest.raises(UserError) as refused:
        read_message(text, LIMIT)
    assert refused.value.argument == argument
    assert len(str(refused.value)) < 1000


def test_other_versions_are_refused() -> None:
    check_version(1)
    with pytest.raises(UserError, match="version: 2, this server speaks 1"):
        check_version(2)


def test_binary_messages_can_be_taken_apart() -> None:
    body = packed({"type": "chunk"}, [({"kind": "dream"}, b"abc"), ({"kind": "truth"}, b"de")])
    length = int.from_bytes(body[:4], "little")
    assert json.loads(body[4 : 4 + length]) == {
        "type": "chunk",
        "parts": [{"kind": "dream", "bytes": 3}, {"kind": "truth", "bytes": 2}],
    }
    assert body[4 + length :] == b"abcde"


def test_keys_are_held_and_looks_are_used_up() -> None:
    steering = Steering()
    assert not steering.active
    steering.hear(["forward", "left", "sprint", "look_up"], [6.0, 0.0], 1)
    steering.hear(["forward", "left", "sprint", "look_up"], [4.0, -1.0], 2)
    actions = steering.actions(4)
    assert actions[:, [0, 1, 4, 5]].tolist() == [[1, -1, 0, 1]] * 4
    assert actions[:, 2].sum() == 10
    assert np.ptp(actions[:, 2]) <= 1 / 8
    assert actions[:, 3].sum() == pytest.approx(4 * 5.0 - 1)
    again = steering.actions(4)
    assert not again[:, 2].any()
    assert again[:, 0].all()
    assert steering.sequence == 2


def test_a_flick_is_spread_over_chunks_within_the_limits() -> None:
    steering = Steering()
    steering.hear(["look_right"], [100.0, 0.0], 1)
    turned = [steering.actions(4)[:, 2] for _ in range(3)]
    assert max(part.max() for part in turned) == 15
    steering.hear([], [0.0, 0.0], 2)
    assert steering.actions(4)[:, 2].sum() == 0
    steering.hear([], [1e6, 0.0], 3)
    assert sum(steering.actions(4)[:, 2].sum() for _ in range(10)) == 180
