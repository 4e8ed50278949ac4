"""What a piece does between its parts, as data: the few words that a driver without torch understands.

:meth:`~dynamize.nn.piece.Piece.bind` runs a piece here, :meth:`~dynamize.nn.piece.Piece.instruct` says the same to the
driver of an export (:mod:`dynamize.runtime.driver`), which knows these words and no piece. Parts are named by files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn


@dataclass(frozen=True)
class Rows:
    """A small module of a decision, which is no part of the network, for a backend to compile.

    Attributes:
        module: rows of numbers (n, D) each -> rows of numbers.
        takes: what it is given in order, by name, with the D of each.
        gives: names of what it makes of it in order; "next_NAME" is what images carry as NAME from then on.
    """

    module: nn.Module
    takes: Mapping[str, int]
    gives: tuple[str, ...]


@dataclass(frozen=True)
class Instruction:
    """One word for the driver, and what it concerns."""

    do: ClassVar[str]


@dataclass(frozen=True)
class Through(Instruction):
    """All images go through a part; where it answers, its logits are the features from here on."""

    do = "through"
    part: str


@dataclass(frozen=True)
class Leave(Instruction):
    """Images whose score, which a part gives with their logits, reaches the threshold of a decision leave."""

    do = "leave"
    decision: str
    part: str


@dataclass(frozen=True)
class LeaveJoined(Instruction):
    """The same where the features are a network's logits, which are joined with those of the networks before.

    Attributes:
        decision: its name.
        temperature: of the network's logits before they are joined.
        score: of the joined "answer"; without one those leave on whom all of at least two networks agree.
    """

    do = "leave_joined"
    decision: str
    temperature: float
    score: Rows | None


@dataclass(frozen=True)
class Choose(Instruction):
    """Each image takes the way with the best score, after the offset times its cost is added.

    Attributes:
        decision: its name.
        ways: the part of each option; None changes nothing.
        gate: the part that describes the features for the decision.
        means: whether it describes them by their channel means, which the part before may have handed on.
        costs: of the options, relative to the last one.
        scores: what makes scores of the description.
    """

    do = "choose"
    decision: str
    ways: tuple[str | None, ...]
    gate: str
    means: bool
    costs: tuple[float, ...]
    scores: nn.Linear | Rows


@dataclass(frozen=True)
class Restart(Instruction):
    """Images that are still on their way come in again, and carry on only these values."""

    do = "restart"
    keeps: tuple[str, ...]


@dataclass(frozen=True)
class Keep(Instruction):
    """Images carry from here on, as ``name``, what a part describes of the features."""

    do = "keep"
    part: str
    name: str


@dataclass(frozen=True)
class Add(Instruction):
    """The features become what a part makes of them and of what images carry as ``name``, for the last time."""

    do = "add"
    part: str
    name: str


@dataclass(frozen=True)
class Look(Instruction):
    """Features are kept until the first crop; of what a part describes of them "places" are made, carried on."""

    do = "look"
    part: str
    places: Rows


@dataclass(frozen=True)
class Draw(Instruction):
    """Each image carries as "places" one row of a table, by its own pixels."""

    do = "draw"
    table: list[list[float]]


@dataclass(frozen=True)
class Crop(Instruction):
    """Images that are still on their way come in again, and each shows one of its crops.

    Attributes:
        keeps: what they carry on.
        number: which of their "places" it is at; without places it is the middle.
        side: (H, W) of the crop.
    """

    do = "crop"
    keeps: tuple[str, ...]
    number: int
    side: tuple[int, int]


@dataclass(frozen=True)
class Join(Instruction):
    """The features, a network's logits, are joined with those of the networks before, if these were asked."""

    do = "join"
    temperature: float
