"""Attention over a bank stored in 8 bits, which is restored tile by tile, where listed, or whole.

python benchmarks/stored.py [--preset paper] [--latents 60 206 500] [--rows 1 2]

The Triton kernel restores what it loads; the kernels for Hopper GPUs have the listed blocks
restored before; and whole is what it costs to do so as far as the history goes.
"""

import argparse
import sys
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from decmem.bench.clock import kernel_ms
from decmem.errors import UserError
from decmem.memory.quantised import quantise
from decmem.ops import block_sparse_attention
from decmem.ops.block_sparse import Backend
from decmem.presets import PRESETS

CUDA = torch.device("cuda")


class Bank(NamedTuple):
    """Keys and values in 8 bits, their scales, and room to restore them in."""

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor
    keys: Tensor
    values: Tensor


def as_stored(
    backend: Backend, bank: Bank, q: Tensor, lists: Tensor, counts: Tensor | None
) -> Tensor:
    scales = bank.k_scale, bank.v_scale
    return block_sparse_attention(q, bank.k, bank.v, lists, counts, None, backend, *scales)


def whole(bank: Bank, q: Tensor, lists: Tensor, counts: Tensor | None) -> Tensor:
    bank.keys.copy_(bank.k).mul_(bank.k_scale)
    bank.values.copy_(bank.v).mul_(bank.v_scale)
    return block_sparse_attention(q, bank.keys, bank.values, lists, counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="paper", choices=PRESETS)
    parser.add_argument("--latents", type=int, nargs="+", default=[60, 206, 500])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device")
    model = PRESETS[asked.preset].model
    layout, reading, D = model.layout, model.reading, model.position.head_dim
    M, P, G = layout.M, layout.P, model.heads if reading.per_head else 1
    counts = None if layout.counts is None else layout.counts.to(CUDA)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {asked.preset}")
    for latents in asked.latents:
        shape = (1, model.heads, latents * M, P, D)
        (k, k_scale), (v, v_scale) = (
            quantise(torch.randn(shape, device=CUDA, dtype=torch.bfloat16)) for _ in "kv"
        )
        places = [torch.empty(shape, device=CUDA, dtype=torch.bfloat16) for _ in "kv"]
        for rows in asked.rows:
            Nq = max(model.chunk_sizes) * M
            q = torch.randn(rows, model.heads, Nq, P, D, device=CUDA, dtype=torch.bfloat16)
            rank = torch.rand(rows, G, Nq, latents * M, device=CUDA)
            lists = rank.topk(min(reading.retrieved, latents * M)).indices.sort().values.int()
            bank = Bank(k, v, k_scale, v_scale, *places)
            ways = {
                "tile by tile": partial(as_stored, "triton", bank, q, lists, counts),
                "where listed": partial(as_stored, "hopper", bank, q, lists, counts),
                "as chosen": partial(as_stored, "auto", bank, q, lists, counts),
                "whole": partial(whole, bank, q, lists, counts),
            }
            with torch.no_grad():
                truth, said = whole(bank, q, lists, counts).float(), []
                for name, work in ways.items():
                    try:
                        apart = (work().float() - truth).abs().max() / truth.abs().max()
                        ms = kernel_ms(work, CUDA, repeats=asked.repeats)
                        said.append(f"{name} {ms:.3f} ms ({apart.item():.0e})")
                    except UserError as failure:
                        said.append(f"{name}: {failure.problem}")
            print(f"{latents} latents, {rows} rows: {', '.join(said)}", flush=True)
        del k, v, places, bank


if __name__ == "__main__":
    main()
