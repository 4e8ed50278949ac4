"""Reading other people's checkpoints without running their code, fitting them to a network, saving safely.

Files are recognised by content, not by suffix; what cannot be read or does not fit is named, with the repair.
"""

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeGuard

from safetensors import SafetensorError
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from dynamize.errors import DynamizeError
from dynamize.files import atomically
from dynamize.unpickling import read_checkpoint_file

log = logging.getLogger(__name__)

_AVERAGES = ("ema", "state_dict_ema", "model_ema")
WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "net", *_AVERAGES, "module")
_WRAPPER_PREFIXES = ("module.", "model.")
_COMPILED = "_orig_mod."
_MAX_LISTED = 8
_AUXILIARY_HEADS = ("AuxLogits", "aux1", "aux2")
_PROFILER_LEFTOVERS = ("total_ops", "total_params")
# torchvision's and timm's own rule for the DenseNet files of 2017, which contain dots inside module names.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.\w+)$")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The named tensors of a ``torch.save`` or safetensors file, on the CPU.

    Looks inside the usual wrappers (``WRAPPER_KEYS``, nested, in that order of preference), removes
    ``_orig_mod.`` everywhere, and ``module.`` or ``model.`` where every name starts with it. Only tensors and
    plain data are unpickled; nothing in the file is executed.

    Raises:
        DynamizeError: missing, damaged, not a checkpoint, in need of code, or without a state dict inside.
    """
    file = Path(path).expanduser()
    saved = read_checkpoint_file(file, WRAPPER_KEYS)
    found = _find_state(saved, trail=())
    if found is None:
        held = _describe(saved)
        raise DynamizeError(f"{file} holds no state dict: {held}. Save model.state_dict() and pass that.")
    state, trail = found
    if trail:
        averages = [key for key in _AVERAGES if isinstance(saved, Mapping) and key in saved and key != trail[0]]
        if averages:
            log.warning("%s: using %r; it also holds averaged weights under %s", file, trail[0], averages)
        log.info("%s: using the tensors under %s", file, " / ".join(map(repr, trail)))
    return _renamed(_without_average_count(state))


def load_into(
    model: nn.Module, state: Mapping[str, Tensor], name: str, checkpoint: str | os.PathLike[str] = "given"
) -> None:
    """Copies ``state`` into ``model``; every parameter and buffer must be there, with its shape.

    Forgiven, and logged: counters of batch norm that old files lack, auxiliary heads that the network was
    built without (GoogLeNet, Inception), leftovers of profilers, names of old DenseNet files. Nothing is
    copied before everything fits.

    Args:
        name: what to call the network in messages.
        checkpoint: what to call the checkpoint in messages.

    Raises:
        DynamizeError: lists what is missing, unexpected, of wrong shape or type, or a wrong class count.
    """
    own = model.state_dict()
    own_name = _canonical(own)
    targets = {own_name(key): key for key in own}
    given_name = _canonical(state)
    given = _forgive(model, {given_name(key): value for key, value in state.items()}, targets, own)
    missing = [key for key in targets if key not in given]
    unexpected = [key for key in given if key not in targets]
    unlike = [key for key in targets if key in given and not _alike(given[key], own[targets[key]])]
    if missing or unexpected or unlike:
        pairs = {key: (given[key], own[targets[key]]) for key in unlike}
        classes = _class_counts(list(targets), pairs)
        strange = not any(given_name(key) in targets for key in state)
        raise DynamizeError(_misfit(name, checkpoint, missing, unexpected, pairs, classes, strange))
    fitted = OrderedDict((targets[key], value) for key, value in given.items())
    metadata = getattr(state, "_metadata", None) if list(fitted) == list(state) else None
    fitted._metadata = metadata or getattr(own, "_metadata", None)  # type: ignore[attr-defined]
    try:
        model.load_state_dict(fitted)
    except (RuntimeError, ValueError) as error:
        raise DynamizeError(f"The checkpoint {checkpoint} does not fit {name}: {error}") from error


def save_state_dict(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Writes a safetensors file that is either complete or as it was before, whatever happens meanwhile.

    Tensors that share memory are written once each; memory formats become contiguous.

    Raises:
        DynamizeError: the disk is full, the folder is not writable, or a tensor cannot be stored.
    """
    file = Path(path).expanduser()
    try:
        content = safetensors_bytes(_unshared(state), metadata={"format": "pt"})
    except (SafetensorError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise DynamizeError(f"Cannot write {file}, which holds dense tensors only: {error}") from error
    with atomically(file) as temporary:
        temporary.write_bytes(content)


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two of which share storage."""
    seen: set[int] = set()
    result = {}
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[key] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result


def _find_state(saved: object, trail: tuple[str, ...]) -> tuple[Mapping[str, Tensor], tuple[str, ...]] | None:
    """The first state dict inside ``saved`` and the keys that lead to it."""
    if not isinstance(saved, Mapping) or len(trail) > 4:
        return None
    if _is_state(saved):
        return saved, trail
    for key in WRAPPER_KEYS:
        found = _find_state(saved.get(key), (*trail, key))
        if found is not None:
            return found
    others = [key for key, value in saved.items() if _is_state(value)]
    return (saved[others[0]], (*trail, str(others[0]))) if len(others) == 1 else None


def _is_state(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(key, str) and isinstance(entry, Tensor) for key, entry in value.items())


def _describe(saved: object) -> str:
    if not isinstance(saved, Mapping):
        return f"it is a {type(saved).__name__}"
    if not saved:
        return "it is empty"
    entries = [f"{key!r} ({type(value).__name__})" for key, value in saved.items()]
    return f"its entries are {_shortened(entries)}"


def _without_average_count(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Drops the counter that ``torch.optim.swa_utils.AveragedModel`` keeps beside its ``module.``."""
    others = [key for key in state if key != "n_averaged"]
    if len(others) == len(state) or not all(key.startswith("module.") for key in others):
        return state
    return _copy(state, others, lambda key: key)


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _copy(state, state, _canonical(state))


def _copy(state: Mapping[str, Tensor], keys: Iterable[str], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The chosen tensors under new names, with the module versions that ``state_dict()`` recorded."""
    result: OrderedDict[str, Tensor] = OrderedDict((rename(key), state[key].detach()) for key in keys)
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, Mapping):
        paths = OrderedDict((rename(f"{path}.").rstrip("."), version) for path, version in metadata.items())
        result._metadata = paths  # type: ignore[attr-defined]
    return result


def _canonical(keys: Iterable[str]) -> Callable[[str], str]:
    """The renaming that undoes torch.compile, data parallelism and wrapper modules for these names."""
    names = [key.replace(_COMPILED, "") for key in keys]
    prefix = ""
    while names:
        longer = [prefix + p for p in _WRAPPER_PREFIXES if all(name.startswith(prefix + p) for name in names)]
        if not longer:
            break
        prefix = longer[0]
    return lambda key: key.replace(_COMPILED, "").removeprefix(prefix)


def _forgive(
    model: nn.Module, given: dict[str, Tensor], targets: Mapping[str, str], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``given`` without harmless differences to what the network expects."""
    kept = {key if key in targets else _OLD_DENSENET.sub(r"\1\2", key): value for key, value in given.items()}
    unused = [head for head in _AUXILIARY_HEADS if getattr(model, head, model) is None]
    heads = [key for key in kept if key.partition(".")[0] in unused and key not in targets]
    leftovers = [key for key in kept if key.rpartition(".")[2] in _PROFILER_LEFTOVERS and key not in targets]
    counters = [key for key in targets if key not in kept and key.rpartition(".")[2] == "num_batches_tracked"]
    for dropped, reason in ((heads, "auxiliary heads"), (leftovers, "profiler leftovers")):
        if dropped:
            log.info("leaving out %d %s of the checkpoint: %s", len(dropped), reason, _shortened(dropped))
        for key in dropped:
            del kept[key]
    if counters:
        log.info("the checkpoint has no batch norm counters; %d keep their values", len(counters))
    return {key: kept[key] if key in kept else own[targets[key]] for key in (*kept, *counters)}


def _alike(given: Tensor, own: object) -> bool:
    if not isinstance(own, Tensor):
        return True
    return given.shape == own.shape and given.is_floating_point() == own.is_floating_point()


def _class_counts(names: list[str], pairs: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[int, int] | None:
    """(classes in the checkpoint, classes in the network) if only the final classifier's count differs."""
    final = names[-1].rpartition(".")[0] if names else ""
    if not pairs or any(key.rpartition(".")[0] != final for key in pairs):
        return None
    if any(a.dim() == 0 or a.dim() != b.dim() or a.shape[1:] != b.shape[1:] for a, b in pairs.values()):
        return None
    counts = {(given.shape[0], own.shape[0]) for given, own in pairs.values()}
    counted = counts.pop() if len(counts) == 1 else None
    return counted if counted and counted[0] != counted[1] else None


def _misfit(
    name: str,
    checkpoint: str | os.PathLike[str],
    missing: list[str],
    unexpected: list[str],
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    classes: tuple[int, int] | None,
    strange: bool,
) -> str:
    class_line = None
    if classes:
        class_line = (
            f"its classifier ({', '.join(pairs)}) has {classes[0]} classes, the network has {classes[1]}: "
            f"pass num_classes={classes[0]}"
        )
        if not missing and not unexpected:
            return f"The checkpoint {checkpoint} does not fit {name}: {class_line}."
    unlike = [f"{key}: {_kind(a)} in the checkpoint, {_kind(b)} here" for key, (a, b) in pairs.items()]
    groups = (
        ("missing in the checkpoint", missing),
        ("unexpected in the checkpoint", unexpected),
        ("wrong shape or type", unlike),
    )
    lines = [line for title, entries in groups for line in _listed(title, entries)]
    if class_line:
        lines.append(f"  {class_line}")
    advice = "Name the architecture and the keyword arguments with which the checkpoint was trained."
    if strange:
        advice = f"Not one of its names is known here: it is of another architecture. {advice}"
    return "\n".join([f"The checkpoint {checkpoint} does not fit {name}:", *lines, advice])


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _listed(title: str, entries: list[str]) -> Iterator[str]:
    if entries:
        yield f"  {title} ({len(entries)}):"
        yield from (f"    {entry}" for entry in entries[:_MAX_LISTED])
    if len(entries) > _MAX_LISTED:
        yield f"    and {len(entries) - _MAX_LISTED} more"


def _shortened(entries: list[str]) -> str:
    rest = len(entries) - _MAX_LISTED
    return ", ".join(entries[:_MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")
