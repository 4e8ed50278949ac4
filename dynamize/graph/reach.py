"""How far around a position a region of a graph looks, and how a feature map falls into tiles with a margin of that."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynamize.graph.channelwise import ACTIVATION_MODULES, is_drop_path, is_elementwise
from dynamize.graph.nodes import placeholder

_SAME = (*ACTIVATION_MODULES, _BatchNorm, nn.Identity, nn.PReLU, nn.modules.dropout._DropoutNd)
_SLIDING = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


def reach(region: fx.GraphModule) -> int | None:
    """How many rows or columns away from a position a region, annotated, reads what it gives there; None where that is
    all of them, where it has maps of other sizes than its input's, or where an operator is not known.

    Only layers that pad with zeros (pools: with nothing) count as known, so that the border of the map is computed
    alike wherever it is cut out.
    """
    size = placeholder(region.graph).meta["shape"][2:]
    found: dict[fx.Node, int | None] = {}
    for node in region.graph.nodes:
        before = [found[source] for source in node.all_input_nodes]
        farthest = max((one for one in before if one is not None), default=0)
        own = _own(region, node) if node.op == "output" or _is_map(node, size) else None
        found[node] = None if own is None or None in before else farthest + own
    return found[region.graph.output_node()]


def _is_map(node: fx.Node, size: Sequence[int]) -> bool:
    shape = node.meta.get("shape")
    return shape is not None and len(shape) == 4 and tuple(shape[2:]) == tuple(size)


def _own(region: fx.GraphModule, node: fx.Node) -> int | None:
    """How far one operator looks."""
    if node.op in ("placeholder", "output"):
        return 0
    if node.op in ("call_function", "call_method"):
        return 0 if is_elementwise(node) else None
    if node.op != "call_module":
        return None
    layer = region.get_submodule(str(node.target))
    if isinstance(layer, _SAME) or is_drop_path(layer):
        return 0
    return _sliding(layer) if isinstance(layer, _SLIDING) else None


def _sliding(layer: Any) -> int | None:
    kernel, stride, padding, dilation = (
        _both(getattr(layer, name, 1)) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    far = [step * (size - 1) // 2 for step, size in zip(dilation, kernel, strict=True)]
    odd = all(size % 2 for size in kernel)
    around = layer.padding == "same" or list(padding) == far
    zeros = getattr(layer, "padding_mode", "zeros") == "zeros"
    return max(far) if odd and around and zeros and set(stride) == {1} else None


def _both(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else (value, value)


@dataclass(frozen=True)
class Tile:
    """A tile and the window around it that is computed, as slices of the map and of the window."""

    place: tuple[slice, slice]  # in the map
    window: tuple[slice, slice]  # in the map
    inside: tuple[slice, slice]  # the tile in the window


@dataclass(frozen=True)
class Tiling:
    """A feature map cut into square tiles, each computed with a margin.

    A window that would stick out is moved into the map. So where a window ends at the border of the map it is padded as
    the map is, and elsewhere it ends ``margin`` away from its tile, whose values are those of the whole map.

    Attributes:
        height: of the map.
        width: of the map.
        side: of a tile; the last ones may be smaller.
        margin: rows and columns around it, as far as what computes it looks.

    Example:
        >>> tiling = Tiling(56, 56, side=14, margin=1)
        >>> tiling.grid, tiling.window, len(tiling.tiles)
        ((4, 4), (16, 16), 16)
    """

    height: int
    width: int
    side: int
    margin: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return math.ceil(self.height / self.side), math.ceil(self.width / self.side)

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of what is computed for a tile."""
        side = self.side + 2 * self.margin
        return min(side, self.height), min(side, self.width)

    @property
    def tiles(self) -> list[Tile]:
        """Row by row."""
        rows, columns = (list(self._along(length)) for length in (self.height, self.width))
        return [
            Tile(*((row, column) for row, column in zip(down, across, strict=True)))
            for down in rows
            for across in columns
        ]

    def _along(self, length: int) -> Iterator[tuple[slice, slice, slice]]:
        """In one dimension: tile, window, and tile in the window."""
        size = min(self.side + 2 * self.margin, length)
        for start in range(0, length, self.side):
            stop = min(start + self.side, length)
            first = min(max(start - self.margin, 0), length - size)
            yield slice(start, stop), slice(first, first + size), slice(start - first, stop - first)
