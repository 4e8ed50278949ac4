"""Reading other people's checkpoints without running their code, fitting them to a network, saving safely.

Files are recognised by content, not by suffix; what cannot be read or does not fit is named, with the repair.
"""

import copy
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from safetensors import SafetensorError
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from dynamize.errors import DynamizeError
from dynamize.files import atomically
from dynamize.state_dicts import WRAPPER_KEYS, WRAPPER_PREFIXES, canonical, find_state, part_of, renamed, shortened
from dynamize.unpickling import read_checkpoint_file, unpickle

log = logging.getLogger(__name__)

_MAX_LISTED = 8
_COUNTER = "num_batches_tracked"
_OF_TRAINING = ("criterion", "loss", "loss_fn", "loss_func", "metrics")  # modules beside the network
_AUXILIARY_HEADS = ("AuxLogits", "aux1", "aux2")
_PROFILER_LEFTOVERS = ("total_ops", "total_params")
# torchvision's and timm's own rule for the DenseNet files of 2017, which contain dots inside module names.
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.\w+)$")


def read_state_dict(
    path: str | os.PathLike[str],
    weights: str | None = None,
    *,
    trust_code: bool = False,
    main: ModuleType | None = None,
) -> dict[str, Tensor]:
    """The named tensors of a ``torch.save`` or safetensors file, on the CPU.

    Looks inside the usual wrappers (``WRAPPER_KEYS``, nested, in that order of preference), removes
    ``_orig_mod.`` everywhere, and ``module.`` or ``model.`` where every name starts with it. Only tensors and
    plain data are unpickled; nothing in the file is executed unless it is trusted.

    Args:
        weights: which of several, such as ``model_ema``.
        trust_code: whether a file of ``torch.save(model)`` may run the code that it names.
        main: where classes are looked for that the training script defined itself.

    Raises:
        DynamizeError: missing, damaged, not a checkpoint, in need of code, or without such a state dict inside.
    """
    file = Path(path).expanduser()
    saved = unpickle(file, main) if trust_code else None
    if saved is None:
        saved = read_checkpoint_file(file, WRAPPER_KEYS)
    return renamed(find_state(saved, file, weights))


def load_into(
    model: nn.Module, state: Mapping[str, Tensor], name: str, checkpoint: str | os.PathLike[str] = "given"
) -> None:
    """Copies ``state`` into ``model``; every parameter and buffer must be there, with its shape.

    What the model's own hooks for loading make fit, fits. Forgiven, and logged: counters of batch norm that old files
    lack, tied weights that are stored once, auxiliary heads that the network was built without (GoogLeNet, Inception),
    what training kept beside the network, leftovers of profilers, names of old DenseNet files. Nothing is copied before
    everything fits.

    Args:
        name: what to call the network in messages.
        checkpoint: what to call the checkpoint in messages.

    Raises:
        DynamizeError: lists what is missing, unexpected, of wrong shape or type, or a wrong class count.
    """
    own = model.state_dict()
    own_name = canonical(own)
    targets = {own_name(key): key for key in own}
    state = _network_in(state, targets, checkpoint)
    given_name = canonical(state)
    given = _forgive(model, {given_name(key): value for key, value in state.items()}, targets, own)
    missing = [key for key in targets if key not in given]
    unexpected = [key for key in given if key not in targets]
    unlike = [key for key in targets if key in given and not _alike(given[key], own[targets[key]])]
    if missing or unexpected or unlike:
        pairs = {key: (given[key], own[targets[key]]) for key in unlike}
        if all(one.shape != other.shape for one, other in pairs.values()):
            hooked = _through_hooks(model, state)
            if hooked is None:
                return
            if sum(map(len, hooked)) < len(missing) + len(unexpected):
                missing, unexpected = hooked
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


def _network_in(
    state: Mapping[str, Tensor], targets: Mapping[str, str], checkpoint: str | os.PathLike[str]
) -> Mapping[str, Tensor]:
    """The network's part of the state of a whole training module, such as one of Lightning."""
    first = next(iter(targets), None)
    if first is None or first in state:
        return state
    places = [key.removesuffix(first) for key in state if key.endswith(f".{first}")]
    fitting = [place for place in places if all(place + key in state or key.endswith(_COUNTER) for key in targets)]
    usual = [place for place in WRAPPER_PREFIXES if place in fitting]
    chosen = next(iter(usual or fitting), None)
    if chosen is None or (len(fitting) > 1 and not usual):
        return state
    beside = sorted({key.partition(".")[0] for key in state if not key.startswith(chosen)})
    if beside:
        log.warning(
            "%s: using the weights under %s, leaving out %s; another part is chosen with weights (--weights)",
            checkpoint, chosen.removesuffix("."), shortened(beside),
        )  # fmt: skip
    return part_of(state, chosen)


def _through_hooks(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[list[str], list[str]] | None:
    """Load by torch's own way, on which the hooks lie with which networks read older names; None where all fitted.

    Tried on a copy first, so that nothing is copied before everything fits.

    Returns:
        what was missing and what unexpected after the hooks, otherwise.
    """
    try:
        trial = copy.deepcopy(model)
        trial.load_state_dict(state)
    except Exception:  # in hooks of the user's own anything can fail
        try:
            found = trial.load_state_dict(state, strict=False)
            return list(found.missing_keys), list(found.unexpected_keys)
        except Exception:
            return list(model.state_dict()), list(state)
    model.load_state_dict(state)
    return None


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


def _forgive(
    model: nn.Module, given: dict[str, Tensor], targets: Mapping[str, str], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``given`` without harmless differences to what the network expects."""
    kept = {key if key in targets else _OLD_DENSENET.sub(r"\1\2", key): value for key, value in given.items()}
    unused = [head for head in _AUXILIARY_HEADS if getattr(model, head, model) is None]
    heads = [key for key in kept if key.partition(".")[0] in unused and key not in targets]
    leftovers = [key for key in kept if key.rpartition(".")[2] in _PROFILER_LEFTOVERS and key not in targets]
    training = [key for key in kept if key.partition(".")[0] in _OF_TRAINING and key not in targets]
    counters = [key for key in targets if key not in kept and key.rpartition(".")[2] == _COUNTER]
    kept |= _tied(kept, targets, own)
    for dropped, reason in (
        (heads, "auxiliary heads"),
        (leftovers, "profiler leftovers"),
        (training, "tensors of training"),
    ):
        if dropped:
            log.info("leaving out %d %s of the checkpoint: %s", len(dropped), reason, shortened(dropped))
        for key in dropped:
            del kept[key]
    if counters:
        log.info("the checkpoint has no batch norm counters; %d keep their values", len(counters))
    return {key: kept[key] if key in kept else own[targets[key]] for key in (*kept, *counters)}


def _tied(given: Mapping[str, Tensor], targets: Mapping[str, str], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is missing because it is one tensor with what is given."""
    stored = {_place(own[key]): name for name, key in targets.items() if name in given}
    missing = {name: _place(own[key]) for name, key in targets.items() if name not in given}
    return {name: given[stored[place]] for name, place in missing.items() if place in stored}


def _place(tensor: object) -> object:
    """Where a tensor lies, the same for two names of one."""
    if not isinstance(tensor, Tensor) or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _alike(given: Tensor, own: object) -> bool:
    """Of one shape and kind; averages of whole numbers are whole numbers in floating point."""
    if not isinstance(own, Tensor):
        return True
    kind = given.is_floating_point() == own.is_floating_point()
    whole = given.is_floating_point() and not own.is_floating_point() and bool((given == given.round()).all())
    return given.shape == own.shape and (kind or whole)


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
