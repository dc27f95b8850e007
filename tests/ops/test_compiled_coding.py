"""Coding of heads by Triton's compiler: the interpreter lets pass what it refuses. No GPU."""

import inspect
from importlib.util import find_spec
from typing import Any

import pytest

if find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from decmem.ops import coding_kernels

INTEGERS = {"N", "T", "S", "TOKENS", "H"}
SMALL = {
    "GAINS", "QUERY_MATRIX", "KEY_MATRIX", "MATRIX", "SPACE_COS", "SPACE_SIN", "SURFACE_COS",
    "SURFACE_SIN", "TIME_COS", "TIME_SIN", "GAIN_PARTS", "COS_GRAD", "SIN_GRAD",
}  # fmt: skip
SHAPE = {
    "D": 72, "WIDTH": 128, "ROWS": 8, "E": 32, "CAMERA": 24, "SPACE": 16, "SURFACE": 12, "TIME": 20,
    "TURNED": True, "NORMED": True, "VALUES": True, "GATED": True, "EPS": 1e-6,
}  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["encode", "encode_gradient", "decode", "decode_gradient"])
def test_kernels_compile(name: str, packed: bool) -> None:
    kernel = getattr(coding_kernels, f"_{name}_kernel")
    kinds = {"TIMED": packed, "LOCAL": not packed, "HEADS_LAST": not packed, "PER_HEAD": packed}
    known: dict[str, Any] = SHAPE | kinds | {"PACKED": packed}
    if not packed:
        known |= {"SOURCE": None, "KEPT": None}
    if name.startswith("decode"):
        del known["LOCAL"]  # what is decoded has that name there
    types = {}
    for x in inspect.signature(kernel.fn).parameters:
        numbers = "*i64" if x in ("SOURCE", "KEPT") else "*fp32" if x in SMALL else "*bf16"
        types[x] = "constexpr" if x in known else "i32" if x in INTEGERS else numbers
    source = ASTSource(kernel, types, {x: known[x] for x in types if x in known})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
