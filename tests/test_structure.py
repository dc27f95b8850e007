"""The house rules that a program can check; docs/architecture.md says why each is there."""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "decmem"

# A part may import from parts of a lower level, never from its own level or above. Parts that share
# a line here share a level, and do not know each other.
LEVELS = [
    ["errors"],
    ["storage", "machine", "heap", "distributed"],
    ["flow", "ops", "world", "shards"],
    ["memory", "codec", "data"],
    ["model"],
    ["engine", "guidance_pair", "saved_world", "observation"],
    ["sampler"],
    ["history"],
    ["experiment"],
    ["presets"],
    ["rollout"],
    ["training", "evaluation", "play", "bench"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}

GRAB_BAGS = {"utils", "util", "common", "helpers", "helper", "misc", "core", "lib", "tools"}
LONGEST, LONGEST_KERNELS = 400, 600
MEBIBYTE = 2**20

# Foreign package -> where alone it may be imported.
CONFINED = {
    "triton": r".*_kernels\.py",
    "av": r"data/video\.py",
    "starlette": r"play/.*",
    "fastapi": r"play/.*",
    "uvicorn": r"play/.*",
    "websockets": r"play/.*",
    "gymnasium": r"play/.*",
    "diffusers": r"codec/.*",
    "tyro": r"(cli|commands/\w+)\.py",
}
BANNED = {"torchvision", "pickle", "cPickle", "dill", "imageio", "cv2"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    """The folder or single file directly under the package that holds ``path``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, inside functions too."""
    package = ["decmem", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                yield node.lineno, f"{source}.{alias.name}"


@cache
def tracked() -> list[Path]:
    """The files of the repository that are committed or about to be."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = (ROOT / name for name in listing.split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_imports_point_one_way() -> None:
    for path in modules():
        own = part_of(path)
        if own == "__init__":
            own_level = -1  # the front door imports nothing of the package: --help stays fast
        else:
            assert own in LEVEL, f"decmem/{own} is new: give it a place in LEVELS and the docs"
            own_level = LEVEL[own]
        for line, target in imports(path):
            package, *rest = target.split(".")
            if package != "decmem" or not rest or rest[0] not in LEVEL or rest[0] == own:
                continue
            assert LEVEL[rest[0]] < own_level, (
                f"{name_of(path)}:{line} imports {target}, which lies to the left of {own}"
            )


def test_foreign_imports_stay_where_they_belong() -> None:
    for path in modules():
        for line, target in imports(path):
            package = target.split(".")[0]
            where = f"{name_of(path)}:{line}"
            assert package not in BANNED, f"{where} imports {package}, which is banned"
            place = CONFINED.get(package)
            assert place is None or re.fullmatch(place, name_of(path)), (
                f"{where} imports {package}, which belongs in decmem/{place} only"
            )


def test_torchvision_is_nowhere() -> None:
    for path in tracked():
        if path.suffix == ".py" and path != Path(__file__):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(import|from) torchvision", text, re.MULTILINE), path


def test_only_the_command_line_reads_argv() -> None:
    for path in modules():
        if name_of(path) == "cli.py":
            continue
        for node in ast.walk(tree_of(path)):
            reads = isinstance(node, ast.Attribute) and node.attr == "argv"
            assert not reads, f"{name_of(path)}:{node.lineno} reads argv: cli.py alone does"
        assert "sys.argv" not in {target for _, target in imports(path)}


def test_loading_runs_no_foreign_code() -> None:
    for path in modules():
        for call in (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            options = {option.arg: ast.unparse(option.value) for option in call.keywords}
            where = f"{name_of(path)}:{call.lineno}"
            if name == "torch.load":
                assert options.get("weights_only") == "True", f"{where}: torch.load unpickles"
            if name in {"np.load", "numpy.load"}:
                assert options.get("allow_pickle", "False") == "False", f"{where}: unpickles"
            assert name != "yaml.load", f"{where}: use yaml.safe_load"


def test_annotations_are_not_postponed() -> None:
    # jaxtyping cannot check an annotation that is a string.
    for path in modules():
        postponed = "__future__.annotations" in {target for _, target in imports(path)}
        assert not postponed, f"{name_of(path)} imports annotations from __future__"


def test_names_are_nouns_of_the_subject() -> None:
    for path in tracked():
        if path.suffix == ".py":
            words = {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
            assert not words & GRAB_BAGS, f"{path.relative_to(ROOT)}: name it after what it holds"


def test_files_stay_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    print(f"median file: {statistics.median(lengths.values()):.0f} lines")
    for path, length in lengths.items():
        ceiling = LONGEST_KERNELS if path.name.endswith("_kernels.py") else LONGEST
        assert length <= ceiling, f"{name_of(path)} has {length} lines, more than {ceiling}"


def test_every_module_has_a_docstring() -> None:
    bare = [name_of(path) for path in modules() if not ast.get_docstring(tree_of(path))]
    assert bare == []


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    # The quotes keep this file from finding itself.
    machine = re.compile(r"(?<![\w.~/])/(?:" + "|".join(["work", "root", "home"]) + r")/\w")
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = machine.search(text)
        assert not found, f"{path.relative_to(ROOT)} names a path of one machine: {found}"


def test_weights_stay_small() -> None:
    weights = {
        path: path.stat().st_size for path in tracked() if path.suffix in {".safetensors", ".npz"}
    }
    for path, size in weights.items():
        assert size <= 16 * MEBIBYTE, f"{path.relative_to(ROOT)} is larger than 16 MiB"
    assert sum(weights.values()) <= 32 * MEBIBYTE


def test_every_module_imports_without_the_extras() -> None:
    """With none of the extras installed, nothing fails but the modules that are an extra's own."""
    extras = ["triton", "tensorboard", "starlette", "uvicorn", "websockets", "gymnasium"]
    extras += ["diffusers", "torchmetrics", "lpips", "beartype", "scipy", "pytest", "numba_cuda"]
    names = [
        ".".join(["decmem", *path.relative_to(PACKAGE).with_suffix("").parts])
        for path in modules()
        if not path.name.endswith("_kernels.py") and path.name not in {"__init__.py", "__main__.py"}
        if part_of(path) != "play"
    ]
    # None in sys.modules makes an import fail as if the package were not installed.
    code = (
        "import sys, importlib\n"
        f"sys.modules.update(dict.fromkeys({extras!r}))\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
