"""Window attention in Triton compiles to one graph, which serves all chunk sizes."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from decmem.memory import Reach, training_plan
from decmem.model import Conditions, WorldModel, initialise
from decmem.ops.window import WindowTable, window_attention
from decmem.ops.window_launches import choose_launches
from decmem.presets import TINY

# The interpreter runs outside of what is compiled; `eager` needs no C++ compiler.
RUNS = [
    pytest.param("cpu", "eager", marks=pytest.mark.interpreter, id="cpu"),
    pytest.param("cuda", "inductor", marks=pytest.mark.gpu, id="cuda"),
]


def attention(q: Tensor, k: Tensor, v: Tensor, windows: WindowTable, valid: Tensor) -> Tensor:
    return window_attention(q * 2, k, v, windows, valid, "triton") * 3


@pytest.mark.parametrize(("device", "backend"), RUNS)
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "no-gradients"])
def test_one_graph_serves_all_chunk_sizes(device: str, backend: str, gradients: bool) -> None:
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    latents, S = 8, 6
    q, k, v = (
        torch.randn(1, 1, 2 * latents, S, 16, generator=generator)
        .to(device)
        .requires_grad_(gradients)
        for _ in "qkv"
    )
    valid = torch.arange(S, device=device) < 5
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(attention, backend=counter, fullgraph=True, dynamic=False)
    with torch.set_grad_enabled(gradients):
        for chunk in (1, 2, 4):
            windows = training_plan(Reach(window=2, write_chunk=1), latents, chunk).windows
            # Compiled code finds the tables made.
            windows.tiles(choose_launches(q), S, q.device)
            got, expected = (f(q, k, v, windows, valid) for f in (compiled, attention))
            torch.testing.assert_close(got, expected)
            if gradients:
                for one, other in zip(
                    torch.autograd.grad(got.square().sum(), (q, k, v)),
                    torch.autograd.grad(expected.square().sum(), (q, k, v)),
                    strict=True,
                ):
                    torch.testing.assert_close(one, other)
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_blocks_of_the_model_share_a_graph_for_all_chunk_sizes() -> None:
    torch.compiler.reset()
    model = WorldModel(TINY.model).cuda()
    initialise(model)
    latents = TINY.memory_training.short_latents
    conditions = Conditions(
        torch.zeros(1, latents, 4, TINY.model.actions),
        torch.eye(4, dtype=torch.float64).repeat(1, latents, 4, 1, 1),
        torch.tensor([1.4, 2.1, 0.0, 0.0]).expand(1, latents, 4),
        torch.arange(latents),
    ).to(torch.device("cuda"))
    x = torch.randn(
        1, 3 * latents, TINY.model.latent_channels, *TINY.model.latent_size, device="cuda"
    )
    t = torch.rand(1, 3 * latents, device="cuda")
    model.compile_blocks()
    graphs = []
    for chunk in (1, 2, 4):
        plan = training_plan(TINY.model.reading.reach, latents, chunk, 2)
        context = model.context(conditions, streams=3)
        model(x.bfloat16(), t, context, plan).square().mean().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1
