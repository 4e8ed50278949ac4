"""Joining channels that torch-pruning follows one by one, and that only go together: through grouped layers, rearranged
positions, and tensors that several layers share."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Place = tuple[str, str]  # a layer and the side on which it has channels: "out", "in" or "each"
Tie = Mapping[Place, Sequence[int]]
"""For each channel at these places the block that it belongs to: the channels of a block stay or go together."""


@dataclass(frozen=True)
class Item:
    """A layer's part: ``index`` (channels, k) are the k places in it of each channel."""

    place: Place
    index: Tensor


@dataclass(frozen=True)
class Coupled:
    """Channels of several layers of which any may go; ``whole`` where none may."""

    channels: int
    items: tuple[Item, ...]
    whole: bool = False


def joined(found: Sequence[Coupled], ties: Sequence[Tie]) -> list[Coupled]:
    """The same channels, in parts that go together where ties say so.

    A tie with a channel that nothing follows, or one whose channels may not go, leaves all of them whole, and so does
    one whose parts differ in size.
    """
    owners: dict[Place, list[tuple[int, Item]]] = defaultdict(list)
    for group, one in enumerate(found):
        for item in one.items:
            owners[item.place].append((group, item))
    itself = [{place: range(_reach(held))} for place, held in owners.items() if len(held) > 1]
    atoms, lost = _Sets(), set()
    for number, tie in enumerate([*ties, *itself]):
        for place, labels in tie.items():
            blocks = [("block", number, label) for label in labels]
            seen: set[int] = set()
            for group, item in owners[place]:
                for channel, spots in enumerate(item.index.tolist()):
                    seen.update(spots)
                    for spot in spots:
                        atoms.join((group, channel), blocks[spot])
            lost |= {block for spot, block in enumerate(blocks) if spot not in seen}
    return [_merged(found, groups, atoms, lost) for groups in _together(found, atoms)]


def _reach(held: Iterable[tuple[int, Item]]) -> int:
    return 1 + max(int(item.index.max()) for _, item in held)


def _together(found: Sequence[Coupled], atoms: "_Sets") -> list[list[int]]:
    """The groups that have channels in common, each list in order."""
    groups = _Sets()
    for group, one in enumerate(found):
        groups.join(("group", group), ("group", group))
        for channel in range(one.channels):
            if (group, channel) in atoms:
                groups.join(("group", group), ("root", atoms.root((group, channel))))
    lists: dict[Any, list[int]] = defaultdict(list)
    for group in range(len(found)):
        lists[groups.root(("group", group))].append(group)
    return list(lists.values())


def _merged(found: Sequence[Coupled], groups: Sequence[int], atoms: "_Sets", lost: set[Any]) -> Coupled:
    parts: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for group in groups:
        for channel in range(found[group].channels):
            atom = (group, channel)
            parts[atoms.root(atom) if atom in atoms else atom].append(atom)
    whole = any(found[group].whole for group in groups) or not parts.keys().isdisjoint(map(atoms.root, lost))
    order = list(parts.values())
    spots: dict[Place, list[list[int]]] = defaultdict(lambda: [[] for _ in order])
    for number, part in enumerate(order):
        for group, channel in part:
            for item in found[group].items:
                spots[item.place][number] += item.index[channel].tolist()
    items = []
    for place, each in spots.items():
        distinct = [sorted(set(one)) for one in each]
        if len({len(one) for one in distinct}) != 1:
            return Coupled(len(order), (), whole=True)
        items.append(Item(place, torch.tensor(distinct)))
    return Coupled(len(order), tuple(items), whole)


class _Sets:
    """Disjoint sets of anything that can be hashed."""

    def __init__(self) -> None:
        self._above: dict[Any, Any] = {}

    def __contains__(self, one: Any) -> bool:
        return one in self._above

    def root(self, one: Any) -> Any:
        above = self._above.setdefault(one, one)
        while above != self._above[above]:
            self._above[one] = above = self._above[above]
        return above

    def join(self, one: Any, other: Any) -> None:
        first, second = self.root(one), self.root(other)
        self._above[max(first, second, key=repr)] = min(first, second, key=repr)
