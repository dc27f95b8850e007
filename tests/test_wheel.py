"""What is installed from a built wheel works away from the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from decmem import __version__

ROOT = Path(__file__).parent.parent
PACKAGED = {".cu", ".py", ".typed", ".safetensors", ".json", ".md", ".html", ".css", ".js", ".svg"}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    environment = (
        os.environ | {"OMP_NUM_THREADS": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    )
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def committed() -> list[str]:
    return run("git", "ls-files", "decmem", cwd=ROOT).splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of what git tracks, built with the setuptools that is here: no network."""
    source = tmp_path_factory.mktemp("source")
    for name in [*committed(), "pyproject.toml", "README.md", "LICENSE"]:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    run(*pip, "--wheel-dir", "dist", ".", cwd=source)
    return next((source / "dist").glob("decmem-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the installed package."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    run(*pip, "--target", target, wheel, cwd=target)
    # Compiling the world takes longest. Machine code is kept under a digest of the world's sources:
    # what the repository has compiled serves here if, and only if, they arrived unchanged.
    ours, theirs = ROOT / "decmem/world/__pycache__", target / "decmem/world/__pycache__"
    theirs.mkdir(exist_ok=True)
    for kept in [*ours.glob("*.nbi"), *ours.glob("*.nbc")]:
        shutil.copy(kept, theirs)
    return target


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {name for name in committed() if Path(name).suffix in PACKAGED}
    assert wanted - held == set()
    others = {name for name in held - wanted if ".dist-info/" not in name}
    assert others == set()
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_installed_package_runs(installed: Path, tmp_path: Path) -> None:
    code = "import decmem; print(decmem.__file__)"
    assert Path(run(sys.executable, "-c", code, cwd=tmp_path, path=installed)).is_relative_to(
        installed
    )
    said = run(sys.executable, "-m", "decmem", "--version", cwd=tmp_path, path=installed)
    assert said == f"decmem {__version__}\n"


def test_installed_demo_runs(installed: Path, tmp_path: Path) -> None:
    demo = [sys.executable, "-m", "decmem", "demo", "--preset", "tiny", "--out", "demo"]
    run(*demo, "--seconds", "1.6", "--episodes", "1", cwd=tmp_path, path=installed)
    for name in ["demo.mp4", "contact_sheet.png", "psnr.png", "report.json"]:
        assert (tmp_path / "demo" / name).stat().st_size > 0
