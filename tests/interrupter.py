"""The user who presses ctrl-C in the middle of a training."""

from collections.abc import Iterable, Iterator
from typing import Any


class Interrupter:
    """A progress reporter that lets so many steps through, over all epochs, and then the user presses ctrl-C."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self, items: Iterable[Any], label: str, total: int) -> Iterator[Any]:
        for item in items:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield item
