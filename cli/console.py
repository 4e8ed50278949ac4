"""What people and machines see: results on stdout, progress and errors on stderr."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.text import Text

T = TypeVar("T")
Reporter = Callable[[Iterable[Any], str, int], Iterable[Any]]
_log = logging.getLogger("dynamize")


def show(*parts: RenderableType) -> None:
    """Print rich renderables to stdout, each from a new line on."""
    Console(highlight=False, markup=False, emoji=False).print(*parts, sep="\n")


def show_json(value: Any) -> None:
    """Print one JSON document to stdout."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))


def complain(text: str) -> None:
    """Print an error to stderr, in red where that is a terminal."""
    _stderr().print(Text(f"error: {text}", style="red"), soft_wrap=True)


def warn(text: str) -> None:
    """Print to stderr what makes a result worth little, in yellow where that is a terminal."""
    _stderr().print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)


@contextmanager
def reporting(quiet: bool) -> Iterator[Reporter]:
    """What the library logs goes to stderr, and loops wrapped by the yielded reporter show how far they are.

    A terminal gets bars with rate and time left, a pipe one plain line a loop. ``quiet`` and all processes but the
    first show neither.
    """
    silent = quiet or os.environ.get("RANK", "0") != "0"
    console = _stderr()
    handler = _Handler(console, logging.ERROR if silent else logging.INFO)
    before = _log.level, _log.propagate
    _log.addHandler(handler)
    _log.setLevel(handler.level)
    _log.propagate = False
    try:
        if silent:
            yield _nothing
        elif console.is_terminal:
            with _bars(console) as bars:
                yield bars
        else:
            yield _lines
    finally:
        _log.removeHandler(handler)
        _log.setLevel(before[0])
        _log.propagate = before[1]


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)


class _Handler(logging.Handler):
    """Log records as plain lines, above a bar where there is one."""

    def __init__(self, console: Console, level: int) -> None:
        super().__init__(level)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        loud = record.levelno >= logging.WARNING
        style, prefix = ("yellow", f"{record.levelname.lower()}: ") if loud else ("", "")
        self.console.print(Text(prefix + record.getMessage(), style=style), soft_wrap=True)


def _nothing(items: Iterable[T], label: str, total: int) -> Iterable[T]:
    return items


def _lines(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    started, done = time.monotonic(), 0
    for item in items:
        yield item
        done += 1
    seconds = time.monotonic() - started
    _log.info("%s: %d/%d in %.1f s, %.1f/s", label, done, total, seconds, done / max(seconds, 1e-9))


@contextmanager
def _bars(console: Console) -> Iterator[Reporter]:
    from rich import progress as rich_progress

    class Rate(rich_progress.ProgressColumn):
        def render(self, task: rich_progress.Task) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "", style="dim")

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(bar_width=None),
        rich_progress.MofNCompleteColumn(),
        Rate(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True) as bars:

        def advance(items: Iterable[T], label: str, total: int) -> Iterator[T]:
            task = bars.add_task(label, total=total)
            try:
                for item in items:
                    yield item
                    bars.advance(task)
            finally:
                bars.remove_task(task)

        yield advance
