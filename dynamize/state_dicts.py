"""The weights inside what a checkpoint file holds: usual wrappers, averaged weights beside the plain ones, prefixes."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeGuard

from torch import Tensor, nn

from dynamize.errors import DynamizeError, closest

log = logging.getLogger(__name__)

WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "net", "ema", "state_dict_ema", "model_ema", "module")
WRAPPER_PREFIXES = ("module.", "model.")
COMPILED = "_orig_mod."
_DEEPEST = 4
_MAX_LISTED = 8

State = Mapping[str, Tensor]
Trail = tuple[str, ...]


def find_state(saved: object, file: Path, weights: str | None) -> State:
    """The state dict in ``saved``, the content of ``file``; its names are as they stand there.

    Args:
        weights: which one: a key such as ``model_ema`` or several with dots between, or what the names of the wanted
            ones begin with. None takes the usual one, and names the others in a warning.

    Raises:
        DynamizeError: there is none, several and none is the usual one, or none of that name.
    """
    every = list(_states(saved, ()))
    if weights is not None:
        return _chosen(every, file, weights)
    found = _usual(saved, ()) or _flat(saved)
    if found is None and every:
        several = shortened([".".join(trail) for trail, _ in every])
        raise DynamizeError(f"{file} holds several state dicts, {several}: {_choose(file, every[0][0])}")
    if found is None:
        raise DynamizeError(f"{file} holds no state dict: {_describe(saved)}. Save model.state_dict() and pass that.")
    trail, state = found
    alike = [other for other, one in every if other != trail and _names(one) == _names(state)]
    if alike:
        others = ", ".join(".".join(one) for one in alike)
        here = ".".join(trail) or "the file itself"
        log.warning("%s: using the weights under %s; it also holds %s: %s", file, here, others, _choose(file, alike[0]))
    elif trail:
        log.info("%s: using the tensors under %s", file, " / ".join(map(repr, trail)))
    return state


def renamed(state: State) -> dict[str, Tensor]:
    """Without what torch.compile, data parallelism, averaging and wrapper modules put before the names."""
    state = _without_average_count(state)
    return copied(state, state, canonical(state))


def copied(state: State, keys: Iterable[str], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The chosen tensors under new names, with the module versions that ``state_dict()`` recorded."""
    result: OrderedDict[str, Tensor] = OrderedDict((rename(key), state[key].detach()) for key in keys)
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, Mapping):
        paths = OrderedDict((rename(f"{path}.").rstrip("."), version) for path, version in metadata.items())
        result._metadata = paths  # type: ignore[attr-defined]
    return result


def canonical(keys: Iterable[str]) -> Callable[[str], str]:
    """The renaming that undoes torch.compile, data parallelism and wrapper modules for these names."""
    names = [key.replace(COMPILED, "") for key in keys]
    prefix = ""
    while names:
        longer = [prefix + p for p in WRAPPER_PREFIXES if all(name.startswith(prefix + p) for name in names)]
        if not longer:
            break
        prefix = longer[0]
    return lambda key: key.replace(COMPILED, "").removeprefix(prefix)


def part_of(state: State, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return copied(state, [key for key in state if key.startswith(prefix)], lambda key: key.removeprefix(prefix))


def shortened(entries: list[str]) -> str:
    """The first of them, and how many more there are."""
    rest = len(entries) - _MAX_LISTED
    return ", ".join(entries[:_MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _states(saved: object, trail: Trail) -> Iterator[tuple[Trail, State]]:
    """Every state dict inside, and the keys that lead to it."""
    inside = _opened(saved)
    if is_state(inside):
        yield trail, inside
    elif isinstance(inside, Mapping) and len(trail) <= _DEEPEST:
        for key, value in inside.items():
            yield from _states(value, (*trail, str(key)))


def _usual(saved: object, trail: Trail) -> tuple[Trail, State] | None:
    """The one under the most usual keys, or the only one."""
    inside = _opened(saved)
    if not isinstance(inside, Mapping) or len(trail) > _DEEPEST:
        return None
    if is_state(inside):
        return trail, inside
    for key in WRAPPER_KEYS:
        found = _usual(inside.get(key), (*trail, key))
        if found is not None:
            return found
    others = [(str(key), one) for key, value in inside.items() if is_state(one := _opened(value))]
    return ((*trail, others[0][0]), others[0][1]) if len(others) == 1 else None


def _flat(saved: object) -> tuple[Trail, State] | None:
    """Weights beside which plain values lie: an epoch, a name."""
    if not isinstance(saved, Mapping):
        return None
    tensors = [key for key, value in saved.items() if isinstance(key, str) and isinstance(value, Tensor)]
    beside = [str(key) for key in saved if key not in tensors]
    plain = all(isinstance(saved[key], bool | int | float | str | None) for key in saved if key not in tensors)
    if len(tensors) < 2 or not plain:
        return None
    log.info("leaving out what lies beside the weights: %s", shortened(beside))
    return (), copied(saved, tensors, lambda key: key)


def _opened(value: object) -> object:
    """A module, which only trusted files hold, as its state dict."""
    return value.state_dict() if isinstance(value, nn.Module) else value


def is_state(value: object) -> TypeGuard[State]:
    """Whether it is a mapping of names to tensors that holds any."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())


def _chosen(every: list[tuple[Trail, State]], file: Path, weights: str) -> State:
    for trail, state in every:
        if ".".join(trail) == weights:
            return state
    ends = [state for trail, state in every if weights in trail]
    if len(ends) == 1:
        return ends[0]
    prefix = weights.removesuffix(".") + "."
    parts = [part for _, state in every if (part := part_of(state, prefix))]
    if len(parts) == 1:
        return parts[0]
    known = [".".join(trail) for trail, _ in every if trail]
    tops = sorted({name.partition(".")[0] for trail, state in every if not trail for name in state})
    raise DynamizeError(
        f"{file} holds no weights {weights!r}. {closest(weights, known or tops)}"
        f"It holds {shortened(known or tops) or 'none'}."
    )


def _choose(file: Path, trail: Trail) -> str:
    return f"choose with `checkpoint: {{file: {file}, weights: {'.'.join(trail)}}}` (on the command line: --weights)"


def _names(state: State) -> set[str]:
    return set(renamed(state))


def _describe(saved: object) -> str:
    if not isinstance(saved, Mapping):
        return f"it is a {type(saved).__name__}"
    if not saved:
        return "it is empty"
    return f"its entries are {shortened([f'{key!r} ({type(value).__name__})' for key, value in saved.items()])}"


def _without_average_count(state: State) -> State:
    """Drops the counter that ``torch.optim.swa_utils.AveragedModel`` keeps beside its ``module.``."""
    others = [key for key in state if key != "n_averaged"]
    if len(others) == len(state) or not all(key.startswith("module.") for key in others):
        return state
    return copied(state, others, lambda key: key)
