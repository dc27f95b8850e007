"""Frames per second of the block world's renderers, and how well they agree, as JSON.

python benchmarks/world_render.py [--device cuda] [--frames 8192]
"""

import json
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro

from decmem.world.camera import DEFAULT_SIZE
from decmem.world.generation import build_world
from decmem.world.motion import state_cameras
from decmem.world.render import Device, Renderer
from decmem.world.training_walk import train_walks
from decmem.world.version import WORLD_VERSION


@dataclass(frozen=True)
class WorldRender:
    """device: cpu, or cuda, which also measures the agreement with the CPU; worlds: how many lie
    side by side; frames: rendered per call on cuda; repeats: the median of so many counts.
    """

    device: Device = "cuda" if torch.cuda.is_available() else "cpu"
    worlds: int = 64
    frames: int = 8192
    repeats: int = 7
    agreement_frames: int = 96


def _scene(worlds: int, frames: int) -> tuple[list[Any], torch.Tensor, torch.Tensor]:
    """Worlds, and frames of training walks through all of them: world index and pose of each."""
    built = [build_world(seed) for seed in range(worlds)]
    length = max(frames // worlds, 1)
    states, _ = train_walks(built, list(range(worlds)), max(length, 128))
    rows = np.linspace(0, states.shape[1] - 1, length).round().astype(int)
    poses = state_cameras(states[:, rows]).reshape(-1, 4, 4)
    return built, torch.arange(worlds).repeat_interleave(length), torch.from_numpy(poses)


def _cpu_rates(scene: tuple[list[Any], torch.Tensor, torch.Tensor], repeats: int) -> dict[str, Any]:
    """One core, frame by frame: the median over frames of the best of `repeats` runs."""
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
    """Measure and print."""
    options = tyro.cli(WorldRender, description=__doc__)
    scene = _scene(options.worlds, options.frames)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    report: dict[str, Any] = {
        "world_version": WORLD_VERSION,
        "commit": commit.stdout.strip(),
        "size": DEFAULT_SIZE,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cpu_one_core_frames_per_second": _cpu_rates(scene, options.repeats),
    }
    if options.device == "cuda":
        report["gpu"] = torch.cuda.get_device_name()
        report["cuda_frames_per_second"] = _cuda_rates(scene, options.repeats)
        report["agreement"] = _agreement(scene, options.agreement_frames)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
