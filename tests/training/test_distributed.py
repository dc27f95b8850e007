"""Two processes with half of the batch each take the steps that one takes with all of it."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

SCRIPT = Path(__file__).with_name("two_processes.py")


def started(out: Path, rank: int, port: int) -> subprocess.Popen[str]:
    env = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(out)],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=SCRIPT.parents[2],
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave, and what one leaves: this one."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [started(folder, rank, port) for rank in (0, 1)]
    try:
        runpy.run_path(str(SCRIPT))["main"](folder)
        for process in running:
            said, _ = process.communicate(timeout=240)
            assert process.returncode == 0, said[-2000:]
    finally:
        for process in running:
            process.kill()
    return folder


def held(out: Path, name: str) -> dict[str, Tensor]:
    return load_file(out / f"{name}.safetensors")


def test_two_processes_hold_the_same(out: Path) -> None:
    first, second = held(out, "2-0"), held(out, "2-1")
    assert first.keys() == second.keys()
    # The average is kept by all and stored by the first.
    for name in (name for name in first if not name.startswith("average/")):
        assert first[name].equal(second[name]), name


def test_two_halves_are_one_whole(out: Path) -> None:
    both, alone = held(out, "2-0"), held(out, "1-0")
    for name in both.keys() - {"agreed"}:
        # Means of halves round differently from a mean of all, a little more at every step.
        torch.testing.assert_close(both[name], alone[name], rtol=1e-4, atol=1e-5)


def test_the_first_process_speaks(out: Path) -> None:
    assert held(out, "2-1")["agreed"].item() == 10.0
    lines = (out / "run2" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]
    stored = sorted(path.name for path in (out / "run2").glob("step_*"))
    assert stored == ["step_00000006", "step_00000012"]
    weights = load_file(out / "run2" / stored[-1] / "model.safetensors")
    for name, x in weights.items():
        assert x.equal(held(out, "2-1")[name])
