"""The command line: the only reader of ``sys.argv``, and where errors become one line of text."""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro
from tyro.extras import SubcommandApp

from decmem import __version__
from decmem.commands import Command
from decmem.commands.bench import BenchRollout
from decmem.commands.bench_ops import BenchOps
from decmem.commands.bench_train import BenchTrain
from decmem.commands.demo import Demo
from decmem.commands.eval import Evaluate
from decmem.commands.play import Play
from decmem.commands.rollout import RollOut
from decmem.commands.train import TrainCausal, TrainCodec, TrainMemory
from decmem.commands.world import RenderWorld
from decmem.errors import UserError
from decmem.heap import keep_freed_memory
from decmem.storage import place_error

# Every command, by the words that call it, in the order `decmem --help` shows them.
COMMANDS: dict[str, Callable[..., Command]] = {
    "bench ops": BenchOps,
    "bench rollout": BenchRollout,
    "bench train": BenchTrain,
    "demo": Demo,
    "eval": Evaluate,
    "play": Play,
    "rollout": RollOut,
    "train causal": TrainCausal,
    "train codec": TrainCodec,
    "train memory": TrainMemory,
    "world render": RenderWorld,
}

# The first word of every command of two words.
GROUPS = {
    "bench": "How fast the parts are on this machine.",
    "world": "The block world: endless terrain from a seed.",
    "train": "Train the parts, from rendered worlds to weights.",
}

DESCRIPTION = """\
Worlds that remember: a video world model with decoupled memory, and the block world it lives in.

Each command explains itself: decmem COMMAND --help. The version: decmem --version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 2 a bad request, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if list(argv) == ["--version"]:
        print(f"decmem {__version__}")
        return 0
    _log_to_stderr()
    command = parse(argv)
    keep_freed_memory()
    try:
        command.run()
    except UserError as error:
        return _fail(error, command)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        explained = place_error(Path(error.filename or "output"), error)
        if explained is None:
            raise
        return _fail(explained, command)
    return 0


def parse(argv: Sequence[str]) -> Command:
    """The command that ``argv`` asks for; exits with 2 and a hint where it is misspelt."""
    app = SubcommandApp()
    groups: dict[str, SubcommandApp] = {}
    for words, command in COMMANDS.items():
        *group, name = words.split()
        if group and group[0] not in groups:
            groups[group[0]] = SubcommandApp()
            app.command(groups[group[0]], name=group[0], help=GROUPS[group[0]])
        (groups[group[0]] if group else app).command(name=name)(command)
    return app.cli(
        prog="decmem",
        description=DESCRIPTION,
        args=argv,
        config=(tyro.conf.OmitArgPrefixes,),
    )


class _StderrHandler(logging.Handler):
    """One line per message, to whatever ``sys.stderr`` is now: progress bars replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        print(f"{level}{record.getMessage()}", file=sys.stderr)


def _log_to_stderr() -> None:
    logger = logging.getLogger("decmem")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())


def _fail(error: UserError, command: Command) -> int:
    text = " ".join(str(error).split())
    # The library names its own argument; where that is a flag of this command, say so.
    if hasattr(command, error.argument):
        text = "--" + error.argument.replace("_", "-") + text.removeprefix(error.argument)
    print(f"error: {text}", file=sys.stderr)
    return 2
