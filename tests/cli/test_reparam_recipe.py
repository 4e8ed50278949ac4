"""The recipe for re-parameterised training from end to end on digits."""

import json
from pathlib import Path

import pytest
from commandline import ON_DIGITS, call
from ledgers import ledger_of

LAYERS = "--set=steps.0.layers=[layer1.0.conv1, layer2.0.conv1]"


@pytest.mark.slow
def test_reparam_costs_in_the_end_what_it_cost_at_first(tmp_path: Path) -> None:
    result = call(
        "run",
        "reparam",
        "--out",
        tmp_path / "out",
        *ON_DIGITS,
        "--set=data.train_limit=200",
        LAYERS,
        "--set=steps.1.epochs=1",
    )
    assert result.exit_code == 0, result.output
    rows = ledger_of(tmp_path / "out")
    assert [row["transform"] for row in rows] == ["static", "expand_branches", "distill", "fuse_branches"]
    static, expanded, distilled, fused = rows
    assert expanded["accuracy"] == static["accuracy"]
    assert expanded["agreement"] == 1
    assert expanded["macs"] == distilled["macs"] > static["macs"] == fused["macs"]
    assert expanded["params"] > fused["params"]
    assert abs(fused["accuracy"] - distilled["accuracy"]) <= 0.01
    history = json.loads((tmp_path / "out" / "manifest.json").read_text())["history"]
    assert history[2]["sums"] == []
