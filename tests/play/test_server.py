"""The server against real connections: what a person does in the page."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed

from decmem.data.video import write_video
from decmem.saved_world import load_world
from decmem.world.episode import render_episode
from decmem.world.track_file import save_track

SIZE = (64, 96)


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


def test_how_a_world_stands_is_told_of_each(live: Callable) -> None:
    server = live()
    client, _ = server.visitor()
    for seed in (3, 4):
        client.say("start", **{"from": "seed", "seed": seed})
        assert client.hear("started")["seed"] == seed
        assert client.hear("status", "chunk")["type"] == "status"
        assert client.said[-1]["state"] == "running"


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


def test_uploads_of_pictures_and_videos(live: Callable, picture: Callable, tmp_path: Path) -> None:
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


def test_worlds_nobody_comes_back_to_are_let_go(live: Callable, picture: Callable) -> None:
    server = live(keep_seconds=0.5)
    client, hello = server.visitor()
    client.say("start", **{"from": "upload", "upload": "x"})
    client.hear("error")
    server.upload("picture", picture(), hello["session"])
    client.close()
    assert server.settles(lambda: not server.lobby.guests)
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
