"""A tiny world for the tests of the live page: untrained weights, real everything else."""

import contextlib
import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from websockets.sync.client import connect

from decmem.codec import Autoencoder
from decmem.model import WorldModel
from decmem.play.defaults import PACES, Bounds
from decmem.play.lobby import Lobby
from decmem.play.server import Server, build_app
from decmem.play.studio import Studio
from decmem.presets import TINY
from decmem.rollout import Session
from decmem.sampler import Running


@pytest.fixture(scope="session")
def parts() -> tuple[Autoencoder, WorldModel]:
    torch.manual_seed(0)
    codec, model = TINY.build_codec(), TINY.build_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Fresh branches are silent; shaken ones depend on everything they should.
        for part in (codec, model):
            for parameter in part.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return codec.eval().requires_grad_(False), model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def session(parts: tuple[Autoencoder, WorldModel]) -> Callable[..., Session]:
    """An empty session of one denoising step and one-latent chunks."""

    def made(**settings) -> Session:
        return Session(*parts, **{"steps": 1, "chunk": 1} | settings)

    return made


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """A picture file of noise, 18 kB."""

    def made(suffix: str = "PNG") -> bytes:
        stream = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (50, 120, 3), np.uint8)
        Image.fromarray(noise).save(stream, suffix)
        return stream.getvalue()

    return made


class Client:
    """A browser's side of docs/play.md."""

    def __init__(self, url: str, token: str | None, version: int, **options) -> None:
        self._open = contextlib.ExitStack()
        self.socket = self._open.enter_context(connect(url, max_size=None, **options))
        self.said: list[dict] = []
        self.say("hello", version=version, session=token)

    def say(self, kind: str, **fields) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def hear(self, *kinds: str, timeout: float = 60.0) -> dict:
        """The next message of one of these kinds; a binary one has its pictures in `bodies`."""
        while True:
            raw = self.socket.recv(timeout)
            if isinstance(raw, bytes):
                length = int.from_bytes(raw[:4], "little")
                message, at = json.loads(raw[4 : 4 + length]), 4 + length
                message["bodies"] = []
                for part in message["parts"]:
                    message["bodies"].append(raw[at : at + part["bytes"]])
                    at += part["bytes"]
                assert at == len(raw)
            else:
                message = json.loads(raw)
            self.said.append(message)
            if message["type"] in kinds:
                return message
            assert message["type"] != "error", message

    def chunk(self) -> dict:
        """The next chunk, painted."""
        made = self.hear("chunk")
        self.say("seen", chunk=made["chunk"])
        return made

    def quiet(self, seconds: float) -> list[str]:
        """What kinds of messages come within this time."""
        kinds = []
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            try:
                raw = self.socket.recv(left)
            except TimeoutError:
                break
            kinds.append("binary" if isinstance(raw, bytes) else json.loads(raw)["type"])
        return kinds

    def close(self) -> None:
        self._open.close()


class Live:
    """A server on a port of its own."""

    def __init__(self, studio: Studio, allowed: tuple[str, ...] = ()) -> None:
        self.app = build_app(studio, allowed=allowed)
        self.server = Server(self.app, "127.0.0.1", 0, lambda port: None)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.clients: list[Client] = []

    @property
    def lobby(self) -> Lobby:
        return self.app.state.lobby

    def client(self, token: str | None = None, version: int = 1, **options) -> Client:
        client = Client(f"ws://127.0.0.1:{self.port}/ws", token, version, **options)
        self.clients.append(client)
        return client

    def visitor(self) -> tuple[Client, dict]:
        """A client that was let in, and its hello."""
        client = self.client()
        return client, client.hear("hello")

    def fetch(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """Status and body of a plain request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        told = answer.status, answer.read()
        connection.close()
        return told

    def upload(self, kind: str, body: bytes, token: str) -> dict:
        return json.loads(self.fetch(f"/upload?kind={kind}&session={token}", body)[1])

    def settles(self, condition: Callable[[], object], seconds: float = 20.0) -> bool:
        """Whether something comes true in time."""
        until = time.monotonic() + seconds
        while not condition() and time.monotonic() < until:
            time.sleep(0.02)
        return bool(condition())

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture
def live(session: Callable[..., Session]) -> Iterator[Callable[..., Live]]:
    """Starts servers whose worlds remember five frames; settings are those of `Bounds`."""
    running: list[Live] = []

    def made(allowed: tuple[str, ...] = (), together: bool | None = None, **bounds) -> Live:
        limits = Bounds(**{"memory_frames": 5} | bounds)
        walker = session(running=Running(graphs="eager" if together else "auto"))
        studio = Studio(walker, "tiny", limits, PACES["cpu"], together=together)
        running.append(Live(studio, allowed))
        return running[-1]

    yield made
    for one in running:
        one.stop()
