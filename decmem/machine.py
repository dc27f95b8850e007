"""Where a figure came from: the machine that computed it and the commit of the code."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import decmem


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def usable_cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_machine(device: torch.device) -> dict[str, str | int | None]:
    """Processor, cores this process may use, threads PyTorch uses, versions, and the GPU's name
    (None when ``device`` is not CUDA)."""
    return {
        "device": device.type,
        "cpu": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def code_commit(package: Path | None = None) -> str:
    """The commit the code runs from, with ``-modified`` when tracked files of the package differ
    from it; outside a checkout the package's version; ``unknown`` if there is neither."""
    folder = package or Path(decmem.__file__).parent
    # An environment may lie inside somebody else's repository: only a repository that tracks
    # this very package speaks for it.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is not None:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        if commit:
            changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
            return f"{commit}-modified" if changed else commit
    try:
        return importlib.metadata.version("decmem")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
