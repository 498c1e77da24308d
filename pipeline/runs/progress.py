"""How far long work has come: bars with the time left on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

T = TypeVar("T")


class TerminalProgress:
    """A `Progress` that draws nested bars, and text above them.

    Args:
        console: default standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars: Bars | None = None
        self._open = 0

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yields `items` under a bar; the bar goes when they end, however they end."""
        bars = self._started()
        task = bars.add_task(escape(description), total=_length(items, total))
        self._open += 1
        try:
            for item in items:
                yield item
                bars.advance(task)
        finally:
            bars.remove_task(task)
            self._open -= 1
            if self._open == 0:
                self.close()

    def say(self, text: str) -> None:
        """One line above the bars."""
        self._console.print(text, style="dim", markup=False, highlight=False)

    def close(self) -> None:
        """Takes the bars off the screen; for loops that an error left in the middle."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _started(self) -> Bars:
        if self._bars is None:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bars.start()
        return self._bars


class LineProgress:
    """A `Progress` for logs: every `seconds` at most one line about the loop that is running.

    Args:
        write: takes one line.
        seconds: least time between two lines of a loop.
        clock: in seconds.
    """

    def __init__(
        self, write: Callable[[str], None], seconds: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._seconds, self._clock = write, seconds, clock

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        """Yields `items`."""
        whole = _length(items, total)
        start = said = self._clock()
        for done, item in enumerate(items, start=1):
            yield item
            now = self._clock()
            if now - said >= self._seconds:
                said = now
                self._write(f"{description}: {_share(done, whole, now - start)}")

    def say(self, text: str) -> None:
        """Writes one line."""
        self._write(text)

    def close(self) -> None:
        """Nothing is open."""


def progress_for(console: Console, quiet: bool = False) -> TerminalProgress | LineProgress:
    """Bars if `console` is a terminal, lines otherwise, nothing if `quiet`."""
    if quiet:
        return LineProgress(lambda _line: None)
    if console.is_terminal:
        return TerminalProgress(console)
    return LineProgress(lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))


def _length(items: Iterable[T], total: int | None) -> int | None:
    return len(items) if total is None and isinstance(items, Sized) else total


def _share(done: int, whole: int | None, seconds: float) -> str:
    if not whole:
        return f"{done} done"
    left = seconds / done * (whole - done)
    return (
        f"{done} of {whole}, about {left:.0f} s left"
        if left < 120
        else f"{done} of {whole}, about {left / 60:.0f} min left"
    )
