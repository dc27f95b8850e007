"""One file per command of the command line.

A command is a frozen dataclass: its fields are the flags, its docstrings the help, and ``run``
does the work. Register it in ``decmem.cli.COMMANDS``. Heavy modules (torch, numba, the world) are
imported inside ``run``, so that ``decmem --help`` answers at once.
"""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Command(Protocol):
    """What the command line needs of a command."""

    def run(self) -> None:
        """Do the work; raise ``UserError`` for anything the user can mend."""
        ...
