"""What a person meets at the command line."""

import dataclasses
import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from decmem import __version__, cli
from decmem.errors import UserError


@dataclasses.dataclass(frozen=True)
class Fail:
    """Fail in the way named."""

    how: str = "user"
    """Which failure."""

    def run(self) -> None:
        """Fail."""
        raise {
            "user": UserError("--seed", "-1 is negative", "use 0 or more"),
            "library": UserError("how", "is how\nit fails", "do not"),
            "interrupt": KeyboardInterrupt(),
            "full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/clip.mp4"),
            "denied": PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out/clip.mp4"),
            "bug": OSError(errno.EBADF, "a bug"),
        }[self.how]


@dataclasses.dataclass(frozen=True)
class Warn:
    """Warn of something."""

    def run(self) -> None:
        """Warn."""
        logging.getLogger("decmem.data.video").warning("%s was resized", "a.mp4")


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two words and one word, so that both ways of naming a command are walked.
    monkeypatch.setattr(cli, "COMMANDS", {"world fail": Fail, "train fail": Fail, "warn": Warn})


def test_errors_are_one_line_with_the_cure(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["world", "fail"]) == 2
    assert capsys.readouterr().err == "error: --seed: -1 is negative. use 0 or more\n"


def test_an_argument_of_the_library_is_told_as_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "fail", "--how", "library"]) == 2
    assert capsys.readouterr().err == "error: --how: is how it fails. do not\n"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("full", "cannot write out/clip.mp4: the disk is full"),
        ("denied", "cannot write out/clip.mp4: no permission"),
    ],
)
def test_a_bad_place_names_the_path(
    how: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["world", "fail", "--how", how]) == 2
    text = capsys.readouterr().err
    assert text.startswith(f"error: --out: {message}")
    assert text.count("\n") == 1


def test_an_interrupt_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "fail", "--how", "interrupt"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(OSError, match="a bug"):
        cli.main(["world", "fail", "--how", "bug"])


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["warn"]) == 0
    assert cli.main(["warn"]) == 0
    assert capsys.readouterr().err == "warning: a.mp4 was resized\n" * 2


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["world", "fail", "--hoow", "user"], "--how"),
        (["wurld"], "world"),
        (["world"], "fail"),
        ([], "train"),
    ],
    ids=["flag", "group", "half", "nothing"],
)
def test_misspelt_requests_get_a_hint(
    argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert hint in capsys.readouterr().err


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from decmem.cli import main\n"
        "assert main(['--version']) == 0\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numba', 'numpy', 'av', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"decmem {__version__}\n")
    assert "usage: decmem" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_module_runs_like_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "decmem", "world", "render", "--sed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "--seed" in done.stderr
