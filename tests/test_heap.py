"""Freed memory is kept for what comes next."""

import ctypes
import platform
from types import SimpleNamespace

import pytest

from decmem.heap import keep_freed_memory


def test_the_c_library_is_told_what_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[int, int] = {}

    def mallopt(option: int, size: int) -> int:
        told[option] = size
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    assert keep_freed_memory()
    # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h, the latter at most 32 MiB.
    assert told == {-1: 2**30, -3: 2**25}


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not keep_freed_memory()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_glibc_takes_the_advice() -> None:
    assert keep_freed_memory()
