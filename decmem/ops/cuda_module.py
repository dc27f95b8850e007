"""CUDA C++ as an operator's backend: compiled when first needed, launched on PyTorch's streams.

NVRTC, the compiler, comes with every PyTorch for CUDA. Compiling takes a second or two and, like
all first calls, must not happen inside the recording of a CUDA graph; launching may.
"""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

import torch
from cuda.bindings import driver, nvrtc  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor


class CompileError(RuntimeError):
    """What the compiler said."""


def _checked(result: tuple) -> Any:
    """The values of a call of the driver or the compiler, whose status comes first."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"{type(status).__name__}: {status.name}")
    return values[0] if len(values) == 1 else values


@functools.cache
def compiler_found() -> bool:
    """Whether there is a compiler, and a PyTorch that is not for other GPUs."""
    try:
        return torch.version.hip is None and not int(nvrtc.nvrtcVersion()[0])
    except (OSError, RuntimeError):  # what the bindings raise where the library is missing
        return False


def texts(*names: str) -> str:
    """The sources NAME_cuda.cu, one after the other."""
    files = (resources.files("decmem.ops").joinpath(f"{name}_cuda.cu") for name in names)
    return "".join(file.read_text(encoding="utf-8") for file in files)


def defined(constants: Mapping[str, int | str]) -> str:
    """What a source takes as known."""
    return "".join(f"#define {name} {value}\n" for name, value in constants.items())


class Compiled(NamedTuple):
    """Machine code, and the assembler's remarks: registers, what it moved to slow memory."""

    code: bytes
    remarks: str


def compiled(source: str, architecture: str) -> Compiled:
    """Machine code for `architecture`, such as "sm_90a". Needs no GPU.

    Raises:
        CompileError: with the compiler's messages, if the source is wrong.
    """
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    options = [f"--gpu-architecture={architecture}".encode(), b"-std=c++17", b"--ptxas-options=-v"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    remarks = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
    _checked(nvrtc.nvrtcGetProgramLog(program, remarks))
    text = remarks.rstrip(b"\0").decode(errors="replace")
    if int(status):
        raise CompileError(text)
    code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return Compiled(bytes(code), text)


def _enter(device: torch.device) -> None:
    """Makes the driver's current context that of `device`: a fresh thread has none."""
    torch.cuda.init()
    wanted = _checked(driver.cuDevicePrimaryCtxRetain(device.index))
    if int(_checked(driver.cuCtxGetCurrent())) != int(wanted):
        _checked(driver.cuCtxSetCurrent(wanted))


class Kernel:
    """The function `name` of machine code, loaded on `device`.

    `constant` names an int in the code that says how much shared memory, in bytes, it needs.
    """

    def __init__(self, compiled: Compiled, name: str, constant: str, device: torch.device) -> None:
        _enter(device)
        self.device = device
        self._module = _checked(driver.cuModuleLoadData(compiled.code))
        self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
        where, size = _checked(driver.cuModuleGetGlobal(self._module, constant.encode()))
        value = ctypes.c_int()
        _checked(driver.cuMemcpyDtoH(ctypes.addressof(value), where, size))
        self.shared_bytes = value.value
        most = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        self.room = _checked(driver.cuDeviceGetAttribute(most, device.index)) - self.shared_bytes
        dynamic = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self._function, dynamic, self.shared_bytes + self.room))

    def launch(
        self, programs: int, threads: int, more_bytes: int, *arguments: Any, early: bool = False
    ) -> None:
        """On the current stream; `more_bytes` of shared memory beside what the code asks for.

        Arguments are tensors (their address), None (a null pointer), ints, floats and boxes.
        `early`: programs may begin where the kernel launched just before leaves multiprocessors
        idle, once all of its programs have begun (`let_next_begin`, hopper_cuda.cu); what they read
        must have been there before that kernel began, and they may not end before it
        (`end_after_last`).
        """
        _enter(self.device)
        held = [_argument(x) for x in arguments]
        places = (ctypes.c_void_p * len(held))(*(_address(x) for x in held))
        stream = torch.cuda.current_stream(self.device).cuda_stream
        launch = driver.CUlaunchConfig()
        launch.gridDimX, launch.gridDimY, launch.gridDimZ = programs, 1, 1
        launch.blockDimX, launch.blockDimY, launch.blockDimZ = threads, 1, 1
        launch.sharedMemBytes, launch.hStream = self.shared_bytes + more_bytes, stream
        launch.attrs, launch.numAttrs = ([_early()], 1) if early else ([], 0)
        _checked(driver.cuLaunchKernelEx(launch, self._function, ctypes.addressof(places), 0))


@functools.cache
def _early() -> Any:
    """What tells the driver that a kernel may begin before the last one has ended."""
    value, attribute = driver.CUlaunchAttributeValue(), driver.CUlaunchAttribute()
    value.programmaticStreamSerializationAllowed = 1
    kinds = driver.CUlaunchAttributeID
    attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value = value
    return attribute


def _argument(x: Any) -> Any:
    if x is None or isinstance(x, Tensor):
        return ctypes.c_void_p(0 if x is None else x.data_ptr())
    if isinstance(x, int):
        return ctypes.c_int(x)
    return ctypes.c_float(x) if isinstance(x, float) else x


def _address(x: Any) -> int:
    return x.address if isinstance(x, BoxMap) else ctypes.addressof(x)


class BoxMap(NamedTuple):
    """Maps for the bulk copy engine, as a kernel takes them, and the memory that holds them."""

    address: int
    memory: Any


_MAP_BYTES, _MAP_ALIGNMENT = 128, 64


def box_map(x: Tensor, lines: int, columns: int, heights: Sequence[int], width: int) -> BoxMap:
    """`lines` x `columns` 16-bit numbers from the start of `x` on, for the bulk copy engine: a map
    for each height, in lines, of boxes `width` columns wide.

    Their rows of 32, 64 or 128 bytes are swizzled as the tensor cores want them, with zeros where
    a box reaches beyond the lines or columns.
    """
    kinds, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    half = kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
    kind = half if x.dtype == torch.float16 else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    swizzle = getattr(swizzles, f"CU_TENSOR_MAP_SWIZZLE_{2 * width}B")
    promotion = driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B
    # The bindings' own structure does not lie where the driver wants it: on a multiple of 64.
    memory = ctypes.create_string_buffer(_MAP_BYTES * len(heights) + _MAP_ALIGNMENT)
    address = -(-ctypes.addressof(memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
    sizes, pitch = (ctypes.c_uint64 * 2)(columns, lines), (ctypes.c_uint64 * 1)(2 * columns)
    every = (ctypes.c_uint32 * 2)(1, 1)
    plain = 0  # neither interleaved nor filled with anything but zeros
    for i, height in enumerate(heights):
        shape = (ctypes.c_uint32 * 2)(width, height)
        status = _driver_library().cuTensorMapEncodeTiled(
            ctypes.c_void_p(address + _MAP_BYTES * i), int(kind), 2, ctypes.c_void_p(x.data_ptr()),
            sizes, pitch, shape, every, plain, int(swizzle), int(promotion), plain,
        )  # fmt: skip
        _checked((driver.CUresult(status),))
    return BoxMap(address, memory)


@functools.cache
def _driver_library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
