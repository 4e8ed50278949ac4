"""Batch-norm statistics estimated anew, piece by piece: as in training, or for each width of channel gates.

The means and variances are exact for the images given: every batch norm sees what comes out of those before it as they
have been estimated, so nothing depends on the size of a batch.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynamize.data import Images
from dynamize.graph.tracer import NetworkTracer
from dynamize.nn.flow import Flow
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Call, Part, Setting

Norms = Literal["widths", "all"]

_BATCH = 64  # images computed together
_RARE = 64  # a path that fewer images take has its statistics from all of them
_BYTES = 3 * 2**30  # of feature maps, about
_LIVE = 4  # feature maps of each image at once


@dataclass(frozen=True)
class Estimated:
    """How many images the statistics are of, and how many paths are too rare to have them of their own images."""

    images: int
    rare: int


@torch.no_grad()
def estimate_statistics(
    network: DynamicNetwork,
    images: Images,
    device: torch.device,
    *,
    count: int,
    seed: int,
    norms: Norms = "all",
    augmented: bool = True,
) -> Estimated:
    """Estimate batch-norm statistics of ``network``, in place, with the gates deciding as they stand.

    Gates' own batch norms stay as they are.

    Args:
        network: exits, if there are any, count as off.
        images: the train split (a user's loader gives it as it is).
        count: how many of them, drawn with ``seed``; fewer where their feature maps would not fit into memory.
        norms: "all": of all that training moves, and as it does: over all images that come to a gated unit, whatever
            they decide there, and with the channels that they leave out masked. "widths": each narrower path of the
            channel units gets its own, from the images that take it (post-statistics of slimmable networks, Yu & Huang
            2019, sec. 3.3); the others stay.
        augmented: whether images are augmented as in training, which weights trained so count on: crops with black
            borders move the statistics of a ResNet-56 on CIFAR-10 by as much as 3 points of accuracy.
    """
    network.to(device).eval()
    for unit in network.changing if norms == "widths" else ():
        unit.own_statistics()
    flow = Flow(_draw(images, min(count, _fitting(network)), seed, device, augmented))
    found, rare = len(flow), 0
    for piece in network.row:
        if piece.answers:
            heads = [part.graph for part in piece.parts() if part.graph is not None]
            for head in heads if norms == "all" else ():
                _through(head, flow.features, estimate=True)
            continue
        calls = {part.name: _call(part, norms == "all" and piece.effect is None) for part in piece.parts()}
        if piece.effect is not None:
            deciding = _Deciding(piece, norms == "all")
            calls["decide"] = deciding
        piece.bind(calls)(flow, Setting(offset=network.setting.offset))
        rare += deciding.rare if piece.effect is not None else 0
    return Estimated(found, rare)


def _fitting(network: DynamicNetwork) -> int:
    """How many images fit into memory with the largest feature map of the network."""
    shapes = [node.meta["shape"] for node in network.plain.graph.nodes if node.meta.get("shape")]
    return max(1, _BYTES // (4 * _LIVE * max(math.prod(shape) for shape in shapes)))


def _draw(images: Images, count: int, seed: int, device: torch.device, augmented: bool) -> Tensor:
    drawn: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed) if augmented else None
    for batch, _ in images.training_loader(_BATCH, seed):
        drawn.append(images.prepare(batch.to(device), generator))
        if sum(map(len, drawn)) >= count:
            break
    return torch.cat(drawn)[:count]


def _call(part: Part, estimate: bool) -> Call:
    if part.role == "gate":
        return lambda features: torch.cat([part.module(some) for some in features.split(_BATCH)])
    return lambda features, *beside: (_through(part.module, features, *beside, estimate=estimate), None)


class _Deciding:
    """The decisions of a unit, taken for all images; between them and the ways its batch norms are estimated.

    Attributes:
        rare: how many ways so few images take that their own statistics are from all of them.
    """

    def __init__(self, unit: Any, shared: bool) -> None:
        self.unit, self.shared, self.rare = unit, shared, 0

    def __call__(self, described: Tensor, flow: Flow, offset: float) -> list[int]:
        taken: list[int] = self.unit.decide(described, flow, offset)
        choice_N = torch.tensor(taken, device=flow.features.device)
        if self.shared:
            module, extra = self.unit.trained(choice_N)
            _through(module, flow.features, *extra, estimate=True)
        for option, way in enumerate(self.unit.paths()[:-1] if self.unit.has_own else ()):
            takes_N = choice_N == option
            few = int(takes_N.sum()) < min(_RARE, len(flow))
            self.rare += few
            _through(way, flow.features if few else flow.features[takes_N], estimate=True)
        return taken


def _through(module: nn.Module, *inputs_N: Tensor, estimate: bool = False) -> Tensor:
    """What a module makes of all images, batch by batch; its inputs are not written to.

    With ``estimate`` its batch norms have their statistics from it: all batches go through its graph side by side,
    node by node.
    """
    batches = [[part.clone() for part in parts] for parts in zip(*(one.split(_BATCH) for one in inputs_N), strict=True)]
    if not estimate:
        return torch.cat([module(*batch) for batch in batches])
    traced = module if isinstance(module, fx.GraphModule) else fx.GraphModule(module, NetworkTracer().trace(module))
    norms = _once(traced)
    runs = [fx.Interpreter(traced) for _ in batches]
    for run, batch in zip(runs, batches, strict=True):
        run.args_iter = iter(batch)
    results: list[Tensor] = []
    for node in traced.graph.nodes:
        if node in norms:
            (source,) = node.all_input_nodes
            mean, variance = moments(run.env[source] for run in runs)
            norms[node].get_buffer("running_mean").copy_(mean)
            norms[node].get_buffer("running_var").copy_(variance)
        for run in runs:
            run.env[node] = run.run_node(node)
            if node.op == "output":
                results.append(run.env[node])
            for unused in run.user_to_last_uses.get(node, []):
                del run.env[unused]
    return torch.cat(results)


def _once(traced: fx.GraphModule) -> dict[fx.Node, nn.Module]:
    """The batch norms with running statistics that are called in one place only."""
    called = {node: traced.get_submodule(str(node.target)) for node in traced.graph.nodes if node.op == "call_module"}
    uses = Counter(called.values())
    return {
        node: module
        for node, module in called.items()
        if isinstance(module, _BatchNorm) and module.track_running_stats and uses[module] == 1
    }


def moments(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel over batches (N, C, ...) together, (C,) each in float64.

    Sums of squares around the mean are merged pairwise (Chan et al. 1983), so that a large mean does no harm.
    """
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        values = batch.to(torch.promote_types(batch.dtype, torch.float32)).transpose(0, 1).flatten(1)
        size = values.shape[1]
        if not size:
            continue
        around, center = (one.cpu().double() for one in torch.var_mean(values, 1, correction=0))
        apart = center - mean
        squares = squares + size * around + apart**2 * (count * size / (count + size))
        mean = mean + apart * (size / (count + size))
        count += size
    return mean, squares / max(1, count - 1)
