"""Rendering on the CPU: one compiled loop per frame, frames spread over threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from decmem.world.compiled import compiled
from decmem.world.pictures import pictures
from decmem.world.trace import trace

_HALF = np.float32(0.5)
_FULL = np.float32(255)


@compiled
def _ray(rotation, vx, vy):
    dx = rotation[0, 0] * vx + rotation[1, 0] * vy + rotation[2, 0]
    dy = rotation[0, 1] * vx + rotation[1, 1] * vy + rotation[2, 1]
    dz = rotation[0, 2] * vx + rotation[1, 2] * vy + rotation[2, 2]
    return dx, dy, dz


@compiled
def _render_frame(buffer, texels, cell, inset, rotation, focal, supersample, rgb, depth, block):
    """Fill one frame; depth and block may have no rows, then they are left out."""
    height, width = rgb.shape[0], rgb.shape[1]
    x, y, z = cell[0], cell[1], cell[2]
    fx, fy, fz = inset[0], inset[1], inset[2]
    fine = np.float32(supersample)
    share = np.float32(1) / (fine * fine)
    spread = np.float32(1) / (focal * fine)
    for row in range(height):
        for column in range(width):
            left = np.float32(column) - np.float32(width) * _HALF
            upper = np.float32(row) - np.float32(height) * _HALF
            red = green = blue = np.float32(0)
            t = np.float32(0)
            kind = np.int32(0)
            for sub_row in range(supersample):
                for sub_column in range(supersample):
                    vx = (left + (np.float32(sub_column) + _HALF) / fine) / focal
                    vy = (upper + (np.float32(sub_row) + _HALF) / fine) / focal
                    dx, dy, dz = _ray(rotation, vx, vy)
                    r, g, b, t, kind = trace(
                        buffer, 0, texels, x, y, z, fx, fy, fz, dx, dy, dz, spread
                    )
                    red += r
                    green += g
                    blue += b
            rgb[row, column, 0] = np.uint8(min(red * share + _HALF, _FULL))
            rgb[row, column, 1] = np.uint8(min(green * share + _HALF, _FULL))
            rgb[row, column, 2] = np.uint8(min(blue * share + _HALF, _FULL))
            if depth.shape[0] > 0:
                if supersample != 1:
                    vx, vy = (left + _HALF) / focal, (upper + _HALF) / focal
                    dx, dy, dz = _ray(rotation, vx, vy)
                    r, g, b, t, kind = trace(
                        buffer, 0, texels, x, y, z, fx, fy, fz, dx, dy, dz, spread
                    )
                depth[row, column] = t
                block[row, column] = np.uint8(kind)


def render_frames(
    buffers: np.ndarray,
    index: np.ndarray,
    cells: np.ndarray,
    insets: np.ndarray,
    rotations: np.ndarray,
    focal: float,
    size: tuple[int, int],
    supersample: int,
    with_depth: bool,
    threads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """RGB, depth and block of n frames; frame f looks into buffers[index[f]]."""
    count = len(index)
    texels = pictures()
    rgb = np.empty((count, *size, 3), np.uint8)
    deep = count if with_depth else 0
    depth = np.empty((deep, *size), np.float32)
    block = np.empty((deep, *size), np.uint8)
    none = np.empty((0, 0), np.float32), np.empty((0, 0), np.uint8)

    def render(frame: int) -> None:
        _render_frame(
            buffers[index[frame]], texels, cells[frame], insets[frame], rotations[frame],
            np.float32(focal), supersample, rgb[frame],
            *((depth[frame], block[frame]) if with_depth else none),
        )  # fmt: skip

    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(render, range(count)))
    else:
        for frame in range(count):
            render(frame)
    return rgb, depth, block
