"""How exactly each layer and each part compute in bytes, against themselves in float."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from dynamize.compression.quantization import routed, run_watched
from dynamize.compression.rounding import Key, RoundedPart, rounded_parts
from dynamize.compression.steps import Steps
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.quantized import Quantizer, quantized_layer


class _Layer:
    """One layer, in float and in bytes, and what was seen of both."""

    def __init__(self, part: RoundedPart, index: int, node: fx.Node, steps: Callable[[Key], Steps]) -> None:
        self.node, self.source, self.end = node, node.all_input_nodes[0], part.places.layers[node]
        keys = part.tensor_keys(index)
        before = steps(keys[self.source])
        self._round = Quantizer(*before)
        self._layer = quantized_layer(part.graph.get_submodule(str(node.target)), before.scale)
        self._clamp = (None if self.end is node else part.graph, self.end)
        self._round_end: nn.Module = Quantizer(*steps(keys[self.end])) if self.end in keys else nn.Identity()
        self.signal, self.noise = 0.0, 0.0

    def see(self, given: Tensor, wanted: Tensor) -> None:
        """What the layer was given in float, and what it gave behind its clamp."""
        for module in (self._round, self._layer, self._round_end):
            module.to(given.device)
        found = self._layer(self._round(given))
        graph, end = self._clamp
        if graph is not None:
            found = _call(graph, end, found)
        self.signal += float(wanted.double().square().sum())
        self.noise += float((self._round_end(found) - wanted).double().square().sum())

    @property
    def decibels(self) -> float:
        """Signal-to-noise ratio."""
        if not self.signal:
            return math.inf if not self.noise else -math.inf
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf


def layer_fidelity(
    network: DynamicNetwork, steps: Callable[[Key], Steps], batches: Sequence[Tensor], keep_float: Sequence[str]
) -> dict[str, float]:
    """Signal-to-noise ratio of each layer in dB, lowest first.

    Each is given what reaches it in the float network, so its own rounding counts only: of what it reads, of its
    weights, and of what it gives. A layer that none of the images reach is left out.

    Args:
        network: prepared.
        steps: those of each rounded tensor.
        batches: images (N, C, H, W).
        keep_float: names of layers that stay in float.
    """
    found: dict[int, list[_Layer]] = {}
    named: list[tuple[str, _Layer]] = []
    whole = list(enumerate(rounded_parts(network, keep_float)))
    for index, part in whole:
        found[index] = [_Layer(part, index, node, steps) for node in part.places.layers]
        named += [(part.layer_name(layer.node), layer) for layer in found[index]]
    read = {layer.source for layers in found.values() for layer in layers}
    values: dict[fx.Node, Tensor] = {}

    def see(part: RoundedPart, index: int, node: fx.Node, value: Tensor) -> None:
        if node.op == "placeholder":
            values.clear()
        if node in read:
            values[node] = value
        for layer in found[index]:
            if layer.end is node:
                layer.see(values[layer.source], value)

    run_watched(whole, batches, see, routed(network))
    ratios: dict[str, float] = {}
    for name, layer in named:
        if layer.signal or layer.noise:
            ratios[name] = min(layer.decibels, ratios.get(name, math.inf))
    return dict(sorted(ratios.items(), key=lambda item: item[1]))


class _Compared(nn.Module):
    """A part in float that watches the same in bytes."""

    def __init__(self, floats: nn.Module, in_bytes: nn.Module) -> None:
        super().__init__()
        self.floats, self.in_bytes = floats, in_bytes
        self.noise = self.total = self.square = 0.0
        self.count = 0

    def forward(self, features: Tensor) -> Tensor:
        wanted = cast(Tensor, self.floats(features.clone()))
        found = self.in_bytes(features.clone()).double()
        self.noise += float((found - wanted).square().sum())
        self.total += float(wanted.double().sum())
        self.square += float(wanted.double().square().sum())
        self.count += wanted.numel()
        return wanted

    @property
    def error(self) -> float:
        """Root of the mean squared difference as a share of the deviation of what the part gives."""
        if not self.noise:
            return 0.0
        spread = self.square - self.total**2 / self.count
        return math.sqrt(self.noise / spread) if spread > 0 else math.inf


def part_errors(network: DynamicNetwork, in_bytes: DynamicNetwork, batches: Sequence[Tensor]) -> list[float]:
    """What each part in bytes differs by from itself in float, as a share of the spread of what it gives.

    Each is given what reaches it in the float network.

    Args:
        network: prepared.
        in_bytes: what it was assembled to.
        batches: images (N, C, H, W).

    Returns:
        By the number of the part, in order of execution.
    """
    floats, others = rounded_parts(network, []), [part.graph for part in in_bytes.parts() if part.graph is not None]
    compared = [_Compared(part.graph, other) for part, other in zip(floats, others, strict=True)]
    for part, one in zip(floats, compared, strict=True):
        part.put(one)
    run = routed(network)
    try:
        with torch.no_grad():
            for batch in batches:
                run(batch)
    finally:
        for part, one in zip(floats, compared, strict=True):
            part.put(one.floats)
    return [one.error for one in compared]


def _call(graph: fx.GraphModule, node: fx.Node, value: Tensor) -> Tensor:
    """What a node with one tensor among its arguments gives for another tensor."""
    if node.op == "call_module":
        return cast(Tensor, graph.get_submodule(str(node.target))(value))
    args: Any = map_arg(node.args, lambda _: value)
    kwargs: Any = map_arg(node.kwargs, lambda _: value)
    if node.op == "call_method":
        return cast(Tensor, getattr(torch.Tensor, str(node.target))(*args, **kwargs))
    return cast(Tensor, cast(Callable[..., Any], node.target)(*args, **kwargs))
