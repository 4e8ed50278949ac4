"""Where a network can be cut in two: the nodes that all paths from input to output run through."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from torch import fx

from dynamize.errors import DynamizeError, closest


@dataclass(frozen=True)
class CutPoint:
    """A feature map that separates the network.

    Attributes:
        name: the node's name in the traced graph, which ``exits: {at: [...]}`` takes.
        module: path of the module that computes it, for people ("layer1.2").
        shape: (C, H, W) of the feature map.
        macs: MACs per image from the input up to here.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    macs: float


def cut_points(traced: fx.GraphModule) -> list[CutPoint]:
    """All cut points of an annotated graph in execution order.

    A node is one if no other value that depends on the image is used after it. Of neighbours with no
    multiply-accumulates between them (convolution, batch norm, activation) only the last is listed. The input, what
    is made of it without multiply-accumulates (it may share the input's memory) and what is pooled to 1 x 1 are not.
    """
    return [
        CutPoint(node.name, module_path(node), tuple(node.meta["shape"][1:]), macs)
        for node, macs in separating(traced.graph)
    ]


def separating(graph: fx.Graph, ignored: Container[fx.Node] = ()) -> list[tuple[fx.Node, float]]:
    """The nodes that separate an annotated graph, with the MACs per image up to each.

    Args:
        ignored: nodes that count neither as data nor as users of data.
    """
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    found: list[tuple[fx.Node, float]] = []
    depends: set[fx.Node] = set()  # on the image, not only on parameters
    open_until = -1  # the last position at which a value computed before this one is used
    macs = 0.0
    for i, node in enumerate(nodes):
        macs += node.meta["macs"]
        read = node not in ignored and any(source in depends for source in node.all_input_nodes)
        if node.op == "placeholder" or read:
            depends.add(node)
        if macs and open_until <= i and node in depends and _is_feature_map(node):
            if found and found[-1][1] == macs:
                found.pop()
            found.append((node, macs))
        if node in depends:
            open_until = max([open_until, *(position[user] for user in node.users if user not in ignored)])
    return found


def _is_feature_map(node: fx.Node) -> bool:
    shape = node.meta["shape"]
    spatial = shape is not None and len(shape) == 4 and shape[2] * shape[3] > 1
    return spatial and node.meta["floating"] and node.op != "placeholder"


def module_path(node: fx.Node) -> str:
    """Path of the module that a node belongs to: the block for an addition or activation inside it."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    if node.op == "call_module" and paths and paths[-1] == node.target:
        paths = paths[:-1] or paths
    return paths[-1] if paths else ""


def find_cut(cuts: Sequence[CutPoint], name: str) -> CutPoint:
    """The cut point of this node name, or the last one inside the module of this path.

    Raises:
        DynamizeError: there is none; the nearest names are listed.
    """
    for cut in cuts:
        if cut.name == name:
            return cut
    inside = [cut for cut in cuts if cut.module == name or cut.module.startswith(name + ".")]
    if inside:
        return inside[-1]
    raise DynamizeError(
        f"'{name}' is no cut point of this network. {closest(name, [c.name for c in cuts])}"
        "`dynamize inspect MODEL` lists all cut points; a module path such as 'layer2' also works."
    )
