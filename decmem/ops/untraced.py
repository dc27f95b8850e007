"""Where short cuts may be taken: on a CPU, with nobody keeping a trace for gradients or a compiler.

The plain form of an operation is its definition, and what gradients and compilers see. A short
cut beside it gives the same but for rounding: it works in place, in pieces that fit the caches, and
leaves tensors laid out as the next operation wants them.
"""

import torch
from torch import Tensor


def untraced(x: Tensor) -> bool:
    """Whether short cuts serve this tensor."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu"
