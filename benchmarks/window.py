"""Attention over windows in four ways, at the shapes of training, as a table and as JSON.

python benchmarks/window.py [--presets pocket paper] [--ways window unfolded] [--out FILE.json]

FlexAttention compiles for about a minute and a shape; leave `flex` out to be done sooner.
"""

import argparse
import json
import typing
from pathlib import Path

import torch

from decmem.bench.window import WindowBench, WindowShape
from decmem.bench.window_ways import Way
from decmem.machine import code_commit, describe_machine
from decmem.presets import PRESETS


def shapes(preset: str) -> list[WindowShape]:
    """A step of training for every chunk size; `pocket` also with its short clips."""
    experiment = PRESETS[preset]
    training, chunks = experiment.memory_training, experiment.model.chunk_sizes
    if preset == "paper":
        return [WindowShape(experiment, training.latents, 1, chunk) for chunk in chunks]
    full = [WindowShape(experiment, training.latents, training.batch, chunk) for chunk in chunks]
    many = training.batch * training.latents // training.short_latents
    return [*full, WindowShape(experiment, training.short_latents, many, max(chunks))]


def main() -> None:
    ways = typing.get_args(Way)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["pocket", "paper"], choices=PRESETS)
    parser.add_argument("--ways", nargs="+", default=ways, choices=ways)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    chosen = [shape for preset in asked.presets for shape in shapes(preset)]
    bench = WindowBench(chosen, device, getattr(torch, asked.dtype), asked.ways, asked.repeats)
    print(
        "| preset | clips x latents, chunk | way | forward ms | TFLOP/s | with backward | TFLOP/s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for row in bench.rows():
        rows.append(row)
        figures = row.get("failure") or " | ".join(
            f"{row[name]}"
            for name in (
                "forward_ms", "forward_tflops", "forward_backward_ms", "forward_backward_tflops"
            )
        )  # fmt: skip
        shape = f"{row['clips']} x {row['latents']}, {row['chunk']}"
        print(f"| {row['preset']} | {shape} | {row['way']} | {figures} |", flush=True)
    if asked.out:
        report = {"machine": describe_machine(device), "commit": code_commit(), "rows": rows}
        asked.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
