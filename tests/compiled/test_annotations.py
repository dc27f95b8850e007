"""Annotated functions compile. Only the run-time checks, absent here, would break that.

The backend is `eager`: what is tested is that each function is captured as one graph, which needs
no C++ compiler on the machine.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def annotated(x: Float[Tensor, "B C"], y: Float[Tensor, "B C"]) -> Float[Tensor, " B"]:
    """A dot product for each row."""
    return (x * y).sum(-1)


def test_annotations_do_not_break_the_graph() -> None:
    x, y = torch.randn(3, 5), torch.randn(3, 5)
    compiled = torch.compile(annotated, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, y), annotated(x, y))
