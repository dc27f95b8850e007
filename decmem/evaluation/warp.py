"""Re-projection with true depth: the inner loops of the geometric yardstick."""

from typing import no_type_check

import numba
import numpy as np

NEAREST_M = 0.05
"""Points closer than this to a bank camera are not read from it."""

AGREES = 0.02
"""Two depths agree within this share of either."""

LEAST_COVER = 0.25
"""Share of the bilinear weight that must lie on taps that show the same surface."""

BLUR = 0.05
"""How much a reading between pixels, which bilinear weights blur, costs against one on a pixel."""

SOFTNESS = 1e-4
"""Cost at which a view counts a quarter of a perfect one: small, so that a view from the same pose
outweighs two hundred others and a revisit is copied."""


@numba.njit(nogil=True, cache=True)
@no_type_check  # the run-time shape checks of the tests cannot be compiled
def fuse_views(
    depth: np.ndarray,
    rays: np.ndarray,
    turn: np.ndarray,
    shift: np.ndarray,
    baseline: np.ndarray,
    bank_rays: np.ndarray,
    bank_frames: np.ndarray,
    bank_inverse_depth: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """One target frame from all bank frames.

    ``depth`` (H, W) metres along the axis, infinite = sky; ``rays`` (3, 3) inverse intrinsics of
    the target; per bank frame ``turn`` (N, 3, 3) and ``shift`` (N, 3) take ``depth * (u, v, 1)`` to
    its homogeneous pixel, ``baseline`` (N) is the metres between the cameras, ``bank_rays``
    (N, 3, 3) its inverse intrinsics. ``bank_frames`` (N, H, W, 3) uint8, ``bank_inverse_depth``
    (N, H, W) per metre, 0 = sky.

    The weight of a reading is ``1 / (SOFTNESS + cost)^2`` with ``cost = ln(distance ratio)^2 +
    2 (1 - cos(angle between the lines of sight)) + BLUR (x (1 - x) + y (1 - y))``, x and y the
    fractions of the bilinear reading; for the sky only the last term counts.
    Returns colours (H, W, 3) float32 in [0, 255] and which pixels were read at all (H, W).
    """
    height, width = depth.shape
    total = np.zeros((height, width), np.float64)
    colour = np.zeros((height, width, 3), np.float64)
    shares, agrees = np.zeros(4, np.float64), np.zeros(4, np.bool_)
    for n in range(bank_frames.shape[0]):
        a, s, inverse = turn[n], shift[n], bank_rays[n]
        for y in range(height):
            v = y + 0.5
            for x in range(width):
                u = x + 0.5
                z = depth[y, x]
                sky = not np.isfinite(z)
                px = a[0, 0] * u + a[0, 1] * v + a[0, 2]
                py = a[1, 0] * u + a[1, 1] * v + a[1, 2]
                pz = a[2, 0] * u + a[2, 1] * v + a[2, 2]
                if not sky:
                    px, py, pz = px * z + s[0], py * z + s[1], pz * z + s[2]
                if pz < (1e-6 if sky else NEAREST_M):
                    continue
                bu, bv = px / pz, py / pz
                if not (0.0 <= bu < width and 0.0 <= bv < height):
                    continue
                expected = 0.0 if sky else 1.0 / pz
                left, top = int(np.floor(bu - 0.5)), int(np.floor(bv - 0.5))
                across, down = bu - 0.5 - left, bv - 0.5 - top
                cover, between, solid = 0.0, 0.0, not sky
                for i in range(4):
                    ty = min(max(top + i // 2, 0), height - 1)
                    tx = min(max(left + i % 2, 0), width - 1)
                    tap = bank_inverse_depth[n, ty, tx]
                    shares[i] = (down if i >= 2 else 1.0 - down) * (
                        across if i % 2 == 1 else 1.0 - across
                    )
                    agrees[i] = tap == 0.0 if sky else abs(tap - expected) <= AGREES * expected
                    between += shares[i] * tap
                    solid = solid and tap > 0.0
                    cover += shares[i] if agrees[i] else 0.0
                # On a plane inverse depth is linear in the picture, however slanting the plane.
                if solid and abs(between - expected) <= AGREES * expected:
                    agrees[:] = True
                    cover = 1.0
                if cover < LEAST_COVER:
                    continue
                cost = BLUR * (across * (1.0 - across) + down * (1.0 - down))
                if not sky:
                    here = z * _length(rays, u, v)
                    there = pz * _length(inverse, bu, bv)
                    cosine = (here**2 + there**2 - baseline[n] ** 2) / (2.0 * here * there)
                    cost += np.log(there / here) ** 2 + 2.0 * max(1.0 - cosine, 0.0)
                weight = 1.0 / (SOFTNESS + cost) ** 2
                total[y, x] += weight
                for i in range(4):
                    if agrees[i]:
                        ty = min(max(top + i // 2, 0), height - 1)
                        tx = min(max(left + i % 2, 0), width - 1)
                        share = weight * shares[i] / cover
                        for c in range(3):
                            colour[y, x, c] += share * bank_frames[n, ty, tx, c]
    seen = total > 0.0
    fused = np.zeros((height, width, 3), np.float32)
    for y in range(height):
        for x in range(width):
            if seen[y, x]:
                for c in range(3):
                    fused[y, x, c] = colour[y, x, c] / total[y, x]
    return fused, seen


@numba.njit(nogil=True, cache=True)
@no_type_check
def _length(rays: np.ndarray, u: float, v: float) -> float:
    """Length of the viewing ray of pixel (u, v) whose depth along the axis is 1."""
    x = rays[0, 0] * u + rays[0, 1] * v + rays[0, 2]
    y = rays[1, 0] * u + rays[1, 1] * v + rays[1, 2]
    z = rays[2, 0] * u + rays[2, 1] * v + rays[2, 2]
    return np.sqrt(x * x + y * y + z * z)


@numba.njit(nogil=True, cache=True)
@no_type_check
def fill_from_nearest(colour: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """A copy of ``colour`` (H, W, 3) whose unseen pixels take the colour of the seen pixel fewest
    horizontal and vertical steps away (breadth first, rows before columns on ties)."""
    height, width = seen.shape
    filled = colour.copy()
    known = seen.copy()
    queue = np.empty((height * width, 2), np.int64)
    tail = 0
    for y in range(height):
        for x in range(width):
            if known[y, x]:
                queue[tail, 0], queue[tail, 1] = y, x
                tail += 1
    head = 0
    while head < tail:
        y, x = queue[head]
        head += 1
        for i in range(4):
            ny = y + (-1 if i == 0 else 1 if i == 1 else 0)
            nx = x + (-1 if i == 2 else 1 if i == 3 else 0)
            if 0 <= ny < height and 0 <= nx < width and not known[ny, nx]:
                known[ny, nx] = True
                filled[ny, nx] = filled[y, x]
                queue[tail, 0], queue[tail, 1] = ny, nx
                tail += 1
    return filled
