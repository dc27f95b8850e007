"""Frames per second of the block world's renderers, and how well they agree.

python benchmarks/world_render.py [--device cuda] [--frames 8192] [--out FOLDER]

Writes world_render_DEVICE_YYYYMM.json. On a GPU the agreement of its pictures with the CPU's is
measured too.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from decmem.machine import code_commit, describe_machine
from decmem.storage import write_json
from decmem.world.camera import DEFAULT_SIZE
from decmem.world.generation import build_world
from decmem.world.motion import state_cameras
from decmem.world.render import Renderer
from decmem.world.training_walk import train_walks
from decmem.world.version import WORLD_VERSION


def _scene(worlds: int, frames: int) -> tuple[list[Any], torch.Tensor, torch.Tensor]:
    """Worlds, and frames of training walks through all of them: world index and pose of each."""
    built = [build_world(seed) for seed in range(worlds)]
    length = max(frames // worlds, 1)
    states, _ = train_walks(built, list(range(worlds)), max(length, 128))
    rows = np.linspace(0, states.shape[1] - 1, length).round().astype(int)
    poses = state_cameras(states[:, rows]).reshape(-1, 4, 4)
    return built, torch.arange(worlds).repeat_interleave(length), torch.from_numpy(poses)


def _cpu_rates(scene: tuple[list[Any], torch.Tensor, torch.Tensor], repeats: int) -> dict[str, Any]:
    """One core, frame by frame: the mean over frames of the best of `repeats` runs."""
    built, index, poses = scene
    chosen = torch.linspace(0, len(index) - 1, 64).round().long()
    rates = {}
    for supersample in (1, 2):
        renderer = Renderer(supersample=supersample, device="cpu")
        stack = renderer.stack(built)
        renderer.render_batch(stack, index[:1], poses[:1])
        seconds = []
        for frame in chosen.tolist():
            part = slice(frame, frame + 1)
            tries = []
            for _ in range(repeats):
                start = time.perf_counter()
                renderer.render_batch(stack, index[part], poses[part])
                tries.append(time.perf_counter() - start)
            seconds.append(min(tries))
        rates[f"supersample_{supersample}"] = round(1 / statistics.mean(seconds), 1)
    return rates


def _cuda_rates(
    scene: tuple[list[Any], torch.Tensor, torch.Tensor], repeats: int
) -> dict[str, Any]:
    """Frames per second per register limit and supersampling, timed by CUDA events."""
    from decmem.world import cuda_renderer

    built, index, poses = scene
    rates: dict[str, Any] = {}
    index, poses = index.cuda(), poses.cuda()
    for registers in (None, 80, 64, 48):
        cuda_renderer.MAX_REGISTERS = registers
        for supersample, depth in ((1, False), (2, False), (2, True)):
            renderer = Renderer(supersample=supersample, device="cuda")
            stack = renderer.stack(built)
            milliseconds = []
            for repeat in range(repeats + 2):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                renderer.render_batch(stack, index, poses, depth=depth)
                end.record()
                torch.cuda.synchronize()
                if repeat >= 2:
                    milliseconds.append(start.elapsed_time(end))
            name = f"registers_{registers}_supersample_{supersample}{'_depth' if depth else ''}"
            rates[name] = round(len(index) / statistics.median(milliseconds) * 1000)
    return rates


def _agreement(scene: tuple[list[Any], torch.Tensor, torch.Tensor], frames: int) -> dict[str, Any]:
    """How far the CUDA pictures are from the CPU's."""
    built, index, poses = scene
    chosen = torch.linspace(0, len(index) - 1, frames).round().long()
    pictures = []
    for device in ("cpu", "cuda"):
        renderer = Renderer(supersample=2, device=device)
        stack = renderer.stack(built)
        batch = renderer.render_batch(stack, index[chosen], poses[chosen], depth=True)
        assert batch.block is not None
        pictures.append((batch.rgb.cpu().int(), batch.block.cpu()))
    error = (pictures[0][0] - pictures[1][0]).abs().amax(-1)
    return {
        "share_within_1": (error <= 1).double().mean().item(),
        "share_equal": (error == 0).double().mean().item(),
        "largest": int(error.max()),
        "share_of_equal_blocks": (pictures[0][1] == pictures[1][1]).double().mean().item(),
    }


def main() -> None:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here)
    parser.add_argument("--worlds", type=int, default=64, help="how many lie side by side")
    parser.add_argument("--frames", type=int, default=8192, help="rendered per call on cuda")
    parser.add_argument("--repeats", type=int, default=7, help="runs per figure")
    parser.add_argument("--agreement-frames", type=int, default=96, help="compared with the CPU's")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for the JSON")
    asked = parser.parse_args()
    scene = _scene(asked.worlds, asked.frames)
    report: dict[str, Any] = {
        "schema_version": 1,
        "theme": "world_render",
        "commit": code_commit(),
        "machine": describe_machine(torch.device(asked.device)),
        "world_version": WORLD_VERSION,
        "size": DEFAULT_SIZE,
        "worlds": asked.worlds,
        "frames": asked.frames,
        "repeats": asked.repeats,
        "cpu_one_core_frames_per_second": _cpu_rates(scene, asked.repeats),
    }
    if asked.device == "cuda":
        report["cuda_frames_per_second"] = _cuda_rates(scene, asked.repeats)
        report["agreement"] = _agreement(scene, asked.agreement_frames)
    path = asked.out / f"world_render_{asked.device}_{time.strftime('%Y%m')}.json"
    write_json(path, report)
    print(json.dumps(report, indent=2))
    print(f"{path} holds the same.")


if __name__ == "__main__":
    main()
