"""Whether a way survives a shape: it is tried on a short history, in a process of its own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import decmem
from decmem.bench.operator_shapes import SHAPES, OperatorShape
from decmem.bench.operators import PASSES, OperatorBench

SILENT = "hung, or ended its process, when tried on a short history"


def refusals(
    ways: Sequence[str],
    shapes: Sequence[OperatorShape],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
) -> dict[tuple[str, str, str], str]:
    """Why ways shall not run in this process, by (way, shape, pass); those that may are not there.

    All are tried at the same time, each way and shape alone.
    """
    started = time.monotonic()
    own = str(Path(decmem.__file__).parent.parent)
    places = [own, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    trials = {}
    for way in ways:
        for shape in shapes:
            type_name = str(dtype).removeprefix("torch.")
            asked = f"{way!r}, {shape.name!r}, {type_name!r}, {device.type!r}"
            code = f"from decmem.bench.operator_trial import attempt; attempt({asked})"
            trials[way, shape.name] = subprocess.Popen(
                [sys.executable, "-c", code],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
            )  # fmt: skip
    refused = {}
    for (way, shape_name), process in trials.items():
        try:
            said, _ = process.communicate(timeout=max(1.0, started + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        found = {row["pass"]: row["failure"] for row in map(json.loads, said.splitlines())}
        for which in PASSES:
            failure = found.get(which, SILENT)
            if failure is not None:
                refused[way, shape_name, which] = failure
    return refused


def attempt(way: str, shape: str, dtype: str, device: str) -> None:
    """Run every pass of one way once and print a line of JSON about each."""
    chosen = SHAPES[shape]
    history = -(-chosen.listed // chosen.blocks) + 1
    bench = OperatorBench(
        [chosen], [history], [way], torch.device(device), getattr(torch, dtype), repeats=1
    )
    for row in bench.rows():
        print(json.dumps({"pass": row["pass"], "failure": row["failure"]}), flush=True)
