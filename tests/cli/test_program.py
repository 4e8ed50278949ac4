"""The program as a whole: quick without torch, help for every verb, errors of usage."""

import subprocess
import sys
from pathlib import Path

import pytest
from commandline import Cli

VERBS = ["run", "inspect", "report", "suggest", "bench", "calibrate", "predict", "export", "transforms", "recipes"]
COMMANDS = [[verb] for verb in VERBS] + [["recipes", "list"], ["recipes", "show"]]


def imported_by(*arguments: str) -> set[str]:
    """Top-level modules that the command has imported when it ends."""
    code = (
        "import sys, atexit; sys.argv = ['dynamize', *sys.argv[1:]]\n"
        "atexit.register(lambda: print('\\nMODULES', *{name.split('.')[0] for name in sys.modules}))\n"
        "from dynamize.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    return set(done.stdout.rpartition("MODULES")[2].split())


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["recipes", "list"]])
def test_without_torch(arguments: list[str]) -> None:
    modules = imported_by(*arguments)
    assert "typer" in modules
    assert "torch" not in modules
    assert "numpy" not in modules


def test_report_does_not_import_torch(finished_run: Path) -> None:
    modules = imported_by("report", str(finished_run))
    assert "rich" in modules
    assert "torch" not in modules


def test_help_takes_little_processor_time() -> None:
    code = (
        "import os, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'dynamize', '--help'], stdout=subprocess.DEVNULL)\n"
        "times = os.times(); print(times.children_user + times.children_system)"
    )
    spent = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    assert min(spent) < 0.3


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_80_columns_and_shows_an_example(command: list[str], cli: Cli) -> None:
    text = cli(*command, "--help").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert f"dynamize {' '.join(command)}" in " ".join(text.split())
    assert "Example: dynamize" in " ".join(text.split())


def test_all_verbs_are_listed_in_their_order(cli: Cli) -> None:
    text = cli("--help").stdout
    places = [text.index(f"│ {verb} ") for verb in VERBS]
    assert places == sorted(places)


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout.startswith("dynamize 0.")


@pytest.mark.parametrize("arguments", [["walk"], ["run"], ["run", "a", "--epochs", "3"], ["export", "x"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], cli: Cli) -> None:
    assert cli(*arguments).exit_code == 2


def test_closed_pipe_ends_quietly(finished_run: Path) -> None:
    command = f"{sys.executable} -m dynamize report {finished_run} --json | true; sleep 0.1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr == ""


def test_an_interrupt_that_a_package_loses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    while True: pass\n"
        "except BaseException:\n    raise ImportError('half of it is there')\n"
    )
    code = (
        f"import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from dynamize.cli import main; sys.argv = ['dynamize', 'inspect', 'dynamize:digits_resnet']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: stopped\n"


def test_a_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})\n"
        "import sys; sys.argv = ['dynamize', 'inspect', 'dynamize:digits_resnet']\n"
        "from dynamize.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the folder that you are in does not exist any more")
