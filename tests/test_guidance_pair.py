"""Two processes with a branch of guidance each dream what one process dreams with both."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from decmem.cli import main
from decmem.distributed import Place
from decmem.errors import UserError
from decmem.guidance_pair import GuidancePair
from decmem.sampler import Running

from .dreams import CONFIGS, T, awake, sampler_of
from .two_branches import BENCH, NAMES, dreams

CPU = torch.device("cpu")
PAIR = GuidancePair(Place(0, 2, CPU))
CASES = [f"{name}/{graphs}" for name in NAMES for graphs in ("off", "eager")]


@contextmanager
def two_processes(out: Path, device: str) -> Iterator[None]:
    """Run while the block runs; they have to end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ExitStack() as ended:
        running = []
        for rank in range(2):
            process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.two_branches", str(out), device],
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=ended.enter_context((out / f"said{rank}").open("w")),
                stderr=subprocess.STDOUT,
                cwd=Path(__file__).parents[1],
            )
            ended.callback(process.wait)
            ended.callback(process.kill)
            running.append(process)
        yield
        for rank, process in enumerate(running):
            assert process.wait(timeout=240) == 0, (out / f"said{rank}").read_text()[-2000:]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def held(out: Path) -> list[dict[str, Tensor]]:
    """What the two processes dreamt, and then one with both branches: this one."""
    with two_processes(out, "cpu"):
        alone = dict(dreams(None, "cpu", "off"))
    return [*(load_file(out / f"{rank}.safetensors") for rank in (0, 1)), alone]


def whole(held: dict[str, Tensor]) -> list[str]:
    """Names of what is not a list of blocks."""
    return [name for name in held if "/lists/" not in name]


def named_alone(name: str) -> str:
    """What one process calls the same; here it knows no engine, which changes nothing."""
    return name.replace("/eager/", "/off/")


def test_two_processes_dream_what_one_dreams(held: list[dict[str, Tensor]]) -> None:
    first, _, alone = held
    assert len(whole(first)) == 2 * len(whole(alone)) == 2 * 4 * len(NAMES)
    for name in whole(first):
        expected = alone[named_alone(name)]
        assert expected.std() > 0.1
        torch.testing.assert_close(first[name], expected, atol=1e-5, rtol=1e-5)


def test_both_hold_the_same_to_the_last_bit(held: list[dict[str, Tensor]]) -> None:
    first, second, _ = held
    assert first.keys() == second.keys()
    for name in whole(first):
        assert first[name].equal(second[name]), name


@pytest.mark.parametrize("case", CASES)
def test_each_retrieves_for_its_branch(case: str, held: list[dict[str, Tensor]]) -> None:
    first, second, alone = held
    names = [name for name in first if name.startswith(f"{case}/lists/")]
    both = {name: alone[named_alone(name)] for name in names}
    denoises = [name for name in names if both[name].shape != first[name].shape]
    layers = CONFIGS["pocket"].layers
    assert len(denoises) == 3 * 3 * layers  # chunks, steps; the others are write passes
    for name in names:
        queries = first[name].shape[2]
        assert first[name].equal(both[name][:, :, :queries])
        # Where own blocks compete, those of the second copy have other numbers in one pass.
        if case.startswith("pocket"):
            assert second[name].equal(both[name][:, :, -queries:])
    assert any(not first[name].equal(second[name]) for name in denoises)


def test_the_first_process_writes_the_benchmark(held: list[dict[str, Tensor]], out: Path) -> None:
    assert len(held) == 3
    (row,) = json.loads((out / "bench0" / "rollout_cpu.json").read_text())["rows"]
    assert (row["parallel"], row["gpu_count"], row["guidance"]) == ("guidance", 0, 2)
    assert not (out / "bench1").exists()
    assert "| decoupled | 9 |" in (out / "said0").read_text()
    assert "| decoupled" not in (out / "said1").read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_branch_with_actions_is_that_of_the_first(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, steered, free = (
        GuidancePair(Place(rank, 2, CPU)),
        torch.rand(1, 2, 3),
        torch.rand(1, 2, 3),
    )
    own = (steered, free)[rank]

    def gather(places: list[Tensor], given: Tensor) -> None:
        assert given.equal(own)
        for place, branch in zip(places, (steered, free), strict=True):
            place.copy_(branch)

    monkeypatch.setattr(dist, "all_gather", gather)
    assert pair.steered == (rank == 0)
    guided = pair.guided(lambda z, t: z, 3.0)(own, 1.0)
    torch.testing.assert_close(guided, free + 3 * (steered - free))


def test_a_bank_has_no_room_for_a_second_copy_of_the_chunk() -> None:
    model = awake(CONFIGS["paper"])
    rooms = [
        sampler_of(model, pair=pair, room=20).new_bank(torch.zeros(1, 3)).layers[0].room
        for pair in (None, PAIR)
    ]
    assert rooms[0] - rooms[1] == model.config.chunk >= T


def test_only_two_branches_are_shared_out() -> None:
    for world in (1, 3):
        with pytest.raises(UserError, match="processes"):
            GuidancePair(Place(0, world, CPU))
    with pytest.raises(UserError, match="share_lists"):
        Running(share_lists=True, pair=PAIR)
    with pytest.raises(UserError, match="guidance"):
        sampler_of(awake(CONFIGS["paper"]), guidance=None, pair=PAIR)


@pytest.mark.parametrize(
    ("processes", "options", "told"),
    [
        (2, [], "--guidance"),
        (2, ["--guidance", "2", "--share-lists"], "--share-lists"),
        (3, ["--guidance", "2"], "nproc-per-node"),
    ],
)
def test_the_benchmark_says_what_two_processes_cannot_do(
    processes: int,
    options: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("decmem.distributed.join", lambda device: Place(0, processes, device))
    at = BENCH.index("--guidance")
    plain = BENCH[:at] + BENCH[at + 2 :]
    place = ["--device", "cpu", "--out", str(tmp_path / "out")]
    assert main([*plain, *options, *place]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_replay_graphs_and_agree(tmp_path: Path) -> None:
    with two_processes(tmp_path, "cuda"):
        pass
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    alone = {name: x.cpu() for name, x in dreams(None, "cuda", "eager", "auto")}
    for name in (name for name in alone if name.endswith(("latents", "owed", "together"))):
        assert first[name].equal(second[name]), name
        # In 16 bits a rounding may choose another block.
        assert (first[name] - alone[name]).abs().mean() < 0.2 * alone[name].std(), name
    for name in NAMES:
        assert first[f"{name}/auto/latents"].equal(first[f"{name}/eager/latents"])
    (row,) = json.loads((tmp_path / "bench0" / "rollout_cuda.json").read_text())["rows"]
    assert (row["parallel"], row["gpu_count"]) == ("guidance", 2)
