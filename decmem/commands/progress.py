"""The progress bar of every command."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield ``items`` and show how far along they are, with the time left, on stderr.

    A piped or redirected stderr gets no bar. ``total`` is needed where ``items`` has no length.
    """
    from rich.console import Console
    from rich.progress import track as bar

    console = Console(stderr=True)
    return iter(bar(items, description, total, console=console, disable=not console.is_terminal))


@contextlib.contextmanager
def busy(description: str) -> Iterator[None]:
    """Show that something is going on whose end cannot be foretold; nothing when piped."""
    from rich.console import Console

    with Console(stderr=True).status(description):
        yield
