"""Rendered training walks: the data of every task, made on the spot from seeds.

Walk i of a cache is always the same walk, so a resumed run sees what an uninterrupted one would.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from decmem.errors import UserError
from decmem.world.actions import action_values
from decmem.world.generation import build_world
from decmem.world.grid import World
from decmem.world.motion import state_cameras
from decmem.world.render import Renderer
from decmem.world.training_walk import train_walks
from decmem.world.version import HELD_OUT_SEED_BASE

WALKS_PER_WORLD = 8
_WORLDS_AT_ONCE = 32


@dataclass(frozen=True)
class Probe:
    """Which depths are wanted beside the frames.

    Attributes:
        size: rays down and across a frame. frames: the frames they are wanted of.
    """

    size: tuple[int, int]
    frames: tuple[int, ...]


@dataclass(frozen=True)
class WalkBatch:
    """Rendered walks.

    Attributes:
        frames: (N, F, H, W, 3) on the renderer's device.
        world_to_camera: (N, F, 4, 4) float64. actions: (N, F, A).
        intrinsics: (3, 3) in pixels.
        depth: (N, D, h, w) along the camera's axis, infinite for sky; None where not probed.
    """

    frames: UInt8[Tensor, "N F H W 3"]
    world_to_camera: Float[np.ndarray, "N F 4 4"]
    actions: Float[np.ndarray, "N F A"]
    intrinsics: Float[np.ndarray, "3 3"]
    depth: Float[Tensor, "N D h w"] | None = None


def rendered_walks(
    first: int,
    count: int,
    frames: int,
    size: tuple[int, int],
    device: torch.device,
    probe: Probe | None = None,
    stills: int = 0,
) -> Iterator[WalkBatch]:
    """Training walks `first` to `first + count`, a few worlds at a time; `stills` as `train_walks`.

    Raises:
        UserError: when the walks would reach the held-out seeds.
    """
    if first + count > WALKS_PER_WORLD * HELD_OUT_SEED_BASE:
        raise UserError(
            "walks",
            f"{count} from walk {first} on reach held-out worlds, {HELD_OUT_SEED_BASE} onwards",
            f"Ask for fewer: a world has {WALKS_PER_WORLD}",
        )
    cores = os.cpu_count() or 1
    kind = "cuda" if device.type == "cuda" else "cpu"
    renderer = Renderer(size=size, supersample=2, device=kind, threads=cores)
    sounder = None
    if probe is not None:
        sounder = Renderer(size=probe.size, supersample=1, device=kind, threads=cores)
    step = WALKS_PER_WORLD * _WORLDS_AT_ONCE

    def walk(start: int) -> tuple[list[World], np.ndarray, np.ndarray, np.ndarray]:
        index = np.arange(start, min(start + step, first + count))
        seeds, which = np.unique(index // WALKS_PER_WORLD, return_inverse=True)
        worlds = [build_world(int(s)) for s in seeds]
        states, actions = train_walks([worlds[w] for w in which], index.tolist(), frames, stills)
        return worlds, which, states, actions

    # Worlds and walks are made ahead, on all cores, while earlier ones are rendered.
    with ThreadPoolExecutor(min(cores, 16)) as pool:
        for worlds, which, states, actions in pool.map(walk, range(first, first + count, step)):
            poses, stack = state_cameras(states), renderer.stack(worlds)
            shown = renderer.render_batch(
                stack,
                torch.from_numpy(np.repeat(which, frames)),
                torch.from_numpy(poses.reshape(-1, 4, 4)),
            )
            depth = None
            if probe is not None and sounder is not None:
                sounded = sounder.render_batch(
                    stack,
                    torch.from_numpy(np.repeat(which, len(probe.frames))),
                    torch.from_numpy(poses[:, probe.frames].reshape(-1, 4, 4)),
                    depth=True,
                ).depth
                assert sounded is not None
                depth = sounded.unflatten(0, (len(which), len(probe.frames)))
            yield WalkBatch(
                shown.rgb.unflatten(0, (len(which), frames)),
                poses,
                action_values(actions),
                renderer.intrinsics,
                depth,
            )
