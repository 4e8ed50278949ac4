"""The example scripts run as they stand."""

import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynamize.calibration import collect

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


def test_cascade_calibrates_judges_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(collect, "exit_latency", partial(collect.exit_latency, seconds=0.1))
    runpy.run_path(str(EXAMPLES / "cascade.py"), run_name="__main__")
    told = capsys.readouterr().out
    figures = re.findall(r"([\d.]+)% of the test images right, ([\d.]+) of the large", told)
    alone = {name: float(accuracy) for name, accuracy in re.findall(r"(\w+) alone: ([\d.]+)%", told)}
    points = [(float(accuracy), float(macs)) for accuracy, macs in figures]
    assert any(macs < 0.5 and accuracy > (alone["small"] + alone["large"]) / 2 for accuracy, macs in points)
    assert (tmp_path / "runs" / "cascade" / "manifest.json").is_file()
    pixels = np.asarray(Image.open(tmp_path / "cascade.png").convert("RGB"))
    colours = {tuple(one) for one in pixels.reshape(-1, 3).tolist()}
    assert {(47, 91, 234), (212, 87, 15)} <= colours  # the curve, and the networks alone
