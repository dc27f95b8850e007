"""The phases of a run against the live page: each has a limit, and says how long it took."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable


class Overdue(Exception):
    """Something did not come within its limit: what was waited for, and how long."""


def say(text: str) -> None:
    """To whoever watches; of a run that is cut off, this is what is left."""
    print(text, file=sys.stderr, flush=True)


class Phases:
    """What a run has done so far.

    Attributes:
        took: seconds of every phase that began, the one that broke off included.
    """

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.took: dict[str, float] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.begun

    @contextlib.asynccontextmanager
    async def phase(
        self, name: str, limit: float, missing: Callable[[], str] = str
    ) -> AsyncIterator[None]:
        """A phase that may take `limit` seconds; `missing` tells what it still waits for then.

        Raises:
            Overdue: when it took longer.
        """
        started = time.monotonic()
        say(f"[{self.elapsed:6.1f} s] {name}: begins, may take {limit:.0f} s")
        how = "broke off"
        try:
            async with asyncio.timeout(limit):
                yield
            how = "done"
        except TimeoutError:
            how, what = "overdue", missing()
            told = f"{name} took longer than {limit:.0f} s{what and ': ' + what}"
            raise Overdue(told) from None
        finally:
            self.took[name] = round(time.monotonic() - started, 2)
            say(f"[{self.elapsed:6.1f} s] {name}: {how} after {self.took[name]:.1f} s")


async def until(condition: Callable[[], object], every: float = 0.02) -> None:
    """Back when it is true; for the time limit of a phase to end."""
    while not condition():
        await asyncio.sleep(every)
