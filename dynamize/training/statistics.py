"""Batch-norm statistics estimated anew, piece by piece: as in training, or for each width of channel gates.

The means and variances are exact for the images given: every batch norm sees what comes out of those before it as they
have been estimated, so nothing depends on the size of a batch.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from dynamize.data import Images
from dynamize.graph.trace import NetworkTracer
from dynamize.nn.channels import ChannelUnit
from dynamize.nn.gated import GatedSegment, Unit
from dynamize.nn.gates import State, choose
from dynamize.nn.network import DynamicNetwork

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
    for unit in network.units:
        if isinstance(unit, ChannelUnit) and norms == "widths":
            unit.own_statistics()
    features = _draw(images, min(count, _fitting(network)), seed, device, augmented)
    found, rare = len(features), 0
    for k, segment in enumerate(network.segments):
        state: State = None
        for piece in segment.pieces if isinstance(segment, GatedSegment) else [segment]:
            if not isinstance(piece, Unit):
                features = _through(piece, features, estimate=norms == "all")
                continue
            choice_N, state = _decide(piece, features, state, cast(GatedSegment, segment).offset)
            features, few = _through_unit(piece, features, choice_N, norms == "all")
            rare += few
        if norms == "all" and k < len(network.heads):
            _through(cast(nn.Module, network.heads[k].body), features, estimate=True)
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


def _decide(unit: Unit, features: Tensor, state: State, offset: float) -> tuple[Tensor, State]:
    described = torch.cat([unit.gate.describe(part) for part in features.split(_BATCH)])
    scores, state = unit.gate.decide(described, state)
    return choose(scores, unit.path_costs, offset), state


def _through_unit(unit: Unit, features: Tensor, choice_N: Tensor, everything: bool) -> tuple[Tensor, int]:
    """What the unit makes of the images, each on its path, and how many paths were estimated from all images."""
    if everything:
        _estimate_shared(unit, features, choice_N)
    own = isinstance(unit, ChannelUnit) and unit.has_own
    paths, rare = unit.paths(), 0
    parts: list[Tensor] = []
    for p, path in enumerate(paths):
        takes_N = choice_N == p
        if path is None or not own or p == len(paths) - 1:
            parts.append(features[takes_N] if path is None else _through(path, features[takes_N]))
            continue
        few = int(takes_N.sum()) < min(_RARE, len(features))
        rare += few
        found = _through(path, features if few else features[takes_N], estimate=True)
        parts.append(found[takes_N] if few else found)
        cast(ChannelUnit, unit).take_statistics(p, path)
    out = parts[-1].new_empty(len(features), *parts[-1].shape[1:])
    for p, part in enumerate(parts):
        out[choice_N == p] = part
    return out, rare


def _estimate_shared(unit: Unit, features: Tensor, choice_N: Tensor) -> None:
    """The batch norms that the paths of a unit share, over all images as in training."""
    if isinstance(unit, ChannelUnit):
        shares_NP = functional.one_hot(choice_N, len(unit.path_macs)).to(features.dtype)
        _through(unit.masked, features, *unit.masks(shares_NP), estimate=True)
    else:
        original = unit.paths()[-1]
        assert original is not None
        _through(original, features, estimate=True)


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
