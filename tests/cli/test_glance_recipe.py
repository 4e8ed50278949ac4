"""The recipe for glance and focus from end to end on small canvases."""

import json
from pathlib import Path

import pytest
from commandline import ON_DIGITS, call
from ledgers import ledger_of


@pytest.mark.slow
def test_the_report_shows_where_it_looked_and_names_its_rival(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call(
        "run",
        "glance_focus",
        "--out",
        out,
        *ON_DIGITS,
        "--data=canvas:digits,size=24,object=8-12",
        "--set=model.input=[1, 24, 24]",
        "--set=data.calibration_from=train",
        "--set=data.calibration=60",
        "--set=data.train_limit=128",
        "--set=steps.0.glance=12",
        "--set=steps.0.crops=1",
        "--set=steps.1.epochs=1",
        "--set=steps.2={pass: calibrate, macs_ratio: 0.8, points: 3}",
        "--set=compare=[{resolution: 18}]",
    )
    assert result.exit_code == 0, result.output
    rows = ledger_of(out)
    assert [row["transform"] for row in rows][1:3] == ["glance_focus", "distill"]
    assert rows[-1]["macs_ratio"] < 1
    report = json.loads((out / "report.json").read_text())
    assert "main-18" in (out / "report.md").read_text()
    looks = [
        look
        for standing in report["standings"]
        for gallery in standing["gallery"]
        for image in (*gallery["first"], *gallery["last"])
        for look in image["glimpses"]
    ]
    assert {look["name"] for look in looks} <= {"glance", "focus-1", "main"}
    assert all((look["box"] is not None) == (look["name"] == "focus-1") for look in looks)
    assert 'class="pictures looked"' in (out / "report.html").read_text()
