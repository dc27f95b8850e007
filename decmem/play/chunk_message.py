"""A chunk as the page is shown it: pictures, poses, figures and the memory lens."""

from typing import Any

import numpy as np

from decmem.play.journey import Chunk, view_of
from decmem.play.jpeg import jpeg
from decmem.play.lens_view import lens_view

Parts = list[tuple[dict[str, Any], bytes]]


def shown(made: Chunk, layer: int | None, blocks: int) -> tuple[dict[str, Any], Parts]:
    """Header and pictures of a chunk whose latents have this many blocks."""
    parts: Parts = []
    pairs = [("dream", made.dream)] + ([] if made.truth is None else [("truth", made.truth)])
    for kind, frames in pairs:
        parts += [
            ({"kind": kind, "frame": made.first_frame + i}, jpeg(frame))
            for i, frame in enumerate(frames)
        ]
    header: dict[str, Any] = {
        "latents": made.latents,
        "first_frame": made.first_frame,
        "frames": len(made.dream),
        "psnr": None if made.truth is None else psnr(made.dream, made.truth),
        "poses": view_of(made.world_to_camera),
        "actions": np.round(made.actions, 4).tolist(),
        "times": {name: round(seconds, 4) for name, seconds in made.times.items()},
        "memory_bytes": made.memory_bytes,
        "lens": None,
    }
    if made.lens is not None:
        header["lens"] = lens_view(made.lens, blocks, made.latents, layer)
    return header, parts


def psnr(dream: np.ndarray, truth: np.ndarray) -> list[float]:
    """Of every frame in dB, capped at 60."""
    errors = (dream.astype(np.float32) - truth.astype(np.float32)).reshape(len(dream), -1)
    mean = np.square(errors).mean(1).clip(255**2 * 1e-6)
    return np.round(10 * np.log10(255**2 / mean.astype(np.float64)), 2).tolist()
