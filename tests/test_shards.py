"""Weights on disk: round trips, splitting, and files that are missing, damaged or foreign."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from decmem import shards
from decmem.errors import UserError
from decmem.shards import load_weights, quantise_rows, save_weights, shard_files, weights_sha256

METADATA = {"model": {"width": 64, "sizes": [1, 2]}, "note": "é"}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(64, 96, generator=generator),
        "layer.bias": torch.randn(96, generator=generator),
        "conv.weight": torch.randn(32, 16, 3, 3, generator=generator) * 0.01,
        "small.weight": torch.randn(4, 4, generator=generator),
        "count": torch.tensor([3, 70_000]),
        "scalar": torch.tensor(1e-7),
    }


def test_fp16_round_trip(tmp_path: Path) -> None:
    files = save_weights(tmp_path / "w.safetensors", tensors(), METADATA)
    assert files == [tmp_path / "w.safetensors"]
    loaded, metadata = load_weights(files[0])
    assert metadata == METADATA
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        expected = tensor.half().float() if tensor.dim() >= 2 else tensor.float()
        assert torch.equal(loaded[name], expected), name
        assert loaded[name].dtype == torch.float32


def test_int8_round_trip_errs_by_half_a_step_of_its_row(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, tensors(), METADATA, int8=True)
    loaded, metadata = load_weights(path)
    assert metadata == METADATA
    assert loaded.keys() == tensors().keys()
    for name, tensor in tensors().items():
        if name in ("layer.weight", "conv.weight"):
            step = tensor.flatten(1).abs().amax(1) / 127
            error = (loaded[name] - tensor).flatten(1).abs().amax(1)
            assert (error <= step * 0.501).all(), name
            assert error.max() > 0
        else:
            assert torch.equal(loaded[name], tensor.float()), f"{name} is not worth packing"


def test_int8_is_a_quarter_of_fp32(tmp_path: Path) -> None:
    big = {"w": torch.randn(256, 1024)}
    sizes = [
        sum(f.stat().st_size for f in save_weights(tmp_path / f"{int8}.safetensors", big, {}, int8))
        for int8 in (False, True)
    ]
    assert sizes[0] == pytest.approx(256 * 1024 * 2, rel=0.01)
    assert sizes[1] == pytest.approx(256 * 1024, rel=0.01)


def test_rows_of_zeros_quantise() -> None:
    values, scale = quantise_rows(torch.zeros(2, 3))
    assert not values.any()
    assert scale.isfinite().all()


def test_large_weights_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 16_000)
    files = save_weights(tmp_path / "w.safetensors", tensors(), METADATA)
    assert [f.name for f in files] == [
        "w-00001-of-00002.safetensors",
        "w-00002-of-00002.safetensors",
    ]
    assert all(f.stat().st_size < 17_000 for f in files)
    for path in (tmp_path / "w.safetensors", *files):
        assert shard_files(path) == files
        loaded, metadata = load_weights(path)
        assert metadata == METADATA
        assert loaded.keys() == tensors().keys()


def test_others_may_read_weights_as_any_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    (file,) = save_weights(tmp_path / "w.safetensors", tensors(), METADATA)
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("int8", [False, True])
def test_shipped_limit_is_16_mebibytes(int8: bool, tmp_path: Path) -> None:
    many = {f"w{i}": torch.zeros(1024, 1500) for i in range(12)}
    files = save_weights(tmp_path / "w.safetensors", many, METADATA, int8)
    assert len(files) == (2 if int8 else 3)
    assert all(f.stat().st_size <= 16 * 2**20 for f in files)


def test_names_that_begin_alike_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 16_000)
    one = save_weights(tmp_path / "pocket.safetensors", tensors(), {"which": "model"})
    two = save_weights(tmp_path / "pocket-codec.safetensors", tensors(), {"which": "codec"})
    assert shard_files(tmp_path / "pocket.safetensors") == one
    assert shard_files(tmp_path / "pocket-codec.safetensors") == two


@pytest.mark.parametrize(
    ("before", "after"), [(16_000, 10**6), (10**6, 16_000), (3_000, 16_000)], ids=str
)
def test_saving_again_leaves_nothing_of_the_old_set(
    before: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.safetensors"
    monkeypatch.setattr(shards, "SHARD_BYTES", before)
    save_weights(path, {name: t * 0 for name, t in tensors().items()}, {"which": "old"})
    (tmp_path / "w-other.safetensors").write_bytes(b"somebody else's")
    monkeypatch.setattr(shards, "SHARD_BYTES", after)
    files = save_weights(path, tensors(), {"which": "new"})
    loaded, metadata = load_weights(path)
    assert metadata == {"which": "new"}
    assert loaded["layer.bias"].any()
    assert sorted(tmp_path.iterdir()) == sorted([*files, tmp_path / "w-other.safetensors"])


def test_missing_weights_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"weights: .*none\.safetensors is missing"):
        load_weights(tmp_path / "none.safetensors")


@pytest.mark.parametrize("lost", [0, 1])
def test_missing_shard_is_counted(
    lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 16_000)
    files = save_weights(tmp_path / "w.safetensors", tensors(), METADATA)
    files[lost].unlink()
    with pytest.raises(UserError, match="1 of 2 files"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:4],
        lambda data: b"",
        lambda data: b"\xff" * len(data),
        lambda data: b"not weights at all",
    ],
    ids=["half", "head-cut", "empty", "overwritten", "text"],
)
def test_damaged_file_is_one_clear_error(damage, tmp_path: Path) -> None:
    (file,) = save_weights(tmp_path / "w.safetensors", tensors(), METADATA)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"weights: .*w\.safetensors is damaged"):
        load_weights(file)


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "foreign.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"x": torch.zeros(2)}, file, metadata=metadata)
        with pytest.raises(UserError, match="format"):
            load_weights(file)


def test_damaged_metadata_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(2)}, file, {"format": shards.FORMAT, "decmem": "{"})
    with pytest.raises(UserError, match="damaged"):
        load_weights(file)


def test_a_folder_is_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weights"):
        load_weights(tmp_path)


def test_hash_covers_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 16_000)
    path = tmp_path / "w.safetensors"
    files = save_weights(path, tensors(), METADATA)
    before = weights_sha256(path)
    assert len(before) == 64
    assert weights_sha256(files[0]) == before
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert weights_sha256(path) != before
        file.write_bytes(data)
    assert weights_sha256(path) == before


def test_configuration_is_readable_without_this_package(tmp_path: Path) -> None:
    (file,) = save_weights(tmp_path / "w.safetensors", tensors(), METADATA)
    data = file.read_bytes()
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(head["__metadata__"]["decmem"]) == METADATA
