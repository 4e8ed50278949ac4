"""The example of a workflow for a hosted CI: its commands are read out of the file and run."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from commandline import call

EXAMPLE = Path(__file__).parents[2] / "examples" / "ci"
NOT_RUN = ("pip install ",)  # the machine that tests has dynamize already


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the example in it."""
    shutil.copytree(EXAMPLE, tmp_path / "examples" / "ci")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands() -> list[str]:
    steps = yaml.safe_load((EXAMPLE / "workflow.yml").read_text())["jobs"]["model"]["steps"]
    return [line for step in steps for line in step.get("run", "").splitlines() if not line.startswith(NOT_RUN)]


@pytest.mark.slow
def test_workflow_runs_and_shows_what_changed(checkout: Path) -> None:
    summary = checkout / "summary.md"
    ran = []
    for line in commands():
        program, *arguments = shlex.split(line)
        ran.append(program)
        if program == "dynamize":
            quick = ["--set=timing_seconds=0.05", "-q"] if arguments[0] == "run" else ["-q"]
            done = call(*arguments, *quick)
            assert done.exit_code in (0, 1), done.output
            if done.exit_code == 1:  # times are of a busy machine
                assert set(re.findall(r"(\w+) +\w* .*missed", done.stdout)) == {"slowdown"}
        else:
            subprocess.run(["bash", "-c", line], env={**os.environ, "GITHUB_STEP_SUMMARY": str(summary)}, check=True)
    assert ran == ["dynamize", "dynamize", "cat"]
    assert "### Since the baseline" in summary.read_text()
