"""Rendering on the CPU: the pixel that both backends compile, and a loop over frames."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from decmem.world.compiled import compiled
from decmem.world.grid import BUFFER
from decmem.world.pictures import pictures
from decmem.world.trace import trace

_HALF = np.float32(0.5)
_ONE = np.float32(1)
_FULL = np.float32(255)


@compiled
def camera_of(cells, insets, rotations, frame):
    """A frame's camera as tuples: its cell, its place in it, and its right, down and forward."""
    cell = (cells[frame, 0], cells[frame, 1], cells[frame, 2])
    inset = (insets[frame, 0], insets[frame, 1], insets[frame, 2])
    right = (rotations[frame, 0, 0], rotations[frame, 0, 1], rotations[frame, 0, 2])
    down = (rotations[frame, 1, 0], rotations[frame, 1, 1], rotations[frame, 1, 2])
    forward = (rotations[frame, 2, 0], rotations[frame, 2, 1], rotations[frame, 2, 2])
    return cell, inset, right, down, forward


@compiled
def render_pixel(buffers, base, texels, camera, pitch, fine, left, upper, deep):
    """One pixel: the mean of fine x fine rays, and depth and block of the ray through its centre.

    pitch: a pixel's width at depth one; (left, upper): its upper left corner, in pixels from the
    middle of the picture. Returns red,
    green, blue (uint8), depth (float32) and block (uint8); the last two count only if `deep`.
    """
    cell, inset, right, down, forward = camera
    step = _ONE / np.float32(fine)
    spread = step * pitch
    red = green = blue = np.float32(0)
    depth = np.float32(0)
    block = np.int32(0)
    rays = fine * fine
    # One ray more, through the centre, if that is none of the others.
    total = rays + 1 if deep and fine % 2 == 0 else rays
    across = below = _HALF * step
    for ray in range(total):
        if ray == rays:
            across = below = _HALF
        vx = (left + across) * pitch
        vy = (upper + below) * pitch
        dx = right[0] * vx + down[0] * vy + forward[0]
        dy = right[1] * vx + down[1] * vy + forward[1]
        dz = right[2] * vx + down[2] * vy + forward[2]
        r, g, b, t, kind = trace(
            buffers, base, texels, cell[0], cell[1], cell[2], inset[0], inset[1], inset[2],
            dx, dy, dz, spread,
        )  # fmt: skip
        if ray < rays:
            red += r
            green += g
            blue += b
        if across == _HALF and below == _HALF:
            depth = t
            block = kind
        across += step
        if across > _ONE:
            across = _HALF * step
            below += step
    share = step * step
    return (
        np.uint8(min(red * share + _HALF, _FULL)),
        np.uint8(min(green * share + _HALF, _FULL)),
        np.uint8(min(blue * share + _HALF, _FULL)),
        depth,
        np.uint8(block),
    )


@compiled
def _render_frame(
    buffers, index, texels, cells, insets, rotations, pitch, fine, frame, rgb, depth, block
):
    """Fill frame `frame` of rgb (F, H, W, 3) and of depth and block, unless these are empty."""
    height, width = rgb.shape[1], rgb.shape[2]
    base = np.int64(index[frame]) * BUFFER
    camera = camera_of(cells, insets, rotations, frame)
    deep = depth.shape[0] > 0
    for row in range(height):
        upper = np.float32(row) - np.float32(height) * _HALF
        for column in range(width):
            left = np.float32(column) - np.float32(width) * _HALF
            r, g, b, t, kind = render_pixel(
                buffers, base, texels, camera, pitch, fine, left, upper, deep
            )
            rgb[frame, row, column, 0] = r
            rgb[frame, row, column, 1] = g
            rgb[frame, row, column, 2] = b
            if deep:
                depth[frame, row, column] = t
                block[frame, row, column] = kind


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
    """RGB, depth and block of n frames; without depth, none of the last two.

    buffers: all worlds in one row, frame f looks into number index[f]; cells (F, 3) int32 and
    insets (F, 3) float32: the camera's cell and its place in it; rotations (F, 3, 3) float32: world
    to camera.
    """
    count = len(index)
    rgb = np.empty((count, *size, 3), np.uint8)
    deep = count if with_depth else 0
    depth = np.empty((deep, *size), np.float32)
    block = np.empty((deep, *size), np.uint8)
    texels = pictures()

    def render(frame: int) -> None:
        _render_frame(
            buffers, index, texels, cells, insets, rotations, np.float32(1 / focal), supersample,
            frame, rgb, depth, block,
        )  # fmt: skip

    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(render, range(count)))
    else:
        for frame in range(count):
            render(frame)
    return rgb, depth, block
