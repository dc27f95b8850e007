"""A saved world: what a session needs to go on, without the keys and values it can rebuild.

One safetensors file, `NAME.world`: latents, poses, actions and lenses as tensors; how they were
written to the bank, the settings, the noise seeds and where all came from as JSON in its metadata.
"""

import json
import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from decmem.errors import UserError
from decmem.model import Conditions
from decmem.storage import atomic_file
from decmem.world.actions import A, validate_actions
from decmem.world.kinematics import check_rigid

FORMAT = "decmem-world/1"
_log = logging.getLogger(__name__)
_TENSORS = {
    "latents": (torch.float32, 5),
    "actions": (torch.float32, 4),
    "world_to_camera": (torch.float64, 5),
    "lens": (torch.float32, 3),
}


@dataclass(frozen=True)
class Written:
    """One write pass: how many latents, how the memory was read meanwhile, the bank's anchors."""

    latents: int
    global_memory: bool
    retrieved: int | None
    anchor: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class SavedWorld:
    """Everything a session rebuilds its worlds from.

    Attributes:
        latents: fp32. conditions: actions, cameras and lenses of these latents.
        written: the write passes in order; their latents add up to T.
        seeds: of the noise, one per world. settings: steps, guidance and so on, as they were.
        weights_sha256, codec_sha256: of the weights in use, None where they came from no file.
        provenance: where the world came from, for people and for the live page.
    """

    latents: Float[Tensor, "B T C h w"]
    conditions: Conditions
    written: tuple[Written, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None
    codec_sha256: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Latents."""
        return self.latents.shape[1]

    def check_fit(
        self, shape: tuple[int, ...], weights_sha256: str | None, codec_sha256: str | None
    ) -> None:
        """Raises `UserError` unless a model with latents of this shape can go on from here."""
        if self.latents.shape != shape:
            raise UserError(
                "world",
                f"latents of shape {tuple(self.latents.shape)}, this model's are {shape}",
                "Open it with the preset and weights it was made with",
            )
        if codec_sha256 and self.codec_sha256 and codec_sha256 != self.codec_sha256:
            raise UserError(
                "world", "made with another codec", "Open it with the codec it was made with"
            )
        if weights_sha256 and self.weights_sha256 and weights_sha256 != self.weights_sha256:
            _log.warning("the world was made with other weights and will go on differently")


def save_world(path: str | Path, saved: SavedWorld) -> None:
    """Writes a world; the file appears whole or not at all.

    Raises:
        UserError: where the place cannot be written.
    """
    told = {
        "written": [asdict(one) for one in saved.written],
        "seeds": saved.seeds,
        "settings": saved.settings,
        "weights_sha256": saved.weights_sha256,
        "codec_sha256": saved.codec_sha256,
        "provenance": saved.provenance,
    }
    tensors = {"latents": saved.latents} | {
        name: getattr(saved.conditions, name) for name in ("actions", "world_to_camera", "lens")
    }
    kept = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    head = {"format": FORMAT, "world": json.dumps(told)}
    with atomic_file(path) as temporary:
        save_file(kept, temporary, metadata=head)


def load_world(path: str | Path, argument: str = "world") -> SavedWorld:
    """Reads a world and checks that its parts agree.

    Raises:
        UserError: for a file that is missing, damaged, of another version, or inconsistent.
    """
    try:
        with safe_open(path, framework="pt") as content:
            head = content.metadata() or {}
            ours = head.get("format") == FORMAT
            told = json.loads(head["world"]) if ours else {}
            tensors = {name: content.get_tensor(name) for name in _TENSORS} if ours else {}
    except FileNotFoundError as error:
        raise UserError(argument, f"no file {path}", "Give the path of a .world file") from error
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise _damaged(argument, "it cannot be read") from error
    if not ours:
        raise UserError(
            argument,
            f"format {str(head.get('format'))[:40]!r}, expected {FORMAT!r}",
            "Give a .world file of this version of decmem",
        )
    try:
        saved = _assembled(tensors, told)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _damaged(argument, str(error).splitlines()[0] if str(error) else "a part") from error
    return saved


def _damaged(argument: str, what: str) -> UserError:
    return UserError(argument, f"the saved world is damaged ({what})", "Save it again")


def _assembled(tensors: dict[str, Tensor], told: dict[str, Any]) -> SavedWorld:
    for name, (dtype, dims) in _TENSORS.items():
        if tensors[name].dtype != dtype or tensors[name].dim() != dims:
            raise ValueError(f"{name} is {tensors[name].dtype} of {tensors[name].dim()} dimensions")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{name} is not finite")
    B, T = tensors["latents"].shape[:2]
    actions, poses, lens = tensors["actions"], tensors["world_to_camera"], tensors["lens"]
    if not B or not T:
        raise ValueError("no latents")
    for x, shape in ((actions, (B, T, 4, A)), (poses, (B, T, 4, 4, 4)), (lens, (B, T, 4))):
        if tuple(x.shape) != shape:
            raise ValueError(f"a shape of {tuple(x.shape)} beside {B} worlds of {T} latents")
    validate_actions(actions.flatten(0, 2).numpy())
    check_rigid(poses.numpy().astype(np.float64))
    if not bool((lens[..., :2] > 0).all()):
        raise ValueError("a lens without focal length")
    written = tuple(_write_pass(one, B) for one in told["written"])
    if sum(one.latents for one in written) != T:
        raise ValueError("write passes do not add up")
    seeds = tuple(int(seed) for seed in told["seeds"])
    if len(seeds) != B or not isinstance(told["settings"], dict):
        raise ValueError("seeds or settings")
    if not isinstance(told["provenance"], dict):
        raise ValueError("provenance")
    conditions = Conditions(actions, poses, lens, torch.arange(T))
    return SavedWorld(
        tensors["latents"],
        conditions,
        written,
        seeds,
        told["settings"],
        told["weights_sha256"],
        told["codec_sha256"],
        told["provenance"],
    )


def _write_pass(told: dict[str, Any], worlds: int) -> Written:
    latents, retrieved = told["latents"], told["retrieved"]
    if type(latents) is not int or latents < 1:
        raise ValueError("a write pass without latents")
    if retrieved is not None and (type(retrieved) is not int or retrieved < 1):
        raise ValueError("a write pass without k")
    anchor = tuple((float(x), float(y), float(z)) for x, y, z in told["anchor"])
    if len(anchor) != worlds or not all(math.isfinite(c) for point in anchor for c in point):
        raise ValueError("anchors")
    return Written(latents, told["global_memory"] is True, retrieved, anchor)
