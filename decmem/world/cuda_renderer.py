"""Rendering on a CUDA device: the CPU's own functions, compiled a second time by numba-cuda."""

import threading
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import torch

if not hasattr(np, "row_stack"):
    # numpy 2.5 dropped this alias, and numba-cuda up to 0.30 asks for it by name.
    np.row_stack = np.vstack  # pyright: ignore[reportAttributeAccessIssue]

from numba import cuda
from numba.core.dispatcher import Dispatcher

from decmem.errors import UserError
from decmem.world import cpu_renderer
from decmem.world.grid import BUFFER
from decmem.world.pictures import pictures

MAX_REGISTERS: int | None = None
"""Registers a thread may use; fewer let more threads run at once. None: as many as it likes."""

_HALF = np.float32(0.5)
_TILE_WIDTH = 16
_TILE_HEIGHT = 8
"""Pixels of a thread block: 4 warps, each 8 pixels wide and 4 high, so that its rays stay close."""
_THREADS = _TILE_WIDTH * _TILE_HEIGHT


def require_device() -> None:
    """Raise `UserError` unless torch and numba both see a CUDA device."""
    if not (torch.cuda.is_available() and cuda.is_available()):
        raise UserError("device", "no CUDA device is in sight", "use device 'cpu'")


@cache
def device_function(function: Any) -> Any:
    """A compiled CPU function as a device function, with all that it calls."""
    python = function.py_func
    scope = dict(python.__globals__)
    for name in python.__code__.co_names:
        if isinstance(scope.get(name), Dispatcher):
            scope[name] = device_function(scope[name])
    return cuda.jit(FunctionType(python.__code__, scope, python.__name__), device=True)


@cache
def kernel(max_registers: int | None) -> Any:
    """The kernel: one thread per pixel."""
    pixel = device_function(cpu_renderer.render_pixel)
    camera_of = device_function(cpu_renderer.camera_of)

    def render(buffers, index, texels, cells, insets, rotations, pitch, fine, rgb, depth, block):
        height, width = rgb.shape[1], rgb.shape[2]
        across = (width + _TILE_WIDTH - 1) // _TILE_WIDTH
        down = (height + _TILE_HEIGHT - 1) // _TILE_HEIGHT
        number: Any = cuda.blockIdx.x
        lane: Any = cuda.threadIdx.x
        tile = number % (across * down)
        frame = number // (across * down)
        column = (tile % across) * _TILE_WIDTH + (lane >> 5 & 1) * 8 + (lane & 7)
        row = (tile // across) * _TILE_HEIGHT + (lane >> 6) * 4 + (lane >> 3 & 3)
        if row >= height or column >= width:
            return
        base = np.int64(index[frame]) * BUFFER
        left = np.float32(column) - np.float32(width) * _HALF
        upper = np.float32(row) - np.float32(height) * _HALF
        deep = depth.shape[0] > 0
        camera = camera_of(cells, insets, rotations, frame)
        r, g, b, t, kind = pixel(buffers, base, texels, camera, pitch, fine, left, upper, deep)
        rgb[frame, row, column, 0] = r
        rgb[frame, row, column, 1] = g
        rgb[frame, row, column, 2] = b
        if deep:
            depth[frame, row, column] = t
            block[frame, row, column] = kind

    return cuda.jit(max_registers=max_registers)(render) if max_registers else cuda.jit(render)


def grid(frames: int, size: tuple[int, int]) -> tuple[int, int]:
    """Thread blocks that cover so many frames, and threads in each."""
    height, width = size
    return frames * -(-width // _TILE_WIDTH) * -(-height // _TILE_HEIGHT), _THREADS


@cache
def _device_pictures(number: int) -> Any:
    return cuda.to_device(pictures())


_first_use = threading.Lock()


def _gpu(number: int) -> Any:
    """The GPU as a context. Numba lists the GPUs when first asked, and fails if two threads ask."""
    with _first_use:
        return cuda.gpus[number]


def render_frames(
    buffers: torch.Tensor,
    index: torch.Tensor,
    cells: torch.Tensor,
    insets: torch.Tensor,
    rotations: torch.Tensor,
    focal: float,
    size: tuple[int, int],
    supersample: int,
    with_depth: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `cpu_renderer.render_frames`, on the device and stream that torch is using."""
    device = buffers.device
    count = len(index)
    deep = count if with_depth else 0
    rgb = torch.empty((count, *size, 3), dtype=torch.uint8, device=device)
    depth = torch.empty((deep, *size), dtype=torch.float32, device=device)
    block = torch.empty((deep, *size), dtype=torch.uint8, device=device)
    number = device.index or 0
    with _gpu(number):
        stream = cuda.external_stream(torch.cuda.current_stream(device).cuda_stream)
        kernel(MAX_REGISTERS)[(*grid(count, size), stream)](
            buffers, index, _device_pictures(number), cells, insets, rotations,
            np.float32(1 / focal), supersample, rgb, depth, block,
        )  # fmt: skip
    return rgb, depth, block
