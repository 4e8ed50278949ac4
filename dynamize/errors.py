"""The one error a user is meant to read: what was given, why it is refused, what to type instead."""


class DynamizeError(Exception):
    """Something the user can repair. The command line prints it as one red line and exits with code 2.

    Example:
        >>> dz.source("dynamize:digits_resnt")
        Traceback (most recent call last):
        dynamize.errors.DynamizeError: dynamize has no classification network 'digits_resnt'. Did you mean ...
    """


class InfeasibleError(DynamizeError):
    """A budget that cannot be met. ``nearest`` is the least value that could be asked for instead."""

    def __init__(self, message: str, nearest: float) -> None:
        super().__init__(message)
        self.nearest = nearest


def closest(name: str, known: list[str]) -> str:
    """'Did you mean a, b? ' for an error message, or nothing where no known name is near."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {', '.join(near)}? " if near else ""


def unknown(name: str, what: str, known: list[str]) -> str:
    """'NAME is no WHAT. Did you mean a? Known: a, b.' for an error message."""
    return f"'{name}' is no {what}. {closest(name, known)}Known: {', '.join(sorted(known))}."
