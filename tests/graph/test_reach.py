"""How far around a position a block looks, and tiles whose values are those of the whole map."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dynamize.graph.reach import Tiling, reach
from dynamize.graph.tracer import NetworkTracer


class Region(nn.Module):
    def __init__(self, forward: Callable[["Region", Tensor], Tensor]) -> None:
        super().__init__()
        self.three, self.five = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 5, padding=2)
        self.wide = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.valid, self.strided = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.norm, self.pool = nn.BatchNorm2d(4), nn.AvgPool2d(3, 1, 1)
        self.grouped, self.table = nn.GroupNorm(2, 4), nn.Parameter(torch.randn(4, 12, 12))
        self.most = nn.MaxPool2d(3, 1, 1)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def traced(forward: Callable[[Region, Tensor], Tensor]) -> fx.GraphModule:
    torch.manual_seed(0)
    region = Region(forward).eval()
    found = fx.GraphModule(region, NetworkTracer().trace(region))
    Shapes(found).run(torch.randn(1, 4, 12, 12))
    return found


class Shapes(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
        return value


KNOWN: dict[str, tuple[Callable[[Region, Tensor], Tensor], int]] = {
    "pointwise": (lambda m, x: (m.norm(x) * 2 + x).relu(), 0),
    "chain": (lambda m, x: F.relu(m.norm(m.five(m.three(x)))), 3),
    "the longer of two branches": (lambda m, x: x + m.three(x) + m.three(m.wide(x)), 3),
    "pools": (lambda m, x: m.most(x) + m.pool(x), 1),
}
UNKNOWN: dict[str, Callable[[Region, Tensor], Tensor]] = {
    "means of the map": lambda m, x: x * m.three(x).mean((2, 3), keepdim=True),
    "mirrored border": lambda m, x: m.mirrored(x),
    "smaller and larger again": lambda m, x: F.interpolate(m.strided(x), scale_factor=2),
    "shrinks": lambda m, x: F.pad(m.valid(x), (1, 1, 1, 1)),
    "a norm over positions": lambda m, x: m.grouped(x),
    "a table of the map": lambda m, x: x + m.table,
    "turned": lambda m, x: x.transpose(2, 3).contiguous(),
}


@pytest.mark.parametrize("name", KNOWN)
def test_reach(name: str) -> None:
    forward, wanted = KNOWN[name]
    assert reach(traced(forward)) == wanted


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_looks_everywhere_is_not_known(name: str) -> None:
    assert reach(traced(UNKNOWN[name])) is None


@pytest.mark.parametrize(("height", "width", "side"), [(12, 12, 4), (12, 12, 5), (12, 9, 4), (12, 7, 3), (5, 12, 4)])
@pytest.mark.parametrize("name", KNOWN)
def test_tiles_have_the_values_of_the_whole_map(name: str, height: int, width: int, side: int) -> None:
    forward, margin = KNOWN[name]
    region, tiling = traced(forward), Tiling(height, width, side, margin)
    features, found = torch.randn(2, 4, height, width), torch.full((2, 4, height, width), torch.nan)
    with torch.no_grad():
        for tile in tiling.tiles:
            window = features[:, :, *tile.window]
            assert tuple(window.shape[2:]) == tiling.window
            found[:, :, *tile.place] = region(window.clone())[:, :, *tile.inside]
        assert torch.allclose(found, region(features.clone()), atol=1e-5)
    assert len(tiling.tiles) == tiling.grid[0] * tiling.grid[1]
