"""``decmem play`` from the command line: what cannot work is told before anything is served."""

import socket
from pathlib import Path

import pytest

from decmem.cli import main
from decmem.experiment import to_plain
from decmem.play import server
from decmem.presets import TINY
from decmem.shards import save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags that name the weights."""
    folder = tmp_path_factory.mktemp("weights")
    codec, model = folder / "codec.safetensors", folder / "model.safetensors"
    save_weights(codec, TINY.build_codec().state_dict(), {"codec": to_plain(TINY.codec)})
    save_weights(model, TINY.build_model().state_dict(), {"model": to_plain(TINY.model)})
    named = ["--weights", str(model), "--codec-weights", str(codec)]
    return ["play", "--preset", "tiny", "--device", "cpu", "--no-browser", *named]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-sessions", "0"], "--max-sessions: 0"),
        (["--port", "70000"], "--port: 70000"),
        (["--world", "-1"], "--world: -1"),
        (["--memory", "absent.world"], "--memory: no file absent.world"),
        (["--steps", "0"], "--steps: 0"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_what_cannot_work_is_told(
    flags: list[str], said: str, weights: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*weights, *flags]) == 2
    assert f"error: {said}" in capsys.readouterr().err


def test_a_taken_port_is_told(
    weights: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.Studio, "warm_up", lambda self: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main([*weights, "--port", str(port)]) == 2
    assert f"error: --port: 127.0.0.1:{port} cannot be used" in capsys.readouterr().err


def test_every_visitor_gets_the_world_of_the_command(
    weights: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served = []
    monkeypatch.setattr(server, "serve", lambda studio, *rest: served.append((studio, rest)))
    memory = tmp_path / "a.png"
    memory.touch()
    assert main([*weights, "--world", "7", "--steps", "3"]) == 0
    assert main([*weights, "--memory", str(memory), "--allow-origin", "https://a.example"]) == 0
    (first, _), (second, rest) = served
    assert first.opening == {"from": "seed", "seed": 7}
    assert first.session.steps == 3
    assert second.opening == {"from": "file", "path": memory}
    assert rest == ("127.0.0.1", 8377, ("https://a.example",), False)
    for studio, _ in served:
        studio.close()
