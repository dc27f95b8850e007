"""What a run says of itself: JSON lines always, a progress bar for people."""

import json
import math
import time
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from decmem.storage import atomic_file


class TrainingLog:
    """Writes `log.jsonl` (one line per report) and draws progress; silent unless `active`.

    A run that goes on from `step`, after `spent` seconds, keeps what was written until then.
    """

    def __init__(
        self, run: Path, title: str, active: bool, step: int = 0, spent: float = 0.0
    ) -> None:
        self.active = active
        self.started = time.monotonic() - spent
        if not active:
            return
        run.mkdir(parents=True, exist_ok=True)
        path = run / "log.jsonl"
        if path.exists():
            _drop_later(path, step)
        self._file = path.open("a", encoding="utf-8")
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn(title),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=1.0, note="")
        self._bar.start()
        self._plain = not console.is_terminal
        self._console = console
        self._said = -math.inf

    def report(self, step: int, progress: float, values: dict[str, float]) -> None:
        """One line of figures."""
        if not self.active:
            return
        entry = {"step": step, "seconds": round(time.monotonic() - self.started, 2)}
        entry |= {k: round(v, 6) if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        note = " ".join(f"{k} {v:.4g}" for k, v in values.items())
        self._bar.update(self._task, completed=progress, note=f"step {step} {note}")
        # A pipe gets a line now and then instead of a bar.
        if self._plain and entry["seconds"] - self._said > 10:
            self._said = entry["seconds"]
            line = f"{progress:6.1%} step {step} {note} ({self._said:.0f} s)"
            self._console.print(line, soft_wrap=True)  # one line, however long

    def close(self) -> None:
        if self.active:
            self._bar.stop()
            self._file.close()


def _drop_later(path: Path, step: int) -> None:
    """Removes the lines after `step`: those steps are made again, and would stand there twice."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # a process that was killed may have written half a line
            continue
        if entry["step"] <= step:
            kept.append(line + "\n")
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
