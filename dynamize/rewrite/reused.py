"""Letting a network go on with what the same network has seen of the same images at another size."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import cast

from torch import fx

from dynamize.errors import DynamizeError
from dynamize.graph.cuts import CutPoint, cut_points, find_cut
from dynamize.graph.macs import annotated_macs
from dynamize.graph.nodes import positions
from dynamize.graph.trace import annotate
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import MAIN
from dynamize.nn.reuse import Fuse, Keep
from dynamize.nn.row import outside

_WORTH = 0.1  # of the network's MACs: what is computed at a resolution for less is not handed on
_LAST = 2  # resolutions: larger maps take longer to hand on than they are worth


def meeting_points(network: DynamicNetwork, wanted: Sequence[str] | None) -> list[str]:
    """Cut points of the recipe's network, outside of its gated units, at which another pass may hand on its maps.

    Args:
        wanted: node names or module paths; None for the ends of the last two resolutions at which the network computes
            much.

    Raises:
        DynamizeError: one is no cut point, or there is none.
    """
    annotate(network.plain, network.input_shape)
    position = positions(network.plain.graph)
    cuts = [cut for cut in cut_points(network.plain) if outside(position, cut.name, network.changing)]
    if not cuts:
        raise DynamizeError("cascade: reuse: the network has no cut point at which feature maps could be handed on")
    if wanted is not None:
        return list(dict.fromkeys(find_cut(cuts, name).name for name in wanted))
    last = list({cut.shape[1:]: cut for cut in cuts}.values())
    computed = [cut.macs - before for cut, before in zip(last, [0.0, *(cut.macs for cut in last)], strict=False)]
    least = _WORTH * annotated_macs(network.plain)
    much = [cut.name for cut, macs in zip(last, computed, strict=True) if macs >= least]
    return much[-_LAST:] or [last[-1].name]


def reuse(network: DynamicNetwork, members: Sequence[str], places: Sequence[str]) -> float:
    """Let each of some networks of a row, copies of the recipe's own and that itself, go on with the maps of the one
    before it.

    Args:
        network: with the row, whose restarts let maps through.
        members: names, in order.
        places: names of cut points.

    Returns:
        MACs per image that this takes.

    Raises:
        DynamizeError: a copy has no such cut point.
    """
    found = {name: _points(name, cast(fx.GraphModule, network.nets[name]), places) for name in members}
    fused = {
        _at(after, place): Fuse(number, found[before][place].shape, found[after][place].shape)
        for before, after in pairwise(members)
        for number, place in enumerate(places, start=1)
    }
    kept = {_at(before, place): Keep(number) for before in members[:-1] for number, place in enumerate(places, start=1)}
    network.insert(fused)
    network.insert(kept)
    return sum(piece.macs for piece in fused.values())


def _points(name: str, net: fx.GraphModule, places: Sequence[str]) -> Mapping[str, CutPoint]:
    known = {cut.name: cut for cut in cut_points(net)}
    missing = [place for place in places if place not in known]
    if missing:
        raise DynamizeError(
            f"cascade: reuse: {name} has no feature map at {', '.join(missing)}: name other cut points, or give a "
            "larger resolution"
        )
    return {place: known[place] for place in places}


def _at(member: str, place: str) -> str:
    return place if member == MAIN else f"{member}/{place}"
