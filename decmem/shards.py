"""Weights on disk: safetensors files of at most 16 MiB each, int8 by row where asked.

A set of weights is `NAME.safetensors`, or `NAME-00001-of-0000N.safetensors` when one file would be
too large. The first file's metadata holds the configuration as JSON; nothing is ever unpickled.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from decmem.errors import UserError
from decmem.storage import atomic_file

SHARD_BYTES = 16 * 2**20 - 2**16  # leaves room for the header
_SCALE = ".int8_scale"
FORMAT = "decmem-weights/1"


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and fp32 scales of the rows of a matrix or a convolution's filters."""
    rows = weight.float().flatten(1)
    scale = rows.abs().amax(1).clamp(min=1e-12) / 127
    values = (rows / scale[:, None]).round().to(torch.int8)
    return values.view(weight.shape), scale


def _packed(tensors: dict[str, Tensor], int8: bool) -> dict[str, Tensor]:
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        if int8 and tensor.dim() >= 2 and tensor.numel() >= 4096:
            packed[name], packed[name + _SCALE] = quantise_rows(tensor)
        elif int8 or not tensor.is_floating_point():
            packed[name] = tensor.contiguous()
        else:
            packed[name] = tensor.half().contiguous() if tensor.dim() >= 2 else tensor.contiguous()
    return packed


def save_weights(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, Any], int8: bool = False
) -> list[Path]:
    """Writes weights beside `path` (a name ending in .safetensors) and returns the files.

    Matrices are stored in fp16, or as int8 rows with fp32 scales; vectors stay fp32.
    """
    path = Path(path)
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in _packed(tensors, int8).items():
        size = tensor.numel() * tensor.element_size()
        if used and used + size > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += size
    files = []
    for i, shard in enumerate(shards, start=1):
        part = f"-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = path.with_name(path.stem + part + path.suffix)
        head = {"format": FORMAT, "shards": str(len(shards))}
        if i == 1:
            head["decmem"] = json.dumps(metadata)
        with atomic_file(file) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(shard, temporary, metadata=head)
            temporary.chmod(mode)  # safetensors makes files that nobody else may read
        files.append(file)
    # A set of another size that lay here before would be read in place of this one.
    for stale in {path, *_parts(path)} - set(files):
        stale.unlink(missing_ok=True)
    return files


def _parts(path: Path) -> list[Path]:
    """The numbered files beside `path` that make up a set of its name, in order."""
    name = re.compile(re.escape(path.stem) + r"-\d{5}-of-\d{5}" + re.escape(path.suffix))
    folder = path.parent
    return sorted(f for f in folder.iterdir() if name.fullmatch(f.name)) if folder.is_dir() else []


def shard_files(path: str | Path) -> list[Path]:
    """The files of a set of weights, given its name or its first file.

    Raises:
        UserError: when a file is missing.
    """
    path = Path(path)
    if path.is_file() and not re.search(r"-\d{5}-of-\d{5}$", path.stem):
        return [path]
    files = _parts(path.parent / (re.sub(r"-\d{5}-of-\d{5}$", "", path.stem) + ".safetensors"))
    count = int(files[0].stem[-5:]) if files else 0
    if not files or len(files) != count:
        raise UserError(
            "weights",
            f"{path} is missing" if not files else f"{len(files)} of {count} files of {path}",
            "Give the path of a .safetensors file written by decmem train, with all its parts",
        )
    return files


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in fp32 and the metadata of a set of weights.

    Raises:
        UserError: when a file is missing, damaged, or not decmem's.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for file in shard_files(path):
        try:
            with safe_open(file, framework="pt") as content:
                head = content.metadata() or {}
                if head.get("format") != FORMAT:
                    raise UserError(
                        "weights",
                        f"{file} has format {head.get('format')!r}, expected {FORMAT!r}",
                        "Use weights exported by decmem train",
                    )
                metadata = json.loads(head["decmem"]) if "decmem" in head else metadata
                # safe_open has keys() but is no mapping.
                names = content.keys()
                tensors.update({name: content.get_tensor(name) for name in names})
        except (SafetensorError, json.JSONDecodeError) as error:
            raise UserError(
                "weights", f"{file} is damaged ({error})", "Fetch or export the file again"
            ) from error
    for name in [n for n in tensors if n.endswith(_SCALE)]:
        values = tensors[name.removesuffix(_SCALE)]
        scale = tensors.pop(name).view(-1, *[1] * (values.dim() - 1))
        tensors[name.removesuffix(_SCALE)] = values.float() * scale
    return {name: tensor.float() for name, tensor in tensors.items()}, metadata


def weights_sha256(path: str | Path) -> str:
    """One SHA-256 over the files of a set of weights, in order."""
    digest = hashlib.sha256()
    for file in shard_files(path):
        digest.update(file.read_bytes())
    return digest.hexdigest()
