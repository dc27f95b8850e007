"""The machine and commit lines of a report."""

import importlib.metadata
import json
import subprocess
from pathlib import Path

import pytest
import torch

from decmem import machine


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "decmem"
    folder.mkdir()
    (folder / "__init__.py").write_text("one = 1\n")
    git(tmp_path, "init", "-q")
    return folder


def test_machine_is_described_in_plain_values() -> None:
    described = machine.describe_machine(torch.device("cpu"))
    assert json.loads(json.dumps(described)) == described
    assert described["gpu"] is None
    assert described["threads"] == torch.get_num_threads()
    assert isinstance(described["cpu"], str)
    assert described["cpu"]


def test_commit_of_a_checkout_says_when_the_code_differs(package: Path) -> None:
    git(package, "add", "__init__.py")
    git(package, "commit", "-qm", "first")
    commit = git(package, "rev-parse", "--short=12", "HEAD")
    assert machine.code_commit(package) == commit
    (package / "__init__.py").write_text("two = 2\n")
    assert machine.code_commit(package) == f"{commit}-modified"


def test_a_repository_that_does_not_track_the_package_is_not_asked(package: Path) -> None:
    (package.parent / "other.txt").write_text("x")
    git(package.parent, "add", "other.txt")
    git(package.parent, "commit", "-qm", "not ours")
    assert machine.code_commit(package) == importlib.metadata.version("decmem")


def test_unknown_when_there_is_neither(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert machine.code_commit(package) == "unknown"
