"""Taking a network to bytes: observing the values that reach each part, and writing the rounding into its graph."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from dynamize.compression.rounding import Key, RoundedPart, rounded_parts
from dynamize.compression.steps import Observer, RangeName, Steps
from dynamize.data import Images
from dynamize.graph.integers import Recorder
from dynamize.graph.padding import pads_zeros
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.nn.quantized import Quantizer, quantized_layer

_BATCH = 64
_FEWEST = 16  # images that ranges are taken from
_SAMPLE = 2**20  # values of a batch that a histogram counts

See = Callable[[RoundedPart, int, fx.Node, Tensor], None]
Run = Callable[[Tensor], object]


def sample(images: Images, count: int, device: torch.device) -> list[Tensor]:
    """Batches (n, C, H, W) of ``count`` images spread evenly over the split, under the test-time transform."""
    chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()
    wanted = torch.zeros(len(images), dtype=torch.bool)
    wanted[chosen] = True
    found, start = [], 0
    for batch, _ in images.batches(_BATCH):
        found.append(batch[wanted[start : start + len(batch)]])
        start += len(batch)
    return list(torch.cat(found).to(device).split(_BATCH))


@dataclass(frozen=True)
class Observed:
    """The values of all tensors of a prepared network.

    Attributes:
        observers: by key of the tensor.
        rare: how many parts so few images reach that they were shown all.
    """

    observers: dict[Key, Observer]
    rare: int


def observe(network: DynamicNetwork, batches: Sequence[Tensor], histograms: bool) -> Observed:
    """Run images through a prepared network as it stands: each part sees those that reach it at the network's
    thresholds, on the paths that the gates choose. While all exits are off, all images reach all of them."""
    whole = rounded_parts(network, [])
    watched = list(enumerate(whole))
    observers: dict[Key, Observer] = {}
    reached = [0] * len(whole)

    def observer(part: RoundedPart, index: int, node: fx.Node) -> Observer:
        return observers.setdefault(part.key_of(index, node), Observer())

    def see_range(part: RoundedPart, index: int, node: fx.Node, values: Tensor) -> None:
        observer(part, index, node).see_range(values)
        reached[index] += len(values) if node.op == "placeholder" else 0

    def see_values(part: RoundedPart, index: int, node: fx.Node, values: Tensor) -> None:
        flat = values.flatten()
        observer(part, index, node).see_values(flat[:: -(-len(flat) // _SAMPLE)] if len(flat) > _SAMPLE else flat)

    run = routed(network)
    run_watched(watched, batches, see_range, run)
    rare = [(index, part) for index, part in watched if reached[index] < _FEWEST]
    for dense in _all_routes(network) if rare else []:
        run_watched(rare, batches, see_range, dense)
    if histograms:
        run_watched(watched, batches, see_values, run)
        for dense in _all_routes(network) if rare else []:
            run_watched(rare, batches, see_values, dense)
    return Observed(observers, len(rare))


def routed(network: DynamicNetwork) -> Run:
    """Each image as far as it goes; with all exits off, through all of them."""
    network.eval()
    return network.all_exits if all(one is None for one in network.setting.thresholds.values()) else network


def _all_routes(network: DynamicNetwork) -> list[Run]:
    """Every image through all exits and in turn by the first option of all decisions, by the second, ..."""
    last = {one.name: len(one.options) - 1 for one in network.decisions() if one.effect == "changes"}

    def route(option: int) -> Run:
        def run(batch: Tensor) -> object:
            forced = {name: torch.full((len(batch),), min(option, most)) for name, most in last.items()}
            return network.all_exits(batch, Setting(forced=forced))

        return run

    return [route(option) for option in range(max(last.values(), default=0) + 1)]


def run_watched(watched: Sequence[tuple[int, RoundedPart]], batches: Sequence[Tensor], see: See, run: Run) -> None:
    """Run images through a prepared network while ``see`` is shown each tensor of some of its parts."""
    for index, part in watched:
        part.put(_Watched(part, index, see))
    try:
        with torch.no_grad():
            for batch in batches:
                run(batch)
    finally:
        for _, part in watched:
            part.put(part.graph)


class _Watched(nn.Module):
    def __init__(self, part: RoundedPart, index: int, see: See) -> None:
        super().__init__()
        self._watched = (part, index, see)

    def forward(self, features: Tensor) -> Tensor:
        part, index, see = self._watched

        def see_floats(node: fx.Node, values: Tensor) -> None:
            if values.is_floating_point() and values.ndim:
                see(part, index, node, values)

        return cast(Tensor, Recorder(part.graph, see_floats).run(features))


def assemble(network: DynamicNetwork, steps: Callable[[Key], Steps], keep_float: Sequence[str]) -> DynamicNetwork:
    """A copy of a prepared network that computes in bytes.

    Args:
        network: from :func:`dynamize.compression.rounding.prepare`.
        steps: those of each rounded tensor.
        keep_float: names of layers that stay in float.
    """
    found = copy.deepcopy(network)
    for index, part in enumerate(rounded_parts(found, keep_float)):
        keys = part.tensor_keys(index)
        part.put(write(part, {node: steps(key) for node, key in keys.items()}))
    return found


def placeholder_steps(key: Key) -> Steps:
    """For a structure whose weights are loaded afterwards."""
    return Steps()


def write(part: RoundedPart, steps: Mapping[fx.Node, Steps]) -> fx.GraphModule:
    """The graph of a part, with layers in bytes and a rounding of each tensor in ``steps`` written out.

    Tensors that have the same steps, such as a pool's input and output, share a module.
    """
    graph, rounded = part.graph, part.places.rounded
    for layer in part.places.layers:
        target = str(layer.target)
        scale = steps[rounded[layer.all_input_nodes[0]]].scale
        graph.set_submodule(target, quantized_layer(graph.get_submodule(target), scale))
    numbers = {source: i for i, source in enumerate(dict.fromkeys(rounded.values()))}
    graph.add_module("quantizers", nn.Module())
    for node in list(steps):
        path = f"quantizers.{numbers[rounded[node]]}"
        if rounded[node] is node:
            graph.add_submodule(path, Quantizer(*steps[node]))
        if pads_zeros(graph, node) and node.users.keys() <= part.places.layers.keys():
            continue  # backends take zeros around what a layer reads for the layer's own
        with graph.graph.inserting_after(node):
            call = graph.graph.call_module(path, (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)  # type: ignore[misc]
    graph.graph.lint()
    graph.recompile()
    return graph.eval()


def steps_of(observers: Mapping[Key, Observer], ranges: RangeName, percentile: float) -> Callable[[Key], Steps]:
    """The steps of each tensor, found when they are first needed."""
    found: dict[Key, Steps] = {}

    def of(key: Key) -> Steps:
        if key not in found:
            found[key] = observers[key].steps(ranges, percentile)
        return found[key]

    return of
