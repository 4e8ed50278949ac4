"""Units whose hidden channels come in groups: each image computes the first few of them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from dynamize.graph.chains import private_chains
from dynamize.graph.narrow import mask_points, narrow
from dynamize.measure.macs import count_macs
from dynamize.nn.gated import Unit
from dynamize.nn.gates import Gate

Widths = Mapping[str, Sequence[int]]  # for each chain, its width on each path


class ChannelUnit(Unit):
    """A region whose private channel chains have P widths (Runtime Neural Pruning, Lin et al. 2017, sec. 3.2).

    In train mode all channels are computed and those left out are multiplied by zero where they are read, behind batch
    norms and activations; in eval mode a path is the region with sliced copies of its weights, made again after they
    change.

    Args:
        region: annotated (:func:`dynamize.graph.trace.annotate`); its channels are sorted by importance.
        widths: chain name -> ascending widths, one for each path, the last one whole.
    """

    def __init__(
        self,
        label: str,
        place: tuple[str, str],
        gate: Gate,
        region: fx.GraphModule,
        widths: Widths,
        path_macs: Sequence[float],
        gate_macs: float,
    ) -> None:
        super().__init__(label, place, gate, path_macs, gate_macs)
        self.body = region
        self.widths = {name: tuple(each) for name, each in widths.items()}
        self._masked = (masked(region, list(self.widths)),)  # a tuple: its modules are those of the body
        self._narrowed: tuple[object, list[nn.Module | None]] | None = None
        for index, each in enumerate(self.widths.values()):
            kept = torch.arange(each[-1]) < torch.tensor(each)[:, None]
            self.register_buffer(f"masks_{index}", kept.float(), persistent=False)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_narrowed": None}

    def forward(self, features_NCHW: Tensor) -> Tensor:
        whole: Tensor = self.body(features_NCHW)  # without building the narrower paths
        return whole

    def paths(self) -> list[nn.Module | None]:
        tensors = [*self.body.parameters(), *self.body.buffers()]
        versions = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if self._narrowed is None or self._narrowed[0] != versions:
            paths = len(self.path_macs)
            narrowed = [
                narrow(self.body, {name: each[p] for name, each in self.widths.items()}).eval()
                for p in range(paths - 1)
            ]
            self._narrowed = versions, [*narrowed, self.body]
        return self._narrowed[1]

    def blend(self, features_NCHW: Tensor, shares_NP: Tensor) -> Tensor:
        masks = [shares_NP @ self.get_buffer(f"masks_{index}") for index in range(len(self.widths))]
        blended: Tensor = self._masked[0](features_NCHW, *(mask.to(features_NCHW.dtype) for mask in masks))
        return blended


def masked(region: fx.GraphModule, chains: Sequence[str]) -> fx.GraphModule:
    """The region with a further input (N, channels) for each named chain, multiplied in where the chain is read.

    It shares its modules with the region.
    """
    found = [chain for chain in private_chains(region) if chain.name in chains]
    points = mask_points(region, found)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    masks: dict[str, fx.Node] = {}
    at = {node: name for name, nodes in points.items() for node in nodes}
    for node in region.graph.nodes:
        if node.op == "output":
            graph.output(copies[node.args[0]])
            continue
        copies[node] = graph.node_copy(node, lambda source: copies[source])
        if node.op == "placeholder":
            masks = {name: graph.placeholder(f"mask_{index}") for index, name in enumerate(chains)}
        elif node.name in at:
            mask = masks[at[node.name]]
            for _ in range(len(node.meta["shape"]) - 2):
                mask = graph.call_method("unsqueeze", (mask, -1))
            copies[node] = graph.call_method("mul", (copies[node], mask))
    return fx.GraphModule(region, graph, "Masked")


def path_costs(region: fx.GraphModule, widths: Widths, example: Tensor) -> list[float]:
    """MACs per image of the region at each width, ascending."""
    paths = len(next(iter(widths.values())))
    narrowed = [narrow(region, {name: each[p] for name, each in widths.items()}).eval() for p in range(paths)]
    return [count_macs(one, example) for one in narrowed]
