"""The window of a roll-out in three ways: the window kernels, blocks for Hopper GPUs, and cuDNN.

python benchmarks/window_rollout.py [--preset paper] [--history 4] [--rows 1 2] [--repeats 9]

A chunk reads `history` latents before it, and itself. PyTorch's attention by cuDNN gets tokens
packed without padding, as if somebody had packed them for nothing. Rates count tokens that exist.
"""

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from decmem.bench.clock import kernel_ms
from decmem.memory import TokenLayout
from decmem.ops.window import WindowTable, window_attention
from decmem.presets import PRESETS

CUDA = torch.device("cuda")


def ways(
    q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout
) -> dict[str, tuple[Callable[[], Tensor], bool]]:
    """Attention each way, and whether it gives packed tokens."""
    windows = WindowTable(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool))
    valid = None if layout.valid is None else layout.valid.flatten().to(CUDA)
    counts = None if layout.counts is None else layout.counts.to(CUDA)
    packed = [pack(x, layout) for x in (q, k, v)]

    def cudnn() -> Tensor:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return F.scaled_dot_product_attention(*packed)

    return {
        "window": (lambda: window_attention(q, k, v, windows, valid, "triton"), False),
        "hopper": (lambda: window_attention(q, k, v, windows, valid, "hopper", counts), False),
        "cudnn, packed": (cudnn, True),
    }


def pack(x: Tensor, layout: TokenLayout) -> Tensor:
    """(B, H, T, S, D) without the slots that hold no token, as (B, H, tokens, D)."""
    if layout.valid is not None:
        x = x[:, :, :, layout.valid.flatten().to(x.device)]
    return x.flatten(2, 3).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="paper", choices=PRESETS)
    parser.add_argument("--history", type=int, default=4)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device")
    model = PRESETS[asked.preset].model
    layout, chunk, D = model.layout, max(model.chunk_sizes), model.position.head_dim
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {asked.preset}")
    for rows in asked.rows:
        q, k, v = (
            torch.randn(rows, model.heads, T, layout.S, D, device=CUDA, dtype=torch.bfloat16)
            for T in (chunk, asked.history + chunk, asked.history + chunk)
        )
        pairs = chunk * (asked.history + chunk) * layout.tokens**2
        truth = F.scaled_dot_product_attention(
            *(pack(x[:1, :1].float(), layout) for x in (q, k, v))
        )
        for name, (work, packed) in ways(q, k, v, layout).items():
            try:
                with torch.no_grad():
                    out = work()[:1, :1].float()
                    error = ((out if packed else pack(out, layout)) - truth).abs().max()
                    ms = kernel_ms(work, CUDA, repeats=asked.repeats)
            except Exception as failure:
                lines = str(failure).splitlines() or [type(failure).__name__]
                print(f"{rows} rows  {name:14} {lines[0][:120]}")
                continue
            rate = 4 * rows * model.heads * D * pairs / ms / 1e9
            off = float(error / truth.abs().max())
            print(f"{rows} rows  {name:14} {ms:7.3f} ms {rate:5.0f} TFLOP/s  off by {off:.1e}")


if __name__ == "__main__":
    main()
