"""RegNets: the published widths, and the function that torchvision computes."""

import pytest
import torch
from networks import randomise_norms
from torchvision import models

from dynamize.errors import DynamizeError
from dynamize.models import create
from dynamize.models.regnet import AnyNet, quantised_line, regnet
from dynamize.sources import source

# Radosavovic et al. 2020, table 8 and the configurations published with it: d, w0, wa, wm, g; depths, widths
PUBLISHED = {
    "X-200MF": ((13, 24, 36.44, 2.49, 8), [1, 1, 4, 7], [24, 56, 152, 368]),
    "X-400MF": ((22, 24, 24.48, 2.54, 16), [1, 2, 7, 12], [32, 64, 160, 384]),
    "X-800MF": ((16, 56, 35.73, 2.28, 16), [1, 3, 7, 5], [64, 128, 288, 672]),
    "X-1.6GF": ((18, 80, 34.01, 2.25, 24), [2, 4, 10, 2], [72, 168, 408, 912]),
    "X-3.2GF": ((25, 88, 26.31, 2.25, 48), [2, 6, 15, 2], [96, 192, 432, 1008]),
    "X-8.0GF": ((23, 80, 49.56, 2.88, 120), [2, 5, 15, 1], [80, 240, 720, 1920]),
    "X-12GF": ((19, 168, 73.36, 2.37, 112), [2, 5, 11, 1], [224, 448, 896, 2240]),
}
TORCHVISION = {
    "regnet_x_400mf": {"depths": "1-2-7-12", "widths": "32-64-160-400", "g": 16},
    "regnet_y_400mf": {"depths": "1-3-6-6", "widths": "48-104-208-440", "g": 8, "se": 0.25},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_widths(name: str) -> None:
    (d, w0, wa, wm, g), depths, widths = PUBLISHED[name]
    with torch.device("meta"):
        found = regnet(d, w0, wa, wm, g).stages
    assert [stage.depth for stage in found] == depths
    assert [stage.width for stage in found] == widths


@pytest.mark.parametrize("name", TORCHVISION)
def test_computes_what_torchvision_does_with_its_weights(name: str) -> None:
    theirs, ours = models.get_model(name), create("anynet", **TORCHVISION[name])
    randomise_norms(theirs, 0)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-5, atol=1e-5)


def test_a_source_says_the_stages() -> None:
    net = source("dynamize:anynet,depths=1-2,widths=8-24,g=8-4,b=1-2,num_classes=5,stem_stride=1")
    assert isinstance(net, AnyNet)
    assert [stage.inner for stage in net.stages] == [8, 12]
    assert net(torch.zeros(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("anynet,depths=1-2,widths=8", "2 depths and 1 widths"),
        ("anynet,depths=1-x,widths=8-8", "write numbers with - between"),
        ("anynet,depths=1.5-2,widths=8-8", "whole numbers"),
        ("anynet,depths=1-2,widths=8-12,g=8", "groups of 8 do not divide"),
        ("anynet,depths=1-2,widths=8-8,g=1-2-4", "one for all 2 stages"),
        ("anynet,depths=0-2,widths=8-8,g=1", "above 0"),
        ("anynet,se=2", "se from 0 to 1"),
        ("regnet,w0=20", "multiple of 8"),
        ("regnet,wm=1", "above 1"),
        ("regnet,d=2.5", "at least one block"),
    ],
)
def test_impossible_sizes_are_refused(text: str, says: str) -> None:
    with pytest.raises(DynamizeError, match=says):
        source(f"dynamize:{text}")


def test_a_flat_line_is_one_stage() -> None:
    assert quantised_line(5, 24, 0, 2.0) == ([5], [24])
