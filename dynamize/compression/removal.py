"""Channels that can only be left out together, and leaving them out of a network."""

import copy
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dynamize.compression.layers import dimensions, layers, place, put_tensors, read_sizes, sizes
from dynamize.nn.network import DynamicNetwork
from dynamize.rewrite.exchange import exit_answers

_RELATIVE = 1e-4  # of the largest logit; sums run over other numbers of channels

Removal = Mapping[str, Sequence[int]]  # for each group, by name, the channels that go


@dataclass(frozen=True)
class Member:
    """A layer's part in a group.

    Attributes:
        layer: its path (:func:`dynamize.compression.layers.layers`), or that of a tensor that no layer holds.
        side: where it has the channels: it makes them ("out"), reads them ("in") or treats each by itself ("each").
        index: (channels, k), the k places in the layer that belong to each channel of the group.
        dim: of the tensor, for one that no layer holds.
    """

    layer: str
    side: Literal["out", "in", "each"]
    index: Tensor
    dim: int | None = None


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of several layers that have to stay or go together, because they are added up, for example.

    Attributes:
        name: path of the first layer that makes them.
        channels: how many there are; where they go in blocks, how many blocks.
        members: all layers that have a part in them.
        together: how many channels of the first layer a block has.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    together: int = 1

    def step(self, multiple: int) -> int:
        """By how many of its own the group gets narrower, so that widths are multiples of ``multiple``."""
        return multiple // math.gcd(multiple, self.together)


def remove(network: DynamicNetwork, groups: Sequence[ChannelGroup], removed: Removal) -> None:
    """Leave channels out of a network, in place. Shapes and MACs in its graph's annotation become stale."""
    places = _places(network, groups, removed, reading=False)
    widths = _left(network, groups, removed)
    changed: dict[int, Tensor] = {}
    for (_, _), (tensor, cuts) in places.items():
        kept = tensor.detach()
        for dim, gone in cuts.items():
            left = [i for i in range(kept.shape[dim]) if i not in gone]
            kept = kept.index_select(dim, torch.tensor(left, device=kept.device))
        changed[id(tensor)] = kept
    put_tensors(network, changed)
    known = layers(network)
    for path, channels in widths.items():
        read_sizes(known[path], channels)


def _left(network: DynamicNetwork, groups: Sequence[ChannelGroup], removed: Removal) -> dict[str, int]:
    """The channels that each layer concerned gives then, or treats, by its path."""
    known, had = layers(network), sizes(network)
    gone: dict[str, set[int]] = {}
    for group in groups:
        for member in group.members if len(removed.get(group.name, ())) else ():
            if member.layer in known:
                found = gone.setdefault(member.layer, set())
                cut = member.index[torch.as_tensor(removed[group.name], dtype=torch.int64)]
                found.update(cut.flatten().tolist() if member.side != "in" else ())
    return {path: had[path][0] - len(cut) for path, cut in gone.items()}


@contextmanager
def silenced(network: DynamicNetwork, groups: Sequence[ChannelGroup], removed: Removal) -> Iterator[None]:
    """Zero all weights that read these channels inside the block: what :func:`remove` has to compute, at full size."""
    places = _places(network, groups, removed, reading=True).values()
    held = [(tensor, tensor.detach().clone()) for tensor, _ in places]
    try:
        with torch.no_grad():
            for tensor, cuts in places:
                for dim, gone in cuts.items():
                    tensor.index_fill_(dim, torch.tensor(sorted(gone), device=tensor.device), 0)
        yield
    finally:
        with torch.no_grad():
            for tensor, before in held:
                tensor.copy_(before)


def _places(
    network: DynamicNetwork, groups: Sequence[ChannelGroup], removed: Removal, reading: bool
) -> dict[tuple[int, str], tuple[Tensor, dict[int, set[int]]]]:
    """The tensors concerned, by id of who holds them and name, and for each dimension the indexes concerned."""
    known = layers(network)
    found: dict[tuple[int, str], tuple[Tensor, dict[int, set[int]]]] = {}
    for group in groups:
        gone = torch.as_tensor(removed.get(group.name, ()), dtype=torch.int64)
        for member in group.members if len(gone) else ():
            if reading and member.side != "in":
                continue
            positions = member.index[gone].flatten().tolist()
            if member.dim is None:
                holder: nn.Module = known[member.layer]
                targets = dimensions(holder, member.side)
            else:
                holder, name = place(network, member.layer)
                targets = [(name, member.dim)]
            for name, dim in targets:
                entry = found.setdefault((id(holder), name), (getattr(holder, name), {}))
                entry[1].setdefault(dim, set()).update(positions)
    return found


def faithful(network: DynamicNetwork, groups: Sequence[ChannelGroup], removed: Removal) -> bool:
    """Whether the network without these channels answers like the one that does not read them, at all exits."""
    without = copy.deepcopy(network)
    with silenced(network, groups, removed):
        wanted = exit_answers(network)
    try:
        remove(without, groups, removed)
        with redirect_stderr(io.StringIO()):  # torch.fx prints the line of its own code that fails
            found = exit_answers(without)
    except (RuntimeError, ValueError, IndexError, TypeError):  # shapes that do not fit each other
        return False
    return all(
        ours.shape == theirs.shape
        and torch.allclose(ours, theirs, rtol=0, atol=_RELATIVE * float(theirs.abs().max()), equal_nan=True)
        for ours, theirs in zip(found, wanted, strict=True)
    )
