"""Progress and log lines: plain in a pipe, bars on a terminal, nothing when quiet; stdout is left alone."""

import io
import logging

import pytest
from rich.console import Console

from dynamize.cli import console
from dynamize.errors import DynamizeError

LOG = logging.getLogger("dynamize")


def test_pipe_gets_one_plain_line_a_loop(capsys: pytest.CaptureFixture[str]) -> None:
    with console.reporting(quiet=False) as progress:
        assert list(progress(range(3), "epoch 1/2", 3)) == [0, 1, 2]
        LOG.info("step done")
        LOG.warning("careful")
    captured = capsys.readouterr()
    first, second, third = captured.err.splitlines()
    assert first.startswith("epoch 1/2: 3/3 in ")
    assert first.endswith("/s")
    assert (second, third) == ("step done", "warning: careful")
    assert captured.out == ""


@pytest.mark.parametrize(("quiet", "rank"), [(True, "0"), (False, "1")])
def test_quiet_and_other_processes_say_errors_only(
    quiet: bool, rank: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    with console.reporting(quiet=quiet) as progress:
        assert list(progress(range(3), "epoch 1/2", 3)) == [0, 1, 2]
        LOG.warning("careful")
        LOG.error("broken")
    assert capsys.readouterr().err == "error: broken\n"


def test_terminal_gets_a_bar_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80)
    monkeypatch.setattr(console, "_stderr", lambda: terminal)
    with console.reporting(quiet=False) as progress:
        for i in progress(range(30), "distill: epoch 1/2", 30):
            if i == 20:
                LOG.info("a line above the bar")
                terminal._live_stack[-1].refresh()
    shown = screen.getvalue()
    assert "distill: epoch 1/2" in shown
    assert "20/30" in shown
    assert "/s" in shown
    assert "0:00:0" in shown
    assert "a line above the bar" in shown


def test_a_loop_that_fails_takes_its_bar_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(console, "_stderr", lambda: terminal)
    handlers = list(LOG.handlers)
    with pytest.raises(DynamizeError), console.reporting(quiet=False) as progress:  # noqa: PT012
        for _ in progress(range(3), "epoch", 3):
            raise DynamizeError("no")
    assert not terminal._live_stack
    assert LOG.handlers == handlers


def test_errors_are_red_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    console.complain("no [file] here")
    assert capsys.readouterr().err == "error: no [file] here\n"
    screen = io.StringIO()
    monkeypatch.setattr(console, "_stderr", lambda: Console(file=screen, force_terminal=True, color_system="standard"))
    console.complain("no")
    assert screen.getvalue().startswith("\x1b[31merror: no")


def test_json_refuses_what_is_no_json() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        console.show_json({"nan": float("nan")})
