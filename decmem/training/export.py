"""From a finished run to weights others can load, with a card that says where they come from."""

from pathlib import Path
from typing import Any

from torch import Tensor

from decmem import __version__
from decmem.shards import save_weights, weights_sha256
from decmem.storage import write_json
from decmem.world.version import WORLD_VERSION


def export_weights(
    path: Path,
    tensors: dict[str, Tensor],
    configuration: dict[str, Any],
    made: dict[str, Any],
    int8: bool,
) -> list[Path]:
    """Writes weights and, beside them, NAME.json: their card.

    Args:
        configuration: `{"codec": ...}` or `{"model": ...}`, needed to load them.
        made: how they were trained (seeds, budget, machine, figures).
    """
    files = save_weights(path, tensors, configuration, int8)
    card = {
        "weights": [f.name for f in files],
        "sha256": weights_sha256(path),
        "decmem": __version__,
        "world_version": WORLD_VERSION,
        **made,
        **configuration,
    }
    write_json(path.with_suffix(".json"), card)
    return files
