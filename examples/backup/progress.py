"""What people and programs see of a backup or a restore while it runs.

On a terminal: a bar, with rate and remaining time. With `--json`: one object a line on stdout. Else
a line now and then, for logs. What is skipped is named on stderr in any case.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import trio

from .errors import display
from .tree import Skipped

# Seconds between two looks: what an eye takes for movement; what a program may want; what a log
# is for.
TERMINAL_INTERVAL, JSON_INTERVAL, LOG_INTERVAL = 0.1, 1.0, 30.0


class Counts(Protocol):
    """How far something is; see `reader.Progress` and `plan.Restoring`."""

    @property
    def files(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def unchanged(self) -> int: ...
    @property
    def path(self) -> bytes: ...


class Reporter:
    """Reports one run.

    Args:
        what: "backup" or "restore".
        as_json: Whether a program is reading.

    Attributes:
        wants_total: Whether a total is of use to it.
    """

    def __init__(self, what: str, *, as_json: bool) -> None:
        self._what = what
        self._as_json = as_json
        self._counts: Counts | None = None
        self._begin = time.perf_counter()
        self._total: tuple[int, int] | None = None
        self._console: Callable[[str], None] | None = None
        self.wants_total = sys.stderr.isatty() and not as_json

    def watch(self, event: Counts | Skipped) -> None:
        """Takes what is skipped, or the object that always says how far it is."""
        if not isinstance(event, Skipped):
            self._counts = event
            return
        line = f"skipped {display(event.path)}: {display(event.reason.encode())}"
        if self._console is not None:
            self._console(line)
        else:
            print(line, file=sys.stderr)
        if self._as_json:
            self._emit(event="skipped", path=display(event.path), reason=event.reason)

    def expect(self, files: int, size: int) -> None:
        """Takes the totals, in files and bytes."""
        self._total = files, size

    async def run(self) -> None:
        """Reports until it is cancelled."""
        if self.wants_total:
            with self._bar() as update:
                while True:
                    update()
                    await trio.sleep(TERMINAL_INTERVAL)
        while True:
            await trio.sleep(JSON_INTERVAL if self._as_json else LOG_INTERVAL)
            if self._counts is not None:
                self._line(self._counts)

    def _line(self, counts: Counts) -> None:
        seconds = time.perf_counter() - self._begin
        if self._as_json:
            self._emit(
                event="progress",
                files=counts.files,
                unchanged=counts.unchanged,
                bytes=counts.size,
                seconds=round(seconds, 1),
            )
        else:
            rate = size(round(counts.size / seconds))
            line = f"{counts.files:,} files, {size(counts.size)}, in {seconds:.0f} s ({rate}/s)"
            print(f"{self._what}: {line}", file=sys.stderr)

    def _emit(self, **event: str | int | float) -> None:
        print(json.dumps(event), flush=True)

    @contextmanager
    def _bar(self) -> Iterator[Callable[[], None]]:
        # Here, since importing it takes 60 ms, which only terminals need.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        console = Console(stderr=True, highlight=False, markup=False)
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[files]}"),
            console=console,
            transient=True,
            auto_refresh=False,  # no thread of its own: `run` is asked often enough
        )
        task = bar.add_task(self._what, total=None, files="")

        def update() -> None:
            counts = self._counts
            if counts is not None:
                files = f"{counts.files:,} files"
                if self._total is not None:
                    files = f"{counts.files:,}/{self._total[0]:,} files"
                total = None if self._total is None else max(self._total[1], counts.size)
                bar.update(task, completed=counts.size, total=total, files=files)
            bar.refresh()

        with bar:
            self._console = console.print
            try:
                yield update
            finally:
                update()
                self._console = None


def size(count: int) -> str:
    """Returns a number of bytes for people."""
    value, units = float(count), iter(("kB", "MB", "GB", "TB", "PB", "EB"))
    if value < 1000:
        return f"{count} B"
    while value >= 1000:
        value, unit = value / 1000, next(units)
    return f"{value:.1f} {unit}"
