"""Reading what earlier versions wrote: artifacts of format 1, and runs that they left unfinished.

Format 1 named weights by segment and by the place of a piece in it; thresholds and temperatures were lists.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dynamize.nn.network import DynamicNetwork, key_of
from dynamize.nn.piece import Piece

_OLD = ("segments.", "heads.", "fusion.", "memory.", "temperatures")
_LAYER_NAMES = re.compile(r"(exits|heads|gates)\.(\d+|fusion|memory)\b\.?(.*)")


def upgraded_manifest(plain: Any) -> Any:
    """A manifest as plain data in today's format."""
    if not isinstance(plain, Mapping) or plain.get("format") != 1:
        return plain
    listed = plain.get("temperatures")
    temperatures = None if listed is None else {f"exit.{k}": value for k, value in enumerate(listed, start=1)}
    return {**plain, "format": 2, "temperatures": temperatures}


def upgraded(state: Mapping[str, Tensor], network: DynamicNetwork) -> Mapping[str, Tensor]:
    """A state dict under today's names.

    Args:
        network: that the state is for, of today.
    """
    if not any(name.startswith(_OLD) for name in state):
        return state
    prefixes = dict(_prefixes(network))
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "temperatures":
            found |= {
                f"pieces.{key_of(piece.name)}.temperature": value
                for piece, value in zip(network.leaving, tensor, strict=True)
            }
            continue
        old = max((one for one in prefixes if name.startswith(one)), key=len, default="")
        for new in prefixes.get(old, ("",)):
            found[new + name.removeprefix(old)] = tensor
    return found


def upgraded_optimizer(
    optimizer: Mapping[str, Any], state: Mapping[str, Tensor], network: DynamicNetwork
) -> Mapping[str, Any]:
    """The state of an optimizer, which numbers parameters in the order in which the network has them, in today's order.

    Args:
        optimizer: its state dict.
        state: that of the network from the same time.
        network: of today, with what is trained requiring gradients.
    """
    today = upgraded(state, network)
    if today is state:
        return optimizer
    place = {id(tensor): number for number, tensor in enumerate(state.values())}
    trained = [place[id(today[name])] for name, one in network.named_parameters() if one.requires_grad]
    number = {one: old for old, one in enumerate(sorted(trained))}
    moments = {new: optimizer["state"][number[one]] for new, one in enumerate(trained)} if optimizer["state"] else {}
    return {**optimizer, "state": moments}


def _prefixes(network: DynamicNetwork) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What names of format 1 began with, and what those of today do."""
    for k, pieces in enumerate(_segments(network)):
        gated = any(piece.effect is not None for piece in pieces)
        for i, piece in enumerate(pieces):
            old = f"segments.{k}.pieces.{i}." if gated else f"segments.{k}."
            own = f"pieces.{key_of(piece.name)}."
            if piece.effect is None:
                yield old, (f"{own}module." if network.frozen else "nets.main.",)
                continue
            yield old, (own,)
            yield f"{old}body.", ("nets.main.",)
            yield f"{old}ways.", (f"{own}frozen.",)
    for k, piece in enumerate(network.leaving):
        yield f"heads.{k}.", (f"pieces.{key_of(piece.name)}.head.",)
    yield "fusion.", ("pieces.fusion.linear.",)
    recurrent = [unit for unit in network.changing if not unit.gate.alone]
    yield "memory.", tuple(f"pieces.{key_of(unit.name)}.gate.memory." for unit in recurrent)


def _segments(network: DynamicNetwork) -> list[list[Piece]]:
    """The pieces between two exits, as format 1 had them together."""
    found: list[list[Piece]] = [[]]
    for piece in network.row:
        if piece.effect == "leaves":
            found.append([])
        elif not piece.answers:
            found[-1].append(piece)
    return found


def upgraded_names(plain: Any, network: DynamicNetwork) -> Any:
    """Plain data of a resolved step in which layers of exits and gates have today's names.

    Args:
        network: as it stands before the step.
    """
    if isinstance(plain, Mapping):
        return {_upgraded_name(name, network): upgraded_names(value, network) for name, value in plain.items()}
    if isinstance(plain, list):
        return [upgraded_names(value, network) for value in plain]
    return _upgraded_name(plain, network) if isinstance(plain, str) else plain


def _upgraded_name(name: str, network: DynamicNetwork) -> str:
    match = _LAYER_NAMES.fullmatch(name)
    if match is None:
        return name
    kind, number, rest = match.groups()
    if number == "fusion":
        return "pieces.fusion.linear"
    pieces: list[Any] = network.changing if kind == "gates" else network.leaving
    inner = "gate" if kind == "gates" else "head"
    if number == "memory":
        holder, rest = next(unit for unit in pieces if not unit.gate.alone), f"memory.{rest}".rstrip(".")
    elif int(number) < len(pieces):
        holder = pieces[int(number)]
    else:
        return name
    return f"pieces.{key_of(holder.name)}.{inner}.{rest}".rstrip(".")
