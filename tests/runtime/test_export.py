"""What is exported has been run and compared with torch."""

from pathlib import Path

import pytest
import torch
from torch import nn

from dynamize.conversion import convert, wrap
from dynamize.errors import DynamizeError
from dynamize.runtime import export, exportable
from dynamize.transforms import Exits

SHAPE = (3, 12, 12)


def network(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        width = layer(torch.zeros(1, 8, 12, 12)).flatten(1).shape[1]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), layer, nn.Flatten(), nn.Linear(width, 7)).eval()


@pytest.mark.parametrize("layer", [nn.CrossMapLRN2d(3), nn.Softplus(threshold=0.1)])
def test_a_stage_that_differs_or_has_no_form_in_onnx_is_refused(
    layer: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exportable, "_WRITTEN", {})  # so that the exporter drops the threshold
    with pytest.raises(DynamizeError, match="a stage cannot be exported: .*Use `dynamize predict`"):
        export.export(wrap(network(layer), SHAPE), tmp_path / "deploy")
    assert not (tmp_path / "deploy").exists()


def test_stages_with_layers_that_are_written_otherwise(tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same", dilation=2), nn.Softplus(threshold=0.1), *network(nn.Identity())
    )
    net[2] = nn.Conv2d(8, 8, 3, padding=1)
    dynamic = convert(net.eval(), [Exits(at=["1"], share=0.9, head="linear")], SHAPE).eval()
    files = export.export(dynamic, tmp_path / "deploy")
    assert {file.name for file in files} >= {"stage-1.onnx", "stage-2.onnx", "run.py"}
