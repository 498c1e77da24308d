"""Progress: bars on a terminal, lines elsewhere, and nothing left on the screen after an error."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from edgewright.pipeline.runs.progress import LineProgress, TerminalProgress, progress_for


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_bars_nest_and_yield_everything() -> None:
    console = terminal()
    progress = TerminalProgress(console)
    seen = []
    for outer in progress.track(range(2), "outer [x]"):
        for inner in progress.track(iter("ab"), "inner", total=2):
            seen.append((outer, inner))
        progress.say("in between [not markup]")
    assert seen == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    text = shown(console)
    assert "outer [x]" in text and "in between [not markup]" in text
    assert progress._bars is None


def test_an_error_in_a_loop_closes_the_bars() -> None:
    progress = TerminalProgress(terminal())
    loop = progress.track(range(3), "loop")
    next(loop)
    assert progress._bars is not None
    with pytest.raises(RuntimeError):
        loop.throw(RuntimeError())  # type: ignore[attr-defined]
    assert progress._bars is None
    left = progress.track(range(3), "left open")
    next(left)
    progress.close()
    progress.close()
    assert progress._bars is None


def test_lines_come_now_and_then_with_the_time_left() -> None:
    now, lines = [0.0], []
    progress = LineProgress(lines.append, seconds=30, clock=lambda: now[0])
    for _ in progress.track(range(10), "epochs"):
        now[0] += 20
    assert lines == [
        "epochs: 2 of 10, about 3 min left",
        "epochs: 4 of 10, about 2 min left",
        "epochs: 6 of 10, about 80 s left",
        "epochs: 8 of 10, about 40 s left",
        "epochs: 10 of 10, about 0 s left",
    ]
    lines.clear()
    for _ in progress.track(iter(range(2)), "unknown length"):
        now[0] += 40
    assert lines == ["unknown length: 1 done", "unknown length: 2 done"]


def test_which_progress_for_which_console() -> None:
    plain = Console(file=io.StringIO(), force_terminal=False)
    assert isinstance(progress_for(terminal()), TerminalProgress)
    lines = progress_for(plain)
    lines.say("a [line] " + "x" * 200)
    assert shown(plain) == "a [line] " + "x" * 200 + "\n"
    quiet = progress_for(plain, quiet=True)
    quiet.say("nothing")
    assert "nothing" not in shown(plain)
