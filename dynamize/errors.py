"""The one error a user is meant to read: what was given, why it is refused, what to type instead."""


class DynamizeError(Exception):
    """Something the user can repair. The command line prints it as one red line and exits with code 2.

    Example:
        >>> dz.source("dynamize:digits_resnt")
        Traceback (most recent call last):
        dynamize.errors.DynamizeError: dynamize has no classification network 'digits_resnt'. Did you mean ...
    """


class InfeasibleError(DynamizeError):
    """A budget that cannot be met.

    Attributes:
        nearest: the least value that could be asked for instead, as it is counted inside.
        instead: the same as a recipe writes it, ``("max_drop", "32.8")``; None where no field says it.
    """

    def __init__(self, message: str, nearest: float, instead: tuple[str, str] | None = None, other: str = "") -> None:
        self.fact, self.nearest, self.instead, self.other = message, nearest, instead, other
        super().__init__(message if instead is None else f"{message} Ask for {': '.join(instead)} or more{other}.")

    def asking(self, field: str, value: str) -> "InfeasibleError":
        """The same refusal for a budget that was given in another field."""
        return InfeasibleError(self.fact, self.nearest, (field, value), self.other)


def rounded_up(value: float) -> str:
    """Four significant digits, never below the value, so that typing it works."""
    from math import ceil, floor, log10

    if value <= 0:
        return "0"
    step = 10.0 ** (floor(log10(value)) - 3)
    text = f"{ceil(value / step - 1e-9) * step:.6g}"
    return text if float(text) >= value else repr(value)


def closest(name: str, known: list[str]) -> str:
    """'Did you mean a, b? ' for an error message, or nothing where no known name is near."""
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {', '.join(near)}? " if near else ""


def unknown(name: str, what: str, known: list[str]) -> str:
    """'NAME is no WHAT. Did you mean a? Known: a, b.' for an error message."""
    return f"'{name}' is no {what}. {closest(name, known)}Known: {', '.join(sorted(known))}."
