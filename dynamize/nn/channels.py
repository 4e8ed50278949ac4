"""Units whose hidden channels come in groups: each image computes the first few of them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from dynamize.graph.chains import private_chains
from dynamize.graph.narrow import mask_points, narrow
from dynamize.nn.gates import Gate
from dynamize.nn.units import Unit

Widths = Mapping[str, Sequence[int]]  # for each chain, its width on each path


class ChannelUnit(Unit):
    """A region whose private channel chains have P widths (Runtime Neural Pruning, Lin et al. 2017, sec. 3.2).

    In train mode all channels are computed and those left out are multiplied by zero where they are read, behind batch
    norms and activations; in eval mode a way is the region with slices of its weights, which are views: whatever
    changes the weights changes them. Batch norms are shared by all ways until :meth:`own_statistics` gives the narrower
    ones means and variances of their own, as in slimmable networks (Yu et al. 2019, sec. 3.3; Yu & Huang 2019, sec.
    3.3).

    Args:
        region: annotated (:func:`dynamize.graph.trace.annotate`); its channels are sorted by importance, its layers are
            the network's.
        widths: chain name -> ascending widths, one for each way, the last one whole.

    Attributes:
        has_own: whether the narrower ways have statistics of their own. Training moves the shared ones only, so they
            have to be estimated again after it.
    """

    kind = "channels"
    slices = True

    def __init__(self, label: str, gate: Gate, region: fx.GraphModule, widths: Widths) -> None:
        super().__init__(label, gate, len(next(iter(widths.values()))))
        self._region = (region,)  # tuples: their modules are the network's, which registers them
        self.widths = {name: tuple(each) for name, each in widths.items()}
        self._masked = (masked(region, list(self.widths)),)
        self._narrowed: tuple[_Narrowed, ...] | None = None
        together = {chain.name: chain.together for chain in private_chains(region)}
        for index, (name, each) in enumerate(self.widths.items()):
            kept = torch.arange(0, each[-1], together[name]) < torch.tensor(each)[:, None]
            self.register_buffer(f"masks_{index}", kept.float(), persistent=False)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_narrowed": None}

    @property
    def body(self) -> fx.GraphModule:
        """The whole region."""
        return self._region[0]

    def ways(self) -> Sequence[nn.Module | None]:
        if self._narrowed is None:
            self._narrowed = tuple(
                _Narrowed(self.body, {name: each[p] for name, each in self.widths.items()}, self._statistics(p))
                for p in range(len(self.path_macs) - 1)
            )
        return [*(narrowed.current() for narrowed in self._narrowed), self.body]

    def options(self) -> Sequence[str]:
        totals = [sum(channels) for channels in zip(*self.widths.values(), strict=True)]
        return [*(f"{100 * total / totals[-1]:.0f} % wide" for total in totals[:-1]), "whole"]

    def trained(self, choice_N: Tensor) -> tuple[nn.Module, list[Tensor]]:
        shares_NP = functional.one_hot(choice_N, len(self.path_macs)).to(self.path_costs.dtype)
        return self._masked[0], self.masks(shares_NP)

    def own_statistics(self) -> None:
        """Let each narrower way have batch-norm statistics of its own, part of the state dict from now on.

        They begin as the shared ones, so answers stay as they are; a second call changes nothing.
        """
        if self.has_own:
            return
        self.has_own = True
        for index, name in enumerate(_running(self.body)):
            shared = self.body.get_buffer(name)
            self.register_buffer(f"statistics_{index}", shared.repeat(len(self.path_macs) - 1, 1))
        self._narrowed = None

    def shared_statistics(self) -> None:
        """Undo :meth:`own_statistics`."""
        for index in range(len(_running(self.body)) if self.has_own else 0):
            delattr(self, f"statistics_{index}")
        self.has_own = False
        self._narrowed = None

    def _statistics(self, path: int) -> dict[str, Callable[[], Tensor]]:
        """Where each batch-norm statistic of a narrower way comes from instead of the region, (C,) each."""
        if not self.has_own:
            return {}
        return {name: partial(self._row, f"statistics_{index}", path) for index, name in enumerate(_running(self.body))}

    def _row(self, name: str, path: int) -> Tensor:
        return self.get_buffer(name)[path]

    def masks(self, shares_NP: Tensor) -> list[Tensor]:
        """What the units of each chain are multiplied by, (N, units) each."""
        return [shares_NP @ self.get_buffer(f"masks_{index}") for index in range(len(self.widths))]

    def blend(self, features_NCHW: Tensor, shares_NP: Tensor) -> Tensor:
        if self.has_own and not self.training:  # one pass of masks knows shared statistics only
            shares = shares_NP.to(features_NCHW.dtype)[:, :, None, None, None].unbind(1)
            ways = [cast(nn.Module, way) for way in self.paths()]
            return torch.stack([a * way(features_NCHW.clone()) for a, way in zip(shares, ways, strict=True)]).sum(0)
        masks = [mask.to(features_NCHW.dtype) for mask in self.masks(shares_NP)]
        return cast(Tensor, self._masked[0](features_NCHW, *masks))


class _Narrowed:
    """A region with fewer channels whose tensors are views of the region's: in-place changes of any kind reach it, and
    where a tensor was put in the place of another (``.to``, ``.double``, an assigned state dict) it is viewed anew."""

    def __init__(
        self, region: fx.GraphModule, widths: Mapping[str, int], instead: Mapping[str, Callable[[], Tensor]]
    ) -> None:
        self.graph = narrow(region, widths).eval()
        self._links = [
            (module, kind, name, instead.get(f"{path}.{name}") or partial(_held, region.get_submodule(path), name))
            for path, module in self.graph.named_modules()
            for kind in ("_parameters", "_buffers")
            for name, tensor in getattr(module, kind).items()
            if tensor is not None
        ]
        self._seen: list[int] = []

    def current(self) -> fx.GraphModule:
        """The narrower region as the weights are now."""
        sources = [source() for *_, source in self._links]
        pointers = [source.data_ptr() for source in sources]
        if pointers != self._seen:
            for (module, kind, name, _), source in zip(self._links, sources, strict=True):
                held = getattr(module, kind)
                view = source.detach()[tuple(slice(size) for size in held[name].shape)]
                held[name] = nn.Parameter(view, source.requires_grad) if kind == "_parameters" else view
            self._seen = pointers
        return self.graph


def _held(module: nn.Module, name: str) -> Tensor:
    tensor = module._parameters.get(name)
    found = module._buffers[name] if tensor is None else tensor
    assert found is not None
    return found


def _running(region: nn.Module) -> list[str]:
    """Names of all running means and variances."""
    norms = [name for name, one in region.named_modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    return [f"{name}.running_{kind}" for name in norms for kind in ("mean", "var")]


def masked(region: fx.GraphModule, chains: Sequence[str]) -> fx.GraphModule:
    """The region with a further input (N, units) for each named chain, multiplied in where the chain is read.

    It shares its modules with the region.
    """
    found = [chain for chain in private_chains(region) if chain.name in chains]
    points = mask_points(region, found)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    masks: dict[str, fx.Node] = {}
    units = {chain.name: chain.units for chain in found}
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
            together = node.meta["shape"][1] // units[at[node.name]]
            if together > 1:
                mask = graph.call_method("repeat_interleave", (mask, together, 1))
            for _ in range(len(node.meta["shape"]) - 2):
                mask = graph.call_method("unsqueeze", (mask, -1))
            copies[node] = graph.call_method("mul", (copies[node], mask))
    return fx.GraphModule(region, graph, "Masked")
