"""The coverage table over a handful of different networks of each library."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "coverage.py"


def run(library: str, names: list[str], out: Path) -> tuple[int, list[list[str]], str]:
    """Exit code, the cells of each row, and what was printed."""
    command = [sys.executable, str(SCRIPT), "--library", library, "--names", ",".join(names), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert out.exists(), done.stderr[-2000:]
    lines = out.read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return done.returncode, cells, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "names"),
    [
        ("torchvision", ["resnet18", "googlenet", "shufflenet_v2_x0_5", "mobilenet_v3_small", "densenet121"]),
        ("timm", ["mobilenetv3_small_050", "regnetx_002", "ghostnet_050", "convnext_zepto_rms", "resnet10t"]),
    ],
)
def test_different_networks_keep_all_promises(library: str, names: list[str], tmp_path: Path) -> None:
    if library == "timm":
        pytest.importorskip("timm", reason="needs timm, whose networks are checked")
    code, rows, printed = run(library, names, tmp_path / "coverage.md")
    assert [row[0] for row in rows] == names
    assert [row[4:7] for row in rows] == [["yes"] * 3] * len(names), printed
    assert all(cell.endswith(" %") for row in rows for cell in row[7:9]), printed
    assert f"{len(names)} of {len(names)} networks (100%)" in printed
    assert code == 0


@pytest.mark.slow
def test_a_network_that_cannot_be_converted_fails_and_says_why(tmp_path: Path) -> None:
    code, rows, printed = run("torchvision", ["vit_b_16", "squeezenet1_1"], tmp_path / "coverage.md")
    assert rows[0][4:7] == ["-", "-", "-"]
    assert rows[0][10]
    assert rows[1][4:7] == ["yes"] * 3
    assert "1 of 2 networks (50%)" in printed
    assert code == 1
