"""The README tells the truth: its marked blocks run, its tree is the tree.

`<!-- test -->` on the line before a ```sh or ```python block has the block run here, in an empty
folder. The tree under `<!-- tree -->` is the first line of every file's docstring; after adding or
renaming a file, bring it up to date with `python tests/test_readme.py`.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"<!-- test -->\n```(sh|python)\n(.*?)```", re.DOTALL)
TREE = re.compile(r"(<!-- tree -->\n```\n)(.*?)(```)", re.DOTALL)
DESCRIPTION_COLUMN = 30


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall(README.read_text(encoding="utf-8"))


def describe(path: Path) -> str:
    """The first line of a module's or package's docstring."""
    source = path / "__init__.py" if path.is_dir() else path
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].replace("``", "").rstrip(".")


def tree() -> str:
    """The package, two levels deep, a line a file."""
    listing = subprocess.run(
        ["git", "ls-files", "decmem"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    files = [ROOT / name for name in listing.splitlines() if name.endswith(".py")]
    files = [path for path in files if path.exists() and path.name != "__init__.py"]
    top = {path for path in files if path.parent == ROOT / "decmem"}
    folders = {path.parent for path in files if path.parent.parent == ROOT / "decmem"}
    lines = ["decmem/"]
    for entry in sorted(top) + sorted(folders):
        name = f"├── {entry.name}{'/' if entry.is_dir() else ''}"
        lines.append(f"{name:<{DESCRIPTION_COLUMN}}{describe(entry)}")
        for path in sorted(path for path in files if path.parent == entry):
            lines.append(f"{f'│   ├── {path.name}':<{DESCRIPTION_COLUMN}}{describe(path)}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(("language", "code"), blocks())
def test_marked_blocks_run(language: str, code: str, tmp_path: Path) -> None:
    shell = ["bash", "-euo", "pipefail", "-c", code]
    command = shell if language == "sh" else [sys.executable, "-W", "error", "-c", code]
    here = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{here}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_tree_is_the_tree() -> None:
    printed = TREE.search(README.read_text(encoding="utf-8"))
    assert printed, "the README has no tree"
    assert printed.group(2) == tree(), "the tree changed: run `python tests/test_readme.py`"


def test_named_files_exist() -> None:
    """Every link to a file, in the README and the documents, leads somewhere."""
    for page in [README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_exist() -> None:
    rules = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for page in [README, ROOT / "CONTRIBUTING.md"]:
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text("utf-8"), re.MULTILINE))
        assert named <= rules, f"{page.name} names unknown targets"


if __name__ == "__main__":
    README.write_text(
        TREE.sub(lambda found: found[1] + tree() + found[3], README.read_text(encoding="utf-8")),
        encoding="utf-8",
    )
