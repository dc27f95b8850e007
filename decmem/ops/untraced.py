"""Where short cuts may be taken: on a CPU, with nobody keeping a trace for gradients or a compiler;
and where kernels may.

The plain form of an operation is its definition, and what gradients and compilers see. A short
cut beside it gives the same but for rounding: it works in place, in pieces that fit the caches, and
leaves tensors laid out as the next operation wants them.
"""

import importlib.util

import torch
from torch import Tensor

# Asked once: compiled code cannot search for packages.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def untraced(x: Tensor) -> bool:
    """Whether short cuts serve this tensor."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu"


def kernels_serve(x: Tensor) -> bool:
    """Whether the kernels run where this tensor lies; interpreted ones are for tests alone."""
    return _TRITON_INSTALLED and x.is_cuda


def bare_kernels_serve(x: Tensor) -> bool:
    """The same for kernels that know no gradients; a compiler fuses the plain form by itself."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return kernels_serve(x)
