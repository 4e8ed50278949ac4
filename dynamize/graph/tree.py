"""What a network consists of, for people: stages of one resolution, the blocks between cut points, their cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import fx, nn

from dynamize.graph.cuts import CutPoint, cut_points
from dynamize.graph.nodes import output_value, positions


@dataclass(frozen=True)
class Block:
    """The layers from one cut point to the next; the last one ends in the class scores.

    Attributes:
        cut: name of the cut point at its end, which ``exits: {at: [...]}`` takes; None for the classifier.
        module: path of the module that computes it.
        shape: (C, H, W) at its end, or (classes,).
        macs: multiply-accumulates per image.
        params: parameters that no block before it uses.
    """

    cut: str | None
    module: str
    shape: tuple[int, ...]
    macs: float
    params: int


@dataclass(frozen=True)
class Stage:
    """Consecutive blocks whose outputs have one height and width."""

    blocks: tuple[Block, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the last block's output."""
        return self.blocks[-1].shape

    @property
    def macs(self) -> float:
        """Per image."""
        return sum(block.macs for block in self.blocks)

    @property
    def params(self) -> int:
        """Of all blocks."""
        return sum(block.params for block in self.blocks)


@dataclass(frozen=True)
class NetworkTree:
    """A network as stages of blocks; ``input_shape`` is (C, H, W)."""

    input_shape: tuple[int, ...]
    stages: tuple[Stage, ...]

    @property
    def blocks(self) -> list[Block]:
        """All blocks in execution order."""
        return [block for stage in self.stages for block in stage.blocks]

    @property
    def macs(self) -> float:
        """Per image."""
        return sum(stage.macs for stage in self.stages)

    @property
    def params(self) -> int:
        """Of the whole network."""
        return sum(stage.params for stage in self.stages)


def network_tree(traced: fx.GraphModule, input_shape: Sequence[int]) -> NetworkTree:
    """The tree of a network that :func:`dynamize.graph.trace.trace` traced for images of ``input_shape``."""
    cuts = cut_points(traced)
    blocks = list(_blocks(traced, cuts))
    resolutions = groupby(blocks, key=lambda block: block.shape[1:])
    return NetworkTree(tuple(input_shape), tuple(Stage(tuple(group)) for _, group in resolutions))


def _blocks(traced: fx.GraphModule, cuts: Sequence[CutPoint]) -> Iterator[Block]:
    nodes = list(traced.graph.nodes)
    order = positions(traced.graph)
    ends = [order[cut.name] + 1 for cut in cuts]
    counted: set[nn.Parameter] = set()
    for cut, first, end in zip([*cuts, None], [0, *ends], [*ends, len(nodes)], strict=True):
        inside = nodes[first:end]
        new = {one for node in inside for one in _parameters(traced, node)} - counted
        counted |= new
        yield Block(
            cut=cut.name if cut else None,
            module=cut.module if cut else "",
            shape=cut.shape if cut else _answer_shape(traced),
            macs=sum(node.meta.get("macs", 0.0) for node in inside),
            params=sum(one.numel() for one in new),
        )


def _answer_shape(traced: fx.GraphModule) -> tuple[int, ...]:
    return tuple(output_value(traced.graph).meta["shape"][1:])


def _parameters(traced: fx.GraphModule, node: fx.Node) -> list[nn.Parameter]:
    if node.op == "call_module":
        return list(traced.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        path, _, name = str(node.target).rpartition(".")
        value = getattr(traced.get_submodule(path), name)
        return [value] if isinstance(value, nn.Parameter) else []
    return []
