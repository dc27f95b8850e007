"""What the page's memory lens shows of a chunk."""

from typing import Any

from decmem.memory import Lens

SHOWN = 32


def lens_view(lens: Lens | None, blocks: int, known: int, layer: int | None) -> dict[str, Any]:
    """The blocks read most and the strength of the global memory, of one layer or of all.

    Args:
        lens: what the chunk read. blocks: of a latent. known: latents it could read.
    """
    if lens is None or not lens.lists:
        return {"layer": layer, "retrieved": [], "strength": []}
    counts = lens.counts(blocks, known * blocks, layer)[0]
    total = counts.sum(0)
    retrieved = [
        {
            "latent": index // blocks,
            "block": index % blocks,
            "count": int(total[index]),
            "asked": counts[:, index].tolist(),
        }
        for index in total.argsort(descending=True, stable=True)[:SHOWN].tolist()
        if total[index] > 0
    ]
    strength = [[round(x, 4) for x in row] for row in lens.strengths(layer)[0].tolist()]
    return {"layer": layer, "retrieved": retrieved, "strength": strength}
