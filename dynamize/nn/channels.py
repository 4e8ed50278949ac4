"""Units whose hidden channels come in groups: each image computes the first few of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynamize.graph.chains import private_chains
from dynamize.graph.macs import count_macs
from dynamize.graph.narrow import mask_points, narrow
from dynamize.nn.gated import Unit
from dynamize.nn.gates import Gate

Widths = Mapping[str, Sequence[int]]  # for each chain, its width on each path


class ChannelUnit(Unit):
    """A region whose private channel chains have P widths (Runtime Neural Pruning, Lin et al. 2017, sec. 3.2).

    In train mode all channels are computed and those left out are multiplied by zero where they are read, behind batch
    norms and activations; in eval mode a path is the region with sliced copies of its weights, made again after they
    change. Batch norms are shared by all paths until :meth:`own_statistics` gives the narrower ones means and variances
    of their own, as in slimmable networks (Yu et al. 2019, sec. 3.3; Yu & Huang 2019, sec. 3.3).

    Args:
        region: annotated (:func:`dynamize.graph.trace.annotate`); its channels are sorted by importance.
        widths: chain name -> ascending widths, one for each path, the last one whole.

    Attributes:
        has_own: whether the narrower paths have statistics of their own. Training moves the shared ones only, so they
            have to be estimated again after it.
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
        self.has_own = False
        for index, each in enumerate(self.widths.values()):
            kept = torch.arange(each[-1]) < torch.tensor(each)[:, None]
            self.register_buffer(f"masks_{index}", kept.float(), persistent=False)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_narrowed": None}

    def forward(self, features_NCHW: Tensor) -> Tensor:
        whole: Tensor = self.body(features_NCHW)  # without building the narrower paths
        return whole

    def paths(self) -> list[nn.Module | None]:
        tensors = [*self.body.parameters(), *self.body.buffers(), *self.buffers(recurse=False)]
        versions = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if self._narrowed is None or self._narrowed[0] != versions:
            self._narrowed = versions, [*(self._narrow(p) for p in range(len(self.path_macs) - 1)), self.body]
        return self._narrowed[1]

    def _narrow(self, path: int) -> fx.GraphModule:
        narrowed = narrow(self.body, {name: each[path] for name, each in self.widths.items()}).eval()
        for used, own_PC in self._statistics(narrowed):
            used.copy_(own_PC[path, : len(used)])
        return narrowed

    def own_statistics(self) -> None:
        """Let each narrower path have batch-norm statistics of its own, part of the state dict from now on.

        They begin as the shared ones, so answers stay as they are; a second call changes nothing.
        """
        if self.has_own:
            return
        self.has_own = True
        for index, name in enumerate(_running(self.body)):
            shared = self.body.get_buffer(name)
            self.register_buffer(f"statistics_{index}", shared.repeat(len(self.path_macs) - 1, 1))

    def shared_statistics(self) -> None:
        """Undo :meth:`own_statistics`."""
        for index in range(len(_running(self.body)) if self.has_own else 0):
            delattr(self, f"statistics_{index}")
        self.has_own = False

    def take_statistics(self, path: int, narrowed: nn.Module) -> None:
        """Make the batch-norm statistics of ``narrowed``, which :meth:`paths` gave, those of this path for good."""
        for used, own_PC in self._statistics(narrowed):
            own_PC[path, : len(used)] = used

    def _statistics(self, narrowed: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Each statistic of a narrowed copy, (c,), with those (P - 1, C) that the narrower paths have for their own."""
        for index, name in enumerate(_running(self.body) if self.has_own else ()):
            yield narrowed.get_buffer(name), self.get_buffer(f"statistics_{index}")

    @property
    def masked(self) -> fx.GraphModule:
        """The region with :meth:`masks` as further inputs; it shares its modules with ``body``."""
        return self._masked[0]

    def masks(self, shares_NP: Tensor) -> list[Tensor]:
        """What the channels of each chain are multiplied by, (N, channels) each."""
        return [shares_NP @ self.get_buffer(f"masks_{index}") for index in range(len(self.widths))]

    def blend(self, features_NCHW: Tensor, shares_NP: Tensor) -> Tensor:
        if self.has_own and not self.training:  # one pass of masks knows shared statistics only
            shares = shares_NP.to(features_NCHW.dtype)[:, :, None, None, None].unbind(1)
            ways = [cast(nn.Module, way) for way in self.paths()]
            return torch.stack([a * way(features_NCHW.clone()) for a, way in zip(shares, ways, strict=True)]).sum(0)
        masks = [mask.to(features_NCHW.dtype) for mask in self.masks(shares_NP)]
        return cast(Tensor, self.masked(features_NCHW, *masks))


def _running(region: nn.Module) -> list[str]:
    """Names of all running means and variances."""
    norms = [name for name, one in region.named_modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    return [f"{name}.running_{kind}" for name in norms for kind in ("mean", "var")]


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
