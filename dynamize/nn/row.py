"""From the original graph to a row of pieces: those that were put into it, and the static ones between them."""

from collections.abc import Sequence
from itertools import combinations
from typing import cast

from torch import fx, nn

from dynamize.errors import DynamizeError
from dynamize.graph.extract import extract
from dynamize.graph.nodes import output_value, placeholder, positions
from dynamize.nn.piece import MAIN, Piece, Setting, Static
from dynamize.nn.units import Unit

Region = tuple[str, str]  # from one cut point to another


def build_row(plain: nn.Module, placed: Sequence[Piece], member: str = MAIN) -> tuple[Piece, ...]:
    """The pieces of one network in order of execution, with what is left of the network between them.

    Args:
        plain: the whole network; without pieces it need not be a graph.
        placed: none of their regions overlap, and none holds the place of another one inside.
        member: the network's name.
    """
    row = (_static(plain, "input", "output"),) if not placed else _in_order(plain, placed)
    for piece in row:
        piece.member = member
    return row


def needed(row: Sequence[Piece], setting: Setting, everyone: bool = False) -> list[Piece]:
    """The pieces that run at a setting: without those that are idle, and those whose outcome a restart throws away
    before anything is decided by it."""
    found: list[Piece] = []
    for piece in row:
        if piece.restarts:
            while found and found[-1].effect != "leaves":
                found.pop()
            if not found and not piece.cuts:
                continue
        if everyone or not piece.idle(setting):
            found.append(piece)
    return found


def _in_order(plain: nn.Module, placed: Sequence[Piece]) -> tuple[Piece, ...]:
    assert isinstance(plain, fx.GraphModule)
    position = positions(plain.graph)
    ordered = sorted(placed, key=lambda piece: [*(position[end] for end in piece.place), piece.rank])
    first, end = placeholder(plain.graph).name, output_value(plain.graph).name
    row: list[Piece] = []
    for piece in ordered:
        row += _between(plain, first, piece.place[0])
        piece.settle(plain)
        row.append(piece)
        first = piece.place[1]
    row += _between(plain, first, end)
    _mark_fresh(row)
    return tuple(row)


def _between(plain: fx.GraphModule, first: str, last: str) -> list[Piece]:
    if first == last:
        return []
    module = extract(plain, first, last)
    return [] if _changes_nothing(module) else [_static(module, first, last)]


def _static(module: nn.Module, first: str, last: str) -> Static:
    static = Static(module).train(module.training)
    static.place = (first, last)
    return static


def _changes_nothing(module: fx.GraphModule) -> bool:
    """Whether it only hands on what it is given, as a block does that is skipped for good."""
    nodes = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
    layers = [module.get_submodule(str(node.target)) if node.op == "call_module" else None for node in nodes]
    return all(isinstance(layer, nn.Identity) for layer in layers)


def _mark_fresh(row: Sequence[Piece]) -> None:
    """Tell each unit whether it is the first behind an exit, where a recurrent gate starts anew."""
    fresh = True
    for piece in row:
        if isinstance(piece, Unit):
            piece.fresh = fresh
        fresh = piece.effect == "leaves" or (fresh and piece.effect is None)


def refuse_misplaced(plain: fx.GraphModule, placed: Sequence[Piece]) -> None:
    """Say of all pieces that cannot stand where they were put why not.

    Raises:
        DynamizeError: a place is no node, or regions overlap.
    """
    position = positions(plain.graph)
    names = [piece.name for piece in placed]
    faults = [f"'{name}' is the name of {names.count(name)}" for name in dict.fromkeys(names) if names.count(name) > 1]
    faults += [
        f"'{piece.name}' is put at '{end}', which is no node of the network"
        for piece in placed
        for end in dict.fromkeys(piece.place)
        if end not in position
    ]
    known = [piece for piece in placed if all(end in position for end in piece.place)]
    ends = {piece.name: [position[end] for end in piece.place] for piece in known}
    faults += [f"'{name}' ends before it starts" for name, (start, end) in ends.items() if end < start]
    for (one, (start, end)), (other, (after, upto)) in combinations(ends.items(), 2):
        if start < upto and after < end:
            faults.append(f"'{one}' and '{other}' overlap")
    if faults:
        raise DynamizeError(
            f"the pieces cannot stand where they were put: {'; '.join(faults)}. Pieces may touch but not overlap, and "
            "`dynamize inspect` lists the cut points. Nothing was changed."
        )


def outside(position: dict[str, int], name: str, pieces: Sequence[Piece]) -> bool:
    """Whether a node lies inside none of the pieces' regions; their ends are outside."""
    return not any(position[piece.place[0]] < position[name] < position[piece.place[1]] for piece in pieces)


def spans(plain: fx.GraphModule, pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Positions of both ends of each piece."""
    position = positions(plain.graph)
    return [cast(tuple[int, int], tuple(position[end] for end in piece.place)) for piece in pieces]
