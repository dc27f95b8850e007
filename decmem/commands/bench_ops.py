"""``decmem bench ops``: attention over a long history, by way of computing it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from decmem.commands.stages import stage_bars
from decmem.errors import UserError


@dataclass(frozen=True)
class BenchOps:
    """Time block-sparse attention in several ways, against dense attention over the same history.

    Every way gets the same inputs, and is checked against the definition before it is timed: one
    that fails or is wrong is a row that says so. Rates count real tokens and listed blocks only.
    The clock covers the kernels alone, caches cold.

    Example: decmem bench ops --device cpu --out out/bench

    Writes ops_DEVICE_YEARMONTH.json, anew after each row, and prints the same as a table.
    """

    shapes: tuple[Literal["paper", "wide", "peer", "small"], ...] = ()
    """Shapes of blocks and heads; default all but small, on a CPU small alone."""

    history: tuple[int, ...] = ()
    """Latents in the history; default 206 56 500, on a CPU 8 32."""

    backends: tuple[str, ...] = ()
    """Ways to compare; default all that may run there."""

    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of the inputs; auto is bf16 on a GPU, fp32 on a CPU."""

    repeats: int = 7
    """The median of so many runs."""

    seconds: float | None = None
    """Begin no row after so long. Default none."""

    device: str = "auto"
    """auto, cpu or cuda."""

    out: Path = Path("out/bench")
    """Folder for the JSON file."""

    def run(self) -> None:
        """Measure, print, write."""
        import time
        from datetime import UTC, datetime

        import torch

        from decmem.bench.operator_shapes import SHAPES
        from decmem.bench.operator_trial import refusals
        from decmem.bench.operator_ways import UNPROVEN, known_ways, usual_ways
        from decmem.bench.operators import OperatorBench
        from decmem.bench.peers import absent_peers
        from decmem.experiment import pick_device
        from decmem.machine import code_commit, describe_machine
        from decmem.storage import write_json

        started = time.monotonic()
        if self.repeats < 1:
            raise UserError("--repeats", f"got {self.repeats}, expected at least 1", "Raise it")
        if self.history and min(self.history) < 1:
            raise UserError("--history", f"got {min(self.history)}", "Give 1 latent or more")
        unknown = [way for way in self.backends if way not in known_ways()]
        if unknown:
            cure = f"Choose from: {', '.join(known_ways())}"
            raise UserError("--backends", f"{unknown[0]!r} is unknown", cure)
        device = pick_device(self.device)
        gpu = device.type == "cuda"
        named = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        dtype = named[("bf16" if gpu else "fp32") if self.dtype == "auto" else self.dtype]
        shapes = [
            SHAPES[name]
            for name in self.shapes or (("paper", "wide", "peer") if gpu else ["small"])
        ]
        ways = self.backends or usual_ways(device)
        until = None if self.seconds is None else started + self.seconds
        unproven = [way for way in ways if way in UNPROVEN]
        refused = {}
        if unproven and gpu:
            patience = min(60.0, 0.35 * self.seconds) if self.seconds else 60.0
            refused = refusals(unproven, shapes, device, dtype, patience)

        report: dict[str, Any] = {
            "schema_version": 1,
            "theme": "ops",
            "commit": code_commit(),
            "machine": describe_machine(device),
            "weights": "random",
            "repeats": self.repeats,
            "absent": absent_peers(),
            "rows": [],
        }
        month = datetime.now(UTC).strftime("%Y%m")
        path = self.out / f"ops_{short_name(report['machine']['gpu'])}_{month}.json"
        print("| shape | history | pass | backend | ms | TFLOP/s | error | PyTorch's |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        with stage_bars(single=True) as watch:
            bench = OperatorBench(
                shapes, self.history or ((206, 56, 500) if gpu else (8, 32)), ways, device, dtype,
                self.repeats, until=until, refused=refused, watch=watch,
            )  # fmt: skip
            for row in bench.rows():
                print(table_line(row), flush=True)
                report["rows"].append(row)
                # A way that takes the process along leaves what was measured before it.
                write_json(path, report)
        for peer in report["absent"]:
            print(f"not compared: {peer['peer']}: {peer['reason']}")
        print(f"{path} holds every figure and the machine.")


def table_line(row: dict[str, Any]) -> str:
    """A row of the benchmark as a row of a Markdown table."""
    head = f"| {row['shape']} | {row['history']} | {row['pass']} | {row['backend']} |"
    error = "-" if row["error"] is None else f"{row['error']:.1e}"
    usual = "-" if row["error_of_pytorch"] is None else f"{row['error_of_pytorch']:.1e}"
    if row["failure"]:
        return f"{head} {row['failure'].replace('|', '/')} | | {error} | {usual} |"
    return f"{head} {row['ms']:.3f} | {row['tflops']:.1f} | {error} | {usual} |"


def short_name(gpu: str | None) -> str:
    """How files call a GPU: h100 for "NVIDIA H100 80GB HBM3"; cpu where there is none."""
    if gpu is None:
        return "cpu"
    words = [word for word in re.split(r"[^a-z0-9]+", gpu.lower()) if word]
    return next((word for word in words if any(map(str.isdigit, word))), words[-1])
