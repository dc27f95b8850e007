"""Kernels in CUDA C++ on a CPU, but those of Hopper: compiled by the host's compiler."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from torch import Tensor

from decmem.ops.cuda_module import Kernel, texts

HEADER = Path(__file__).with_name("cuda_on_cpu.h")


def _translated(source: str, name: str) -> str:
    """The source, and `go`, which launches the kernel `name`."""
    numbers = texts("numbers")
    assert "#define HALF 1" not in source
    source = source.replace(numbers, "")
    source = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
        r"\1* const \2 = (\1*)shared();",
        source,
    )
    # Copies beside what the thread does are copies.
    source = re.sub(r'asm volatile\("cp\.async\.cg.*\n', "std::memcpy(to, from, 16);\n", source)
    source = re.sub(r'asm volatile\("cp\.async\.wait_all.*?\); \}', "}", source)
    source = re.sub(
        r'asm\("cvt\.rn\.satfinite\.e4m3x2.*\n', "y = eighth(low) | eighth(high) << 8;\n", source
    )
    source = re.sub(r'asm\("cvt\.rna\.tf32.*\n', "y = tf32(x);\n", source)
    product = "multiplied(sums, keys, first, second);"
    source = re.sub(r'asm\("mma\.sync\.aligned\.m16n8k8.*?\);\n', product, source, flags=re.DOTALL)
    source = re.sub(r'extern "C" (__global__|__constant__)', "static", source)
    bare = re.sub(r"__launch_bounds__\([^)]*\) ", "", source)
    found = re.search(rf"static void \s*{name}\((.*?)\) \{{", bare, re.DOTALL)
    assert found is not None
    parameters = found[1].replace("__restrict__", "")
    names = ", ".join(re.findall(r"(\w+)\s*(?:,|$)", parameters))
    return (
        f'#include "{HEADER}"\n{source}\n'
        f'extern "C" bool go(int programs, int threads, int bytes, {parameters}) {{\n'
        "  return launch(programs, threads, shared_bytes + bytes, "
        f"[=] {{ {name}({names}); }});\n}}\n"
    )


class KernelOnCpu(Kernel):
    """A kernel that is launched as any other."""

    def __init__(self, source: str, name: str, folder: Path) -> None:  # nothing of a GPU's
        compiler = shutil.which("g++") or shutil.which("clang++")
        assert compiler is not None, "needs a C++ compiler, as torch.compile on a CPU does"
        # One that is loaded may not be written over.
        name_of_file = f"{name}-{len(list(folder.iterdir()))}"
        text, library = folder / f"{name_of_file}.cpp", folder / f"{name_of_file}.so"
        text.write_text(_translated(source, name))
        options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w"]
        subprocess.run([compiler, *options, "-o", library, text], check=True)
        self._go = ctypes.CDLL(str(library)).go
        self._go.restype = ctypes.c_bool

    def launch(self, programs: int, threads: int, more_bytes: int, *arguments: Any) -> None:
        given = [_argument(x) for x in arguments]
        assert self._go(programs, threads, more_bytes, *given), "wrote beyond the shared memory"


def _argument(x: Any) -> Any:
    if x is None or isinstance(x, Tensor):
        return ctypes.c_void_p(None if x is None else x.data_ptr())
    return ctypes.c_float(x) if isinstance(x, float) else ctypes.c_int(x)
