"""The example scripts run as they stand."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_measured_script_writes_what_a_run_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "measured_script.py"))["main"](epochs=1)
    told = capsys.readouterr().out
    assert "rival: small" in told
    assert "of the MACs" in told.splitlines()[-1]
    written = {file.name for file in (tmp_path / "runs" / "measured").iterdir()}
    assert written >= {"ledger.json", "report.html", "report.md", "manifest.json", "weights.safetensors", "steps"}


@pytest.mark.slow
def test_finetune_script_trains_converts_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "finetune_script.py"))["main"](epochs=1)
    assert "of the test images right" in capsys.readouterr().out
    assert (tmp_path / "runs" / "digits" / "manifest.json").is_file()


def test_cascade_calibrates_judges_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
