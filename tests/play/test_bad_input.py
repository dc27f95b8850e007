"""What visitors may not do, and what happens to those who do it: nobody else notices."""

import io
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from decmem.play.journey import Journey


def test_without_pyav_only_video_is_missing(
    live: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)  # its import fails
    for name in ("decmem.data.video", "decmem.data.clip"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    server = live(unseen=1000)
    client, hello = server.visitor()
    client.say("start", **{"from": "seed", "seed": 3})
    client.chunk()
    client.say("save", what="video")
    told = client.hear("error")
    assert (told["argument"], told["cure"]) == ("video", "pip install av")
    assert client.chunk()["chunk"] > 1
    track = io.BytesIO()
    np.savez(track, zeros=np.zeros(1))
    server.upload("track", track.getvalue(), hello["session"])
    video = server.upload("video", b"\0" * 4 + b"ftypisom" + b"\0" * 20, hello["session"])["id"]
    client.say("start", **{"from": "upload", "upload": video})
    assert client.hear("error")["cure"] == "pip install av"
    assert client.chunk()["chunk"] > 2


def test_nothing_of_the_server_needs_pyav() -> None:
    code = """
import sys
sys.modules["av"] = None
import decmem.cli, decmem.play.opening, decmem.play.server, decmem.play.studio
import decmem.play.environment, decmem.play.takeaway
try:
    import decmem.data.video
except decmem.cli.UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "PyAV" in done.stdout


def test_wrong_uploads_are_refused_and_change_nothing(live: Callable, picture: Callable) -> None:
    server = live(picture_bytes=5_000)
    client, hello = server.visitor()
    token = hello["session"]

    def refused(kind: str, body: bytes, session: str = token) -> str:
        return server.upload(kind, body, session)["error"]["argument"]

    assert refused("picture", b"#EXTM3U\nfile:///etc/passwd") == "picture"
    assert refused("video", b"ffconcat version 1.0\nfile '/etc/passwd'") == "video"
    assert refused("track", picture()) == "track"
    assert refused("world", b"") == "world"
    assert refused("picture", picture("BMP")) == "picture"  # 18 kB
    assert refused("program", b"x") == "kind"
    assert refused("../../tmp/x", b"x") == "kind"
    assert refused("picture", b"x", "nobody") == "session"
    assert not list(server.lobby.parcels.folder.iterdir())
    status, _ = server.fetch(f"/upload?kind=picture&session={token}", picture("BMP"))
    assert status == 413
    for kind, body in (("picture", b"\x89PNG, not really"), ("world", b"\0" * 8 + b"{}")):
        key = server.upload(kind, body, token)["id"]
        client.say("start", **{"from": "upload", "upload": key})
        assert client.hear("error")["argument"] == kind
    # A name leads to an upload or to nothing.
    client.say("start", **{"from": "upload", "upload": "../../../../etc/passwd"})
    assert client.hear("error")["argument"] == "upload"
    # Another's upload is nobody's business.
    other, _ = server.visitor()
    other.say("start", **{"from": "upload", "upload": key})
    assert other.hear("error")["argument"] == "upload"


def sent(server, kind: str, token: str, body: bytes, *headers: str) -> socket.socket:
    """An upload that is written to the wire by hand."""
    line = socket.create_connection(("127.0.0.1", server.port), 30)
    head = (f"POST /upload?kind={kind}&session={token} HTTP/1.1", "Host: localhost", *headers)
    line.sendall("\r\n".join((*head, "", "")).encode() + body)
    return line


def test_uploads_that_hide_their_length_are_cut_off(live: Callable) -> None:
    server = live(picture_bytes=5_000)
    _, hello = server.visitor()
    piece = b"\x89PNG" + b"x" * 1000
    chunk = b"%x\r\n%s\r\n" % (len(piece), piece)
    with sent(server, "picture", hello["session"], 6 * chunk, "Transfer-Encoding: chunked") as line:
        assert b" 413 " in line.recv(1000)
    assert not list(server.lobby.parcels.folder.iterdir())


def test_uploads_that_break_off_leave_nothing(live: Callable) -> None:
    server = live()
    _, hello = server.visitor()
    folder = server.lobby.parcels.folder
    begun = b"\x89PNG" + b"x" * 1000
    with sent(server, "picture", hello["session"], begun, "Content-Length: 9000"):
        assert server.settles(lambda: list(folder.iterdir()))
    assert server.settles(lambda: not list(folder.iterdir()))


def test_paths_lead_nowhere(live: Callable) -> None:
    server = live()
    status, body = server.fetch("/")
    assert status == 200
    assert b"<canvas" in body
    for path in (
        "/static/../server.py", "/static/%2e%2e/server.py", "/static/..%2fserver.py",
        "/file/../../etc/passwd", "/file/%2e%2e%2fetc%2fpasswd", "/file/x", "/etc/passwd",
    ):  # fmt: skip
        status, body = server.fetch(path)
        assert status == 404, path
        assert b"root:" not in body


def talk_on(client) -> None:
    for _ in range(2000):
        client.say("input", keys=[], look=[0, 0], sequence=1)
        time.sleep(0.002)


def test_bad_messages_hurt_nobody_else(live: Callable, caplog: pytest.LogCaptureFixture) -> None:
    server = live(strikes=8, messages_per_second=20)
    good, _ = server.visitor()
    good.say("start", **{"from": "seed", "seed": 3})
    bad, _ = server.visitor()
    for text in ("{", json.dumps({"type": "nonsense"}), "x" * 70_000, b"\x00"):
        bad.socket.send(text)
        assert bad.hear("error")["problem"]
    assert bad.quiet(0.1) in ([], ["status"])
    with pytest.raises(ConnectionClosed):
        talk_on(bad)
    assert good.chunk()["chunk"]
    assert good.chunk()["chunk"]
    # Each kind of fault is in the log once.
    refusals = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert len(refusals) == len(set(refusals)) <= 4
    wrong = server.client()
    wrong.hear("hello")
    wrong.socket.send("y" * 2**19)
    with pytest.raises(ConnectionClosed):
        wrong.hear("never")
    assert good.chunk()["chunk"]


def test_what_lies_out_of_range_is_cut_or_refused(live: Callable) -> None:
    server = live()
    client, _ = server.visitor()
    client.say("start", **{"from": "seed", "seed": 3})
    client.chunk()
    client.say("input", keys=["forward", "forward"], look=[9e8, -9e8], sequence=1)
    while (made := client.chunk())["sequence"] != 1:
        pass
    actions = np.array(made["actions"])
    assert np.abs(actions[:, :2]).max() == 1
    assert np.abs(actions[:, 2:4]).max() == 15
    for look in ([2e9, 0], [0, float("nan")], ["1", 0], [0, 0, 0]):
        client.say("input", keys=[], look=look, sequence=2)
        assert client.hear("error")["argument"] == "look"
    client.say("input", keys=["forward"] * 11, look=[0, 0], sequence=2)
    assert client.hear("error")["argument"] == "keys"
    assert client.chunk()["sequence"] == 1


def test_a_client_that_takes_nothing_in_is_let_go(
    live: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = live(send_seconds=0.5, unseen=1000, keep_seconds=1.0)
    good, _ = server.visitor()
    good.say("start", **{"from": "seed", "seed": 3})
    good.chunk()
    slow = server.client(max_queue=1, close_timeout=0.5)
    hello = slow.hear("hello")
    guest = server.lobby.guests[hello["session"]]
    hand = guest.line.hand

    async def hand_much(header: dict, parts: list) -> None:
        # More than fits between the two: nothing waits there for a client that does not read.
        await hand(header, [*parts, ({"kind": "dream"}, bytes(2**24))])

    monkeypatch.setattr(guest.line, "hand", hand_much)
    slow.say("start", **{"from": "seed", "seed": 4})
    # The others walk on; the world waits as after any loss, then its place is free.
    walked = [good.chunk()["chunk"] for _ in range(3)]
    assert server.settles(lambda: guest.line is None)
    assert "took in nothing" in caplog.text
    assert server.settles(lambda: hello["session"] not in server.lobby.guests)
    assert good.chunk()["chunk"] > walked[-1]


def test_who_vanishes_at_the_start_takes_nobody_along(live: Callable) -> None:
    server = live(sessions=2, keep_seconds=0.3, memory_frames=61)
    good, _ = server.visitor()
    good.say("start", **{"from": "seed", "seed": 3})
    good.chunk()
    for _ in range(3):
        client = server.client()
        client.hear("hello")
        client.say("start", **{"from": "seed", "seed": 4})
        client.hear("progress")
        client.socket.socket.close()
        assert server.settles(lambda: len(server.lobby.guests) == 1)
    assert good.chunk()["chunk"]
    assert good.chunk()["chunk"]


def test_a_world_that_fails_stops_alone(
    live: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = live()
    good, _ = server.visitor()
    good.say("start", **{"from": "seed", "seed": 3})
    good.chunk()
    bad, hello = server.visitor()
    bad.say("start", **{"from": "seed", "seed": 4})
    bad.chunk()
    broken = server.lobby.guests[hello["session"]].journey
    walk = Journey.go

    def go(journey: Journey, *given):
        if journey is broken:
            raise RuntimeError("out of luck")
        return walk(journey, *given)

    monkeypatch.setattr(Journey, "go", go)
    told = bad.hear("error")
    assert (told["argument"], told["cure"]) == ("server", "Start it again")
    assert "out of luck" not in json.dumps(told)
    assert bad.hear("status")["state"] == "stopped"
    faults = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(faults) == 1
    assert good.chunk()["chunk"]
    bad.say("start", **{"from": "seed", "seed": 4})
    assert bad.chunk()["chunk"]


def test_other_versions_are_told(live: Callable) -> None:
    server = live()
    newer = server.client(version=2)
    assert "this server speaks 1" in newer.hear("error")["problem"]
    with pytest.raises(ConnectionClosed):
        newer.hear("never")
    client, _ = server.visitor()
    client.say("hello", version=1)
    assert "already" in client.hear("error")["problem"]


def test_other_origins_are_refused(live: Callable, caplog: pytest.LogCaptureFixture) -> None:
    server = live(allowed=("https://friend.example",))
    for _ in range(2):
        with pytest.raises(InvalidStatus):
            server.client(origin="https://evil.example")
    assert caplog.text.count("https://evil.example") == 1
    # A page that points its own name here would pass for the same origin.
    status, _ = server.fetch("/", Host="evil.example", Origin="http://evil.example")
    assert status == 403
    assert server.client(origin="https://friend.example").hear("hello")
    assert server.client(origin=f"http://127.0.0.1:{server.port}").hear("hello")
    status, body = server.fetch("/upload?kind=world", b"x", Origin="https://evil.example")
    assert status == 403
    assert json.loads(body)["error"]["argument"] == "origin"
