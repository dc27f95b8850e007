"""Root mean square norm."""

import torch
from jaxtyping import Float
from torch import Tensor

from decmem.ops.untraced import untraced


def rms_norm(
    x: Float[Tensor, "... channels"], gain: Float[Tensor, "... _"], eps: float = 1e-6
) -> Float[Tensor, "... channels"]:
    """Unit root mean square over channels, times `gain`; in fp32, returned in fp32."""
    x = x.float()
    if untraced(x):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        shrink = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        return x * (shrink * gain) if gain.shape[-1] == 1 else (x * shrink).mul_(gain)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain
