"""The kernels for Hopper GPUs are assembled without one: no spills, and products stay in flight.

Only the assembler of Triton's own package shows this; whether they run, the GPU tests say.
"""

import inspect
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import mangle_type

from decmem.ops import sparse_hopper_backward_kernels, sparse_hopper_kernels
from decmem.ops.sparse_tiles import hopper_query_tiles, hopper_tiles

ASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ASSEMBLER.exists(), reason="needs the assembler of Triton's package"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles"),
]


class Launches:
    """Stands in for a kernel: keeps what it was launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> "Launches":
        return self

    def __call__(self, *values: Any, **constants: Any) -> None:
        names = [parameter.name for parameter in self.kernel.params]
        self.arguments = dict(zip(names, values, strict=False)) | constants

    def assembled(self, folder: Path) -> str:
        """What the assembler says of the kernel, made for an H100."""
        signature, constants, aligned = {}, {}, {}
        for parameter in self.kernel.params:
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constants[(parameter.num,)] = value
                continue
            signature[parameter.name] = mangle_type(value)
            if isinstance(value, Tensor):
                aligned[(parameter.num,)] = [["tt.divisibility", 16]]
        source = GluonASTSource(self.kernel, signature, constants, aligned)
        options = {"num_warps": self.arguments["num_warps"]}
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        (folder / "kernel.ptx").write_text(made.asm["ptx"])
        done = subprocess.run(
            [ASSEMBLER, "-arch=sm_90a", "-v", "kernel.ptx", "-o", "kernel.cubin"],
            cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr


RUNS = {
    "forward": (sparse_hopper_kernels, "forward_kernel", "run_forward"),
    "forward-in-turns": (sparse_hopper_kernels, "forward_kernel", "run_forward"),
    "queries": (sparse_hopper_backward_kernels, "query_gradient_kernel", "run_query_gradient"),
    "queries-in-turns": (
        sparse_hopper_backward_kernels,
        "query_gradient_kernel",
        "run_query_gradient",
    ),
    "keys": (sparse_hopper_backward_kernels, "key_gradient_kernel", "run_key_gradient"),
}


@pytest.mark.parametrize(
    ("slots", "head_dim", "counts"), [(160, 72, [154, 143, 143]), (128, 128, None), (64, 64, None)]
)
@pytest.mark.parametrize("name", RUNS)
def test_products_stay_in_flight(
    name: str,
    slots: int,
    head_dim: int,
    counts: list[int] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, kernel, function = RUNS[name]
    launches = Launches(getattr(module, kernel))
    monkeypatch.setattr(module, kernel, launches)
    q, k = (torch.zeros(1, 1, n, slots, head_dim, dtype=torch.bfloat16) for n in (2, 3))
    lists = torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    valid = None if counts is None else torch.tensor(counts, dtype=torch.int32)
    given = {"q": q, "k": k, "v": k, "lists": lists, "valid": valid, "scale": 0.1, "grad": q}
    given |= {"lse": q[..., 0].float(), "delta": q[..., 0].float()}
    if name.endswith("in-turns"):
        choose = hopper_tiles if function == "run_forward" else hopper_query_tiles
        tiles = choose(slots, slots, head_dim)
        assert tiles is not None
        given["tiles"] = tiles._replace(turns=True)
    run = getattr(module, function)
    run(**{key: x for key, x in given.items() if key in inspect.signature(run).parameters})
    said = launches.assembled(tmp_path)
    assert "0 bytes spill stores" in said
    # What it warns of where it has to wait after every product.
    assert "serialized" not in said
