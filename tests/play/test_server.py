"""The server against real connections: what a person does in the page, and what they may not."""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus

from decmem.data.video import write_video
from decmem.saved_world import load_world
from decmem.world.episode import render_episode
from decmem.world.track_file import save_track

SIZE = (64, 96)


def picture(suffix: str = "PNG") -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (50, 120, 3), np.uint8)
    Image.fromarray(noise).save(stream, suffix)
    return stream.getvalue()


def settled(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def test_a_walk_in_a_block_world(live: Callable) -> None:
    server = live()
    client, hello = server.visitor()
    assert (hello["version"], hello["preset"], hello["size"]) == (1, "tiny", list(SIZE))
    assert hello["settings"]["chunk"] == 1
    client.say("start", **{"from": "seed", "seed": 3})
    started = client.hear("started")
    assert (started["latents"], started["frames"], started["seed"]) == (2, 5, 3)
    assert len(started["trail"]) == 2
    assert {m["stage"] for m in client.said if m["type"] == "progress"} == {"render", "remember"}
    small = client.hear("thumbnails")
    assert [p["latent"] for p in small["parts"]] == [0, 1]
    assert Image.open(io.BytesIO(small["bodies"][0])).size == (96, 64)

    first = client.chunk()
    assert (first["chunk"], first["latents"], first["first_frame"]) == (1, 3, 6)
    assert [(p["kind"], p["frame"]) for p in first["parts"]] == [
        (kind, 6 + i) for kind in ("dream", "truth") for i in range(4)
    ]
    assert all(Image.open(io.BytesIO(b)).size == (96, 64) for b in first["bodies"])
    assert len(first["psnr"]) == len(first["poses"]) == len(first["actions"]) == 4
    assert set(first["times"]) == {"generate", "decode", "truth", "total"}
    assert first["lens"] is None
    assert first["memory_bytes"] > 0

    client.say("input", keys=["look_right"], look=[3, 0], sequence=9)
    turned = client.chunk()
    while turned["sequence"] != 9:
        turned = client.chunk()
    assert turned["actions"][0][2] > 5
    assert turned["action_to_frame"] > 0
    assert client.chunk()["actions"][0][2] == 5  # what was looked is used up, the key is held


def test_two_unseen_chunks_are_the_most(live: Callable) -> None:
    server = live()
    client, _ = server.visitor()
    client.say("start", **{"from": "seed", "seed": 3})
    client.hear("chunk")
    second = client.hear("chunk")
    assert "binary" not in client.quiet(1.0)[1:]
    client.say("seen", chunk=second["chunk"])
    assert client.hear("chunk")["chunk"] == 3
    client.say("pause")
    assert client.hear("status")["state"] == "paused"
    client.say("seen", chunk=3)
    assert "binary" not in client.quiet(0.6)[2:]
    client.say("resume")
    assert client.hear("chunk")["chunk"] >= 4


def test_settings_and_the_lens(live: Callable) -> None:
    server = live()
    client, _ = server.visitor()
    client.say("set", lens=True, layer=1, k=3, steps=2, chunk=2, guidance=1.5)
    told = client.hear("settings")
    assert {k: told[k] for k in ("k", "steps", "chunk", "guidance", "layer")} == {
        "k": 3, "steps": 2, "chunk": 2, "guidance": 1.5, "layer": 1
    }  # fmt: skip
    for name, value in {"k": 10_000, "steps": 51, "chunk": 3, "guidance": 99, "layer": 2}.items():
        client.say("set", **{name: value})
        assert client.hear("error")["argument"] == name
    client.say("start", **{"from": "seed", "seed": 3})
    made = client.chunk()
    assert made["frames"] == 8
    lens = made["lens"]
    assert lens["layer"] == 1
    assert all(0 <= b["latent"] < 2 and 0 <= b["block"] < 6 for b in lens["retrieved"])
    assert all(sum(b["asked"]) == b["count"] for b in lens["retrieved"])
    # Two heads and two latents read three blocks for each of six regions.
    assert sum(b["count"] for b in lens["retrieved"]) == 2 * 2 * 3 * 6
    assert np.shape(lens["strength"]) == (2, 6)
    client.say("set", global_memory=False, lens=True)
    client.hear("settings")
    while (made := client.chunk())["lens"]["retrieved"]:
        pass
    assert made["lens"]["strength"] == []


def test_rewind_fork_and_branches(live: Callable) -> None:
    server = live()
    client, _ = server.visitor()
    client.say("rewind", latent=1)
    assert "no world yet" in client.hear("error")["problem"]
    client.say("start", **{"from": "seed", "seed": 3})
    frames = {}
    for _ in range(3):
        made = client.chunk()
        frames[made["first_frame"]] = made["bodies"][:4]
    client.say("pause")
    client.say("rewind", latent=3)
    assert client.hear("rewound")["latents"] == 3
    client.say("fork")
    forked = client.hear("branches")
    while forked["current"] == 0:
        forked = client.hear("branches")
    assert [b["latents"] for b in forked["branches"]] == [3, 3]
    client.say("resume")
    made = client.chunk()
    while made["first_frame"] != 10:  # what was under way before the pause comes first
        made = client.chunk()
    assert made["bodies"][:4] == frames[10]
    client.say("branch", id=0)
    back = client.hear("branches")
    assert back["current"] == 0
    assert back["branches"][0]["latents"] == 3
    client.say("branch", id=7)
    assert client.hear("error")["argument"] == "id"
    client.say("rewind", latent=999)
    assert client.hear("error")["argument"] == "latents"


def test_a_saved_world_comes_back(live: Callable, tmp_path: Path) -> None:
    server = live()
    client, hello = server.visitor()
    client.say("start", **{"from": "seed", "seed": 3})
    client.chunk()
    client.say("pause")
    client.say("save", what="world")
    file = client.hear("file")
    status, body = server.fetch(file["url"])
    assert (status, len(body)) == (200, file["bytes"])
    assert file["name"].startswith("seed-3-")
    (tmp_path / "a.world").write_bytes(body)
    saved = load_world(tmp_path / "a.world")
    assert saved.provenance["seed"] == 3

    key = server.upload("world", body, hello["session"])["id"]
    client.say("start", **{"from": "upload", "upload": key})
    started = client.hear("started")
    assert (started["latents"], started["seed"]) == (saved.length, 3)
    # The truth walks on where it stood.
    assert "truth" in {p["kind"] for p in client.chunk()["parts"]}
    client.say("save", what="video")
    film = client.hear("file")
    assert film["name"].endswith(".mp4")
    assert server.fetch(film["url"])[1][4:8] == b"ftyp"


def test_uploads_of_pictures_and_videos(live: Callable, tmp_path: Path) -> None:
    server = live(video_read=11, unpacked_bytes=100_000)
    client, hello = server.visitor()
    token = hello["session"]
    key = server.upload("picture", picture(), token)["id"]
    client.say("start", **{"from": "upload", "upload": key})
    started = client.hear("started")
    assert (started["latents"], started["seed"]) == (1, None)
    assert {p["kind"] for p in client.chunk()["parts"]} == {"dream"}
    client.say("pause")

    episode = render_episode(5, "free", 11, size=SIZE, supersample=1)
    write_video(tmp_path / "a.mp4", episode.frames, episode.fps)
    save_track(tmp_path / "a.npz", episode)
    video = server.upload("video", (tmp_path / "a.mp4").read_bytes(), token)["id"]
    client.say("start", **{"from": "upload", "upload": video})
    assert client.hear("error")["argument"] == "track"
    track = server.upload("track", (tmp_path / "a.npz").read_bytes(), token)["id"]
    client.say("start", **{"from": "upload", "upload": track})
    assert client.hear("error")["argument"] == "upload"
    client.say("start", **{"from": "upload", "upload": video})
    assert client.hear("started")["latents"] == 3
    assert client.chunk()["latents"] == 4
    client.say("pause")

    # What would take much more memory than it looks is not unpacked.
    stream = io.BytesIO()
    np.savez_compressed(stream, zeros=np.zeros(10**6))
    server.upload("track", stream.getvalue(), token)
    client.say("start", **{"from": "upload", "upload": video})
    assert "unpacks to" in client.hear("error")["problem"]
    longer = render_episode(5, "free", 12, size=SIZE, supersample=1)
    write_video(tmp_path / "a.mp4", longer.frames, longer.fps)
    save_track(tmp_path / "a.npz", longer)
    server.upload("track", (tmp_path / "a.npz").read_bytes(), token)
    video = server.upload("video", (tmp_path / "a.mp4").read_bytes(), token)["id"]
    client.say("start", **{"from": "upload", "upload": video})
    assert "more than 11 frames" in client.hear("error")["problem"]


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


def test_wrong_uploads_are_refused_and_change_nothing(live: Callable) -> None:
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
    assert refused("picture", b"x", "nobody") == "session"
    assert not list(server.lobby.parcels.folder.iterdir())
    status, _ = server.fetch(f"/upload?kind=picture&session={token}", picture("BMP"))
    assert status == 413
    for kind, body in (("picture", b"\x89PNG, not really"), ("world", b"\0" * 8 + b"{}")):
        key = server.upload(kind, body, token)["id"]
        client.say("start", **{"from": "upload", "upload": key})
        assert client.hear("error")["argument"] == kind
    # Another's upload is nobody's business.
    other, _ = server.visitor()
    other.say("start", **{"from": "upload", "upload": key})
    assert other.hear("error")["argument"] == "upload"


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


def test_a_lost_connection_loses_no_world(live: Callable) -> None:
    server = live()
    client, hello = server.visitor()
    client.say("start", **{"from": "seed", "seed": 3})
    last = client.chunk()
    client.socket.socket.close()  # vanishes without a word
    again = server.client(hello["session"])
    assert again.hear("hello")["session"] == hello["session"]
    assert again.hear("started")["latents"] >= last["latents"]
    assert again.chunk()["chunk"] > last["chunk"]
    # A second window takes the world over; the first is closed.
    third = server.client(hello["session"])
    third.hear("started")
    with pytest.raises(ConnectionClosed):
        again.hear("never")
    assert third.chunk()
    third.say("bye")
    assert third.hear("bye")["reason"]
    assert server.client(hello["session"]).hear("hello")["session"] != hello["session"]


def test_worlds_nobody_comes_back_to_are_let_go(live: Callable) -> None:
    server = live(keep_seconds=0.5)
    client, hello = server.visitor()
    client.say("start", **{"from": "upload", "upload": "x"})
    client.hear("error")
    server.upload("picture", picture(), hello["session"])
    client.close()
    assert settled(lambda: not server.lobby.guests)
    assert not list(server.lobby.parcels.folder.iterdir())


def test_the_queue(live: Callable) -> None:
    server = live(sessions=1)
    first, _ = server.visitor()
    second = server.client()
    told = second.hear("queue")
    assert (told["position"], told["limit"]) == (1, 1)
    assert "Your turn" in told["message"]
    third = server.client()
    assert third.hear("queue")["position"] == 2
    second.say("pause")
    assert "wait" in second.hear("error")["problem"]
    second.close()
    assert third.hear("queue")["position"] == 1
    first.say("bye")
    assert third.hear("hello")["version"] == 1
    third.say("start", **{"from": "seed", "seed": 3})
    assert third.chunk()["chunk"] == 1


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


def test_other_versions_are_told(live: Callable) -> None:
    server = live()
    newer = server.client(version=2)
    assert "this server speaks 1" in newer.hear("error")["problem"]
    with pytest.raises(ConnectionClosed):
        newer.hear("never")
    client, _ = server.visitor()
    client.say("hello", version=1)
    assert "already" in client.hear("error")["problem"]


def test_other_origins_are_refused(live: Callable) -> None:
    server = live(allowed=("https://friend.example",))
    with pytest.raises(InvalidStatus):
        server.client(origin="https://evil.example")
    # A page that points its own name here would pass for the same origin.
    status, _ = server.fetch("/", Host="evil.example", Origin="http://evil.example")
    assert status == 403
    assert server.client(origin="https://friend.example").hear("hello")
    assert server.client(origin=f"http://127.0.0.1:{server.port}").hear("hello")
    status, body = server.fetch("/upload?kind=world", b"x", Origin="https://evil.example")
    assert status == 403
    assert json.loads(body)["error"]["argument"] == "origin"


def test_silence_stops_the_world(live: Callable) -> None:
    server = live(idle_seconds=0.5, unseen=1000)
    client, _ = server.visitor()
    client.say("start", **{"from": "seed", "seed": 3})
    client.hear("chunk")
    status = client.hear("status")
    while status["state"] == "running":
        status = client.hear("status")
    assert (status["state"], "steered" in status["reason"]) == ("paused", True)
    client.say("input", keys=["forward"], look=[0, 0], sequence=1)
    assert client.hear("status")["state"] == "running"


def test_a_full_memory_stops_the_world(live: Callable) -> None:
    server = live(latents=4)
    client, _ = server.visitor()
    client.say("start", **{"from": "seed", "seed": 3})
    assert client.chunk()["latents"] == 3
    assert client.chunk()["latents"] == 4
    status = client.hear("status")
    assert (status["state"], "full" in status["reason"]) == ("stopped", True)
    client.say("rewind", latent=2)
    client.hear("rewound")
    assert client.chunk()["latents"] == 3


def test_the_command_may_choose_the_world(live: Callable) -> None:
    server = live()
    server.lobby.studio.opening = {"from": "seed", "seed": 3}
    client, _ = server.visitor()
    assert client.hear("started")["seed"] == 3
    assert client.chunk()["chunk"] == 1
