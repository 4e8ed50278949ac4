"""torch-pruning's search for channels that go together, ended where it goes round and round.

It is imported only when channels are looked for: networks that were pruned load without torch-pruning.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch_pruning import DependencyGraph

# How often a search may pass each layer; in densenet121 and hrnet_w18_small it passes less than half of them.
_ROUNDS = 8


class Search(DependencyGraph):
    """A dependency graph whose groups say in ``ended`` whether all that belongs to them was found.

    A search passes most layers once. Where slices of channels meet it follows every subset of them by itself, and with
    every round there are twice as many.
    """

    def build_dependency(self, *args: Any, **options: Any) -> "Search":
        super().build_dependency(*args, **options)
        for node in self.module2node.values():
            node.dependencies = _Followed(node.dependencies, self)
        return self

    def get_pruning_group(self, module: Any, pruning_fn: Any, idxs: Any) -> Any:
        self._left = _ROUNDS * len(self.module2node)
        group = super().get_pruning_group(module, pruning_fn, idxs)
        group.ended = self._left > 0
        return group

    def goes_on(self) -> bool:
        """Count one layer that is passed; whether that was not one too many."""
        self._left -= 1
        return self._left > 0


class _Followed(list[Any]):
    """What depends on a layer; nothing any more once the search has gone on for too long."""

    def __init__(self, dependencies: Sequence[Any], search: Search) -> None:
        super().__init__(dependencies)
        self._search = search

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__() if self._search.goes_on() else iter(())
