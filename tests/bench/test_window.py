"""The window benchmark: every way gives the same attention, and rows say what failed."""

import dataclasses

import pytest
import torch
from torch import Tensor

from decmem.bench import window
from decmem.bench.window import WindowBench, WindowShape, worst_error
from decmem.bench.window_ways import latent_block_mask, prepared
from decmem.memory import training_plan
from decmem.presets import PAPER, POCKET, TINY

CPU = torch.device("cpu")
SHAPE = WindowShape(TINY, latents=4, clips=1, chunk=2)
# 12 x 20 tokens: blocks of unequal size, padded.
RAGGED = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, size=(48, 80)))


@pytest.mark.parametrize("experiment", [TINY, RAGGED], ids=["exact", "padded"])
@pytest.mark.parametrize("way", ["window", "block_sparse", "unfolded"])
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_every_way_is_right(experiment, way, chunk: int) -> None:
    shape = WindowShape(experiment, latents=4, clips=2, chunk=chunk)
    q, k, v, grad = shape.inputs(CPU, torch.float32)
    valid = shape.valid(CPU)
    assert (valid is None) == (experiment is TINY)
    attention = prepared(way, shape.windows, valid, q)
    assert worst_error(attention, shape.windows, valid, (q, k, v, grad)) < 16


def test_errors_are_seen() -> None:
    q, k, v, grad = SHAPE.inputs(CPU, torch.float32)
    right = prepared("window", SHAPE.windows, None, q)

    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return right(q, k, v * 1.001)

    def wrong_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return right(q, k.detach() + 0.999 * (k - k.detach()), v)

    for attention in (wrong, wrong_gradient):
        assert worst_error(attention, SHAPE.windows, None, (q, k, v, grad)) > 1000


def test_rows() -> None:
    bench = WindowBench([SHAPE], CPU, torch.float32, ["window", "unfolded"], repeats=1)
    first, second = bench.rows()
    assert (first["way"], second["way"]) == ("window", "unfolded")
    assert first["preset"] == "tiny"
    assert "failure" not in first
    assert min(first["forward_ms"], first["forward_backward_ms"]) > 0


def test_rates_are_of_nominal_work(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([2.0, 14.0])
    monkeypatch.setattr(window, "median_device_ms", lambda *_, **__: next(times))
    large = WindowShape(POCKET, latents=84, clips=600, chunk=4)
    tensors = SHAPE.inputs(CPU, torch.float32)
    monkeypatch.setattr(WindowShape, "inputs", lambda *_: tensors)
    monkeypatch.setattr(window, "worst_error", lambda *_: 1.0)
    (row,) = WindowBench([large], CPU, torch.float32, ["window"]).rows()
    assert row["forward_tflops"] == pytest.approx(large.flop / 2e-3 / 1e12, rel=1e-3)
    assert row["forward_backward_tflops"] == pytest.approx(3.5 * large.flop / 14e-3 / 1e12, 1e-3)


def test_what_fails_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        raise RuntimeError("out of memory\nand a long story")

    monkeypatch.setattr(window, "prepared", failing)
    (row,) = WindowBench([SHAPE], CPU, torch.float32, ["window"]).rows()
    assert row["failure"] == "out of memory"
    assert "forward_ms" not in row


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "prepared", lambda *_: lambda q, k, v: q + k + v)
    (row,) = WindowBench([SHAPE], CPU, torch.float32, ["window"]).rows()
    assert row["failure"].startswith("wrong by")
    assert "forward_ms" not in row


def test_nominal_work() -> None:
    shape = WindowShape(POCKET, latents=84, clips=6, chunk=4)
    table = shape.windows.table
    assert table.shape == (252, 252)
    assert shape.flop == 4 * 64 * 36 * int(table.sum()) * 96 * 96
    # Padding is no work.
    paper = WindowShape(PAPER, latents=60, clips=1, chunk=4)
    assert paper.flop == 4 * 72 * 24 * int(paper.windows.table.sum()) * 880**2


@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize("S", [96, 160])
def test_the_mask_of_blocks_is_the_mask_of_tokens(S: int, padded: bool) -> None:
    table = training_plan(TINY.model.reading.reach, 4, 2, 1).windows.table
    valid = torch.arange(S) < S - 9 if padded else None
    mask = latent_block_mask(table, valid, S)
    tokens = torch.kron(table, (torch.ones(S).bool() if valid is None else valid).expand(S, S))
    size, length = 128, len(tokens)
    want = torch.zeros(-(-length // size), -(-length // size), 2, dtype=torch.bool)
    for i in range(len(want)):
        for j in range(len(want)):
            block = tokens[i * size : (i + 1) * size, j * size : (j + 1) * size]
            want[i, j, 0], want[i, j, 1] = block.any(), block.all()
    whole = torch.zeros(len(want), len(want), dtype=torch.bool)
    partial = whole.clone()
    for name, blocks in (("full_kv", whole), ("kv", partial)):
        counts, indices = getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices")
        for i, (count, row) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
            blocks[i, row[:count].long()] = True
    assert torch.equal(whole, want[..., 1])
    assert not (want[..., 0] & ~(whole | partial)).any()
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    zero = torch.zeros(1, dtype=torch.long)
    assert torch.equal(mask.mask_mod(zero, zero, query, key), tokens)


@pytest.mark.gpu
def test_every_way_is_right_on_a_gpu() -> None:
    shape = WindowShape(POCKET, latents=8, clips=1, chunk=2)
    bench = WindowBench([shape], torch.device("cuda"), torch.bfloat16, repeats=2)
    rows = list(bench.rows())
    assert [row["way"] for row in rows] == list(bench.ways)
    assert [row for row in rows if "failure" in row] == []
