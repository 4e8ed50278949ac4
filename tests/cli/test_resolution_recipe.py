"""The recipe for one network at two resolutions from end to end on small canvases, plain and with reuse."""

from pathlib import Path

import pytest
from commandline import ON_DIGITS, call
from ledgers import ledger_of

SMALL = (
    *ON_DIGITS,
    "--data=canvas:digits,size=16,object=8-12",
    "--set=model.input=[1, 16, 16]",
    "--set=data.calibration_from=train",
    "--set=data.calibration=60",
    "--set=data.train_limit=128",
    "--set=steps.0.first.0.resolution=12",
    "--set=compare=[{resolution: 12}]",
)


@pytest.mark.slow
def test_the_ledger_says_which_statistics_were_kept(tmp_path: Path) -> None:
    result = call("run", "resolution_cascade", "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.output
    rows = ledger_of(tmp_path / "out")
    assert [row["transform"] for row in rows][:3] == ["static", "cascade", "recalibrate"]
    assert any(note.startswith("main-12: calibration accuracy with batch-norm statistics") for note in rows[2]["notes"])
    assert "main-12" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_passes_that_share_what_they_see(tmp_path: Path) -> None:
    distill = "--set=steps.1={pass: distill, epochs: 1, precision: float32}"
    result = call(
        "run", "resolution_cascade", "--out", tmp_path / "out", *SMALL, "--set=steps.0.reuse=true", distill,
        "--set=steps.2={pass: calibrate, macs_ratio: 1.3, points: 3}",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = ledger_of(tmp_path / "out")
    assert any("main-12 always run" in note for note in rows[1]["notes"])
    exported = call("export", tmp_path / "out", "--to", tmp_path / "exported")
    assert exported.exit_code == 0, exported.output
    assert {"main-12.keep.1-gate.onnx", "fuse.1-path.onnx"} <= {file.name for file in (tmp_path / "exported").iterdir()}
