"""How the answers of several networks become one. Importing it imports nothing else: operating points name it."""

from typing import Literal, get_args

Joining = Literal["last", "mean", "product"]
"""The last network's answer; the mean of their probabilities; or their product, which adds up evidence."""


def joinings(combine: Literal["auto"] | Joining) -> tuple[Joining, ...]:
    """Those that calibration may choose from."""
    return get_args(Joining) if combine == "auto" else (combine,)
