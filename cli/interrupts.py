"""Ctrl-C, remembered: a package that is just being imported may lose it, and fail in a way of its own afterwards."""

import signal
from types import FrameType

_SEEN: list[int] = []


def remember() -> None:
    """From now on, unless someone else decides what it does."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _note)


def seen() -> bool:
    """Whether it came since."""
    return bool(_SEEN)


def _note(number: int, frame: FrameType | None) -> None:
    _SEEN.append(number)
    signal.default_int_handler(number, frame)
