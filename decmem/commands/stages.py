"""Progress of long commands: a bar with the time left for everything that is reported."""

import contextlib
from collections.abc import Callable, Iterator

Watch = Callable[[str, int, int], None]


@contextlib.contextmanager
def stage_bars(single: bool = False) -> Iterator[Watch]:
    """Give a function ``(stage, done, total)`` that draws on stderr while the block runs.

    Every stage gets a bar of its own; with ``single`` all share one whose text is the stage. A
    piped or redirected stderr gets no bars.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def watch(stage: str, done: int, total: int) -> None:
            key = "" if single else stage
            if key not in tasks:
                tasks[key] = progress.add_task(stage, total=total)
            progress.update(tasks[key], description=stage, completed=done, total=total)

        yield watch
