"""The example scripts run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed_by(script: str, folder: Path) -> str:
    """What an example prints, run with one epoch in an empty folder."""
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import {script}; {script}.main(epochs=1)"
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_measured_script_writes_what_a_run_writes(tmp_path: Path) -> None:
    told = printed_by("measured_script", tmp_path)
    assert "rival: small" in told
    assert "of the MACs" in told.splitlines()[-1]
    written = {file.name for file in (tmp_path / "runs" / "measured").iterdir()}
    assert written >= {"ledger.json", "report.html", "report.md", "manifest.json", "weights.safetensors", "steps"}


def test_finetune_script_trains_converts_and_saves(tmp_path: Path) -> None:
    assert "of the test images right" in printed_by("finetune_script", tmp_path)
    assert (tmp_path / "runs" / "digits" / "manifest.json").is_file()
