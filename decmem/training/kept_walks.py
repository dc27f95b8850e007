"""Coded walks kept on disk, so that a paused run goes on without rendering them again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from decmem.storage import atomic_file
from decmem.training.latent_cache import LatentCache


def kept_walks(
    path: Path, key: dict[str, Any], device: torch.device, make: Callable[[], LatentCache]
) -> LatentCache:
    """The cache stored at `path` under this key, or a fresh one, which is then stored there.

    `key` is all that the walks and their latents hang on; a file under another key is replaced.
    """
    told = json.dumps(key, sort_keys=True)
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            if (file.metadata() or {}).get("key") == told:
                return LatentCache.of_parts({n: file.get_tensor(n) for n in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError):
        pass  # not there, or cut short: made anew
    cache = make()
    with atomic_file(path) as temporary:
        parts = {name: x.contiguous().cpu() for name, x in cache.parts().items()}
        save_file(parts, temporary, {"key": told})
    return cache
