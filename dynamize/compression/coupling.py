"""Which channels of a dynamic network can only be left out together: torch-pruning's dependency graph (Fang et al.
2023, DepGraph) over everything that the network can compute, heads and gates included."""

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynamize.compression.dense import MIXING, Dense
from dynamize.compression.layers import dimensions, is_depthwise, layers, place
from dynamize.compression.removal import ChannelGroup, Member, Removal, faithful
from dynamize.compression.ties import Coupled, Item, joined
from dynamize.errors import DynamizeError, closest
from dynamize.graph.tracer import blank
from dynamize.nn.network import DynamicNetwork


def channel_groups(network: DynamicNetwork, keep: Sequence[str] = ()) -> tuple[list[ChannelGroup], list[str]]:
    """All groups of channels that can be left out, those of the original network first, in order of execution.

    What the network answers with and the gates' own channels stay whole, and so does what `keep` names. Through grouped
    convolutions and norms channels go in whole groups. Of each group it was tried that the network without half of it,
    drawn at random, answers like the one that does not read this half; a group that fails (through a layer norm, a
    softmax, an operator that torch-pruning does not know) is not listed.

    Args:
        network: in eval mode.
        keep: paths of layers, or of modules all of whose layers keep their channels.

    Returns:
        The groups, and the names of those that failed.

    Raises:
        DynamizeError: torch-pruning fails on this network, or `keep` has an unknown path.
    """
    groups = _groups(network, keep)
    generator = torch.Generator().manual_seed(0)
    halves = {
        group.name: torch.randperm(group.channels, generator=generator)[: group.channels // 2].tolist()
        for group in groups
    }
    found = _faithful(network, groups, halves)
    return found, [group.name for group in groups if group not in found]


def _faithful(network: DynamicNetwork, groups: list[ChannelGroup], halves: Removal) -> list[ChannelGroup]:
    """Those that can go: all, or what is found in either half of them."""
    if not groups or faithful(network, groups, halves):
        return groups
    middle = len(groups) // 2
    return [one for part in (groups[:middle], groups[middle:]) if middle for one in _faithful(network, part, halves)]


def _groups(network: DynamicNetwork, keep: Sequence[str]) -> list[ChannelGroup]:
    from dynamize.compression.search import Search

    dense = Dense(copy.deepcopy(network))
    kept = _kept(dense, keep)
    graph = Search()
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense.eval().requires_grad_(True)
        try:
            graph.build_dependency(
                dense,
                example_inputs=blank(network, 1, *network.input_shape),
                forward_fn=lambda module, images: module(images),
                ignored_params=dense.not_ours,
                verbose=False,
            )
            every = list(graph.get_all_groups(ignored_layers=kept, root_module_types=list(MIXING)))
        except Exception as error:  # whatever torch-pruning stumbles over
            raise DynamizeError(
                f"prune: torch-pruning cannot follow the channels of this network ({type(error).__name__}: {error}), "
                "for example where they are rearranged. `factorize` and `channel_gates` work without it."
            ) from error
    coupled = joined([_coupled(graph, one, dense) for one in every], list(dense.ties()))
    groups = [group for one in coupled if (group := _group(one, dense)) is not None]
    return sorted(groups, key=lambda group: dense.position(group.name))


def _kept(dense: Dense, keep: Sequence[str]) -> list[nn.Module]:
    """Layers whose own channels all stay."""
    known = {path: module for path, module in layers(dense.network).items() if isinstance(module, MIXING)}
    kept = dense.answering()
    for name in keep:
        inside = [module for path, module in known.items() if path == name or path.startswith(name + ".")]
        if not inside:
            raise DynamizeError(
                f"prune: keep names '{name}', where the network has no convolution or linear layer. "
                f"{closest(name, list(known))}`dynamize inspect MODEL` lists the modules."
            )
        kept += inside
    paths = {path for path, module in layers(dense.network).items() if any(module is one for one in kept)}
    kept += [one for one in dense.graph.modules() if id(one) in dense.stands and dense.stands[id(one)].key in paths]
    return [one for one in kept if isinstance(one, MIXING) and not is_depthwise(one)]  # the others carry others' own


def _coupled(graph: Any, found: Any, dense: Dense) -> Coupled:
    """A group of torch-pruning as our own data; whole where something in it cannot be cut, or is not known."""
    items: list[Item] = []
    channels = len(found[0].idxs)
    whole = not found.ended
    for item in found:
        target = item.dep.target.module
        if not isinstance(target, nn.Parameter) and not any(True for _ in _tensors(target)):
            continue  # an operator
        index = _index(item.root_idxs, item.idxs, channels)
        stand = dense.stands.get(id(target))
        whole |= index is None or stand is None or stand.opaque
        if index is not None and stand is not None:
            items.append(Item((stand.key, _side(graph, item.dep)), index))
    return Coupled(channels, tuple(items), whole)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _side(graph: Any, dependency: Any) -> str:
    target = dependency.target.module
    if not isinstance(target, MIXING) or is_depthwise(target):
        return "each"
    return "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"


def _group(coupled: Coupled, dense: Dense) -> ChannelGroup | None:
    """As what is cut in which layer; None where nothing may go."""
    members: list[Member] = []
    makers: list[tuple[bool, int, str, int]] = []
    for item in coupled.items:
        key, side = item.place
        stand = dense.by_key[key]
        tied = (key, side) in stand.ties and side == "out"
        for path, dim in stand.held.get(side, ()):
            members.append(Member(path, "each" if tied else cast(Any, side), item.index, dim))
            if side == "out" and not tied:
                makers.append((dim is not None, dense.position(path), path, item.index.shape[1]))
    if coupled.whole or coupled.channels < 2 or not makers or not all(_fits(dense.network, one) for one in members):
        return None
    *_, name, together = min(makers)
    return ChannelGroup(name, coupled.channels, tuple(members), together)


def _fits(network: DynamicNetwork, member: Member) -> bool:
    """Whether the tensors that are cut have these places."""
    known = layers(network)
    if member.dim is None and member.layer in known:
        module = known[member.layer]
        lengths = [getattr(module, name).shape[dim] for name, dim in dimensions(module, member.side)]
    else:
        holder, name = place(network, member.layer)
        tensor: Tensor = getattr(holder, name)
        lengths = [tensor.shape[0 if member.dim is None else member.dim]]
    return all(int(member.index.max()) < length for length in lengths)


def _index(roots: Sequence[int], places: Sequence[int], channels: int) -> Tensor | None:
    """(channels, k): the places that belong to each channel of the root."""
    found: dict[int, list[int]] = defaultdict(list)
    for root, spot in zip(roots, places, strict=True):
        found[int(root)].append(int(spot))
    counts = {len(spots) for spots in found.values()}
    if sorted(found) != list(range(channels)) or len(counts) != 1 or math.prod(counts) == 0:
        return None
    return torch.tensor([found[root] for root in range(channels)])
