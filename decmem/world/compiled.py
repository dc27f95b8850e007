"""The one way this package compiles Python to machine code on the CPU."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba


@cache
def _package_digest() -> str:
    """SHA-256 over every source file of the package."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def compiled(function: Callable[..., Any]) -> Any:
    """Compile `function` with numba: no GIL, no fast-math, machine code kept between processes.

    Numba keys its cache by the file of the function alone, so a changed callee in another file
    would go unnoticed; the digest of the whole package is the key here.
    """
    dispatcher = numba.njit(function, nogil=True, cache=True, error_model="numpy")
    cache_file = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if cache_file is not None:
        cache_file._source_stamp = _package_digest()
    return dispatcher
