"""Where a network comes from: a name in torchvision, timm or dynamize, or a factory in somebody's code.

A source is data (``SourceSpec``) until it is built; code is imported only when the caller trusts it.
"""

import difflib
import http.client
import importlib
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from dynamize.checkpoints import load_into, read_state_dict
from dynamize.errors import DynamizeError
from dynamize.models import REGISTRY, create
from dynamize.sections import InWords, Section
from dynamize.usercode import call_factory, defining

log = logging.getLogger(__name__)

Scalar = bool | int | float | str | None
Library = Literal["torchvision", "timm", "dynamize"]

LIBRARIES: tuple[Library, ...] = ("torchvision", "timm", "dynamize")
FORMS = "torchvision:NAME, timm:NAME, dynamize:NAME, file.py:factory or package.module:factory"
_WITH_ARGUMENTS = re.compile(r"(.+?)((?:,[A-Za-z_]\w*=[^,]*)*)", re.DOTALL)
_AUXILIARY = ("googlenet", "inception_v3")
_PRETRAINED_KEYS = ("weights", "pretrained")
Weights = str | os.PathLike[str] | Mapping[str, Any]  # a file, or {"file": ..., "weights": ...}
_ORIGINS: WeakKeyDictionary[nn.Module, "SourceSpec"] = WeakKeyDictionary()
_REMOTE_TIMM = ("hf-hub:", "hf_hub:", "local-dir:")


class Checkpoint(Section):
    """A file of weights, and which of those in it."""

    file: Path = Field(description=".pt, .pth, .th or .safetensors file")
    weights: str | None = Field(
        None, description="a key of the file, such as model_ema, or how the names of them begin"
    )

    def read(self, trust_code: bool = False, main: ModuleType | None = None) -> dict[str, Tensor]:
        """The tensors by name; see ``read_state_dict``."""
        return read_state_dict(self.file, self.weights, trust_code=trust_code, main=main)


class SourceSpec(Section, metaclass=InWords):
    """A network's origin as plain data: what a recipe and an artifact store.

    ``source`` takes keyword arguments after commas, ``"torchvision:resnet50,num_classes=10"``; they are moved
    to ``kwargs``. Creating a spec imports nobody's code and opens no file.
    """

    source: str = Field(description=FORMS)
    kwargs: dict[str, Scalar] = Field(default_factory=dict, description="keyword arguments of the factory")
    checkpoint: Path | Checkpoint | None = Field(
        default=None, description=".pt, .pth, .th or .safetensors file, or {file: PATH, weights: model_ema}"
    )

    @model_validator(mode="before")
    @classmethod
    def _move_arguments(cls, data: Any) -> Any:
        text = data.get("source") if isinstance(data, Mapping) else None
        match = _WITH_ARGUMENTS.fullmatch(text) if isinstance(text, str) else None
        if match is None or not match[2]:
            return data
        pairs = [item.partition("=") for item in match[2].removeprefix(",").split(",")]
        inline = {key: _scalar(value) for key, _, value in pairs}
        given = data.get("kwargs") or {}
        twice = [key for key in inline if key in given] if isinstance(given, Mapping) else []
        if twice or len(inline) < len(pairs):
            raise ValueError(f"a keyword argument of {text!r} is given twice: keep one")
        return {**data, "source": match[1], "kwargs": {**given, **inline}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        target, factory = self.target
        if self.library is not None:
            known = bool(factory)
        else:
            parts = target.split(".")
            known = factory.isidentifier() and (target.endswith(".py") or all(part.isidentifier() for part in parts))
        if not known:
            raise ValueError(f"{self.source!r} is not a source: write {_which_library(self.source)}{FORMS}")
        return self

    @property
    def library(self) -> Library | None:
        """The library whose names the source uses; ``None`` if it names code."""
        head, colon, _ = self.source.partition(":")
        return next((library for library in LIBRARIES if colon and head == library), None)

    @property
    def target(self) -> tuple[str, str]:
        """``(library, network)``, ``(file.py, factory)`` or ``(package.module, factory)``."""
        split = self.source.partition if self.library else self.source.rpartition
        target, _, factory = split(":")
        return target, factory

    @property
    def names_code(self) -> bool:
        """Whether building it imports code that neither dynamize nor a model library ships."""
        return self.library is None

    @property
    def weights(self) -> "Checkpoint | None":
        """The checkpoint, whichever way it was written."""
        return Checkpoint(file=self.checkpoint) if isinstance(self.checkpoint, Path) else self.checkpoint

    def with_weights(self, checkpoint: Weights) -> "SourceSpec":
        """The same network with the weights of another file."""
        return parse(self.source, checkpoint, self.kwargs)

    def structure(self) -> "SourceSpec":
        """The same network without checkpoint and pretrained weights: what an artifact stores."""
        kwargs = {key: value for key, value in self.kwargs.items() if key not in _PRETRAINED_KEYS}
        if self.names_code:
            kwargs = dict(self.kwargs)
        elif self.library == "torchvision" and self.target[1] in _AUXILIARY and self.kwargs.get("weights"):
            kwargs.setdefault("transform_input", True)  # torchvision's own choice for its weights
        return self.model_copy(update={"kwargs": kwargs, "checkpoint": None})


def parse(source: str, checkpoint: Weights | None = None, kwargs: Mapping[str, Scalar] | None = None) -> SourceSpec:
    """A ``SourceSpec`` from what a user typed.

    Raises:
        DynamizeError: the source has none of the known forms, or an argument is not a plain value.
    """
    try:
        given = {"source": source, "kwargs": dict(kwargs or {}), "checkpoint": checkpoint}
        return SourceSpec.model_validate(given)
    except ValidationError as error:
        bad = [key for key, value in (kwargs or {}).items() if not isinstance(value, Scalar)]
        if bad:
            raise DynamizeError(
                f"The arguments {', '.join(bad)} of {source!r} are not plain values (true, 3, 0.5, text): a "
                "source is stored as data. Build the network in Python and pass the module."
            ) from error
        fault = error.errors()[0]
        where = "" if fault["type"] == "value_error" else "".join(f"{part}: " for part in fault["loc"][:1])
        raise DynamizeError(f"{where}{fault['msg'].removeprefix('Value error, ')}.") from error


def build(spec: SourceSpec, *, trust_code: bool | None) -> nn.Module:
    """The network as its factory leaves it, in training mode; no checkpoint is read.

    Nothing is downloaded unless asked for (torchvision ``weights="DEFAULT"``, timm ``pretrained=True``).
    torchvision's ``googlenet`` and ``inception_v3`` are built without auxiliary heads (which idle in eval)
    unless ``aux_logits=True`` is given.

    Args:
        trust_code: whether ``file.py:factory`` and ``package.module:factory`` may be imported; None: they were named
            by the user, and may.

    Raises:
        DynamizeError: unknown name, unaccepted argument, untrusted or failing code, a failed download.
    """
    if spec.names_code:
        if trust_code is False:
            raise DynamizeError(
                f"The source {spec.source!r} names code, which is not run by itself: read that code, then "
                "name the source on the command line or add --trust-code (in Python: trust_code=True)."
            )
        return call_factory(*spec.target, spec.kwargs)
    if spec.library == "torchvision":
        return _from_torchvision(spec)
    return _from_timm(spec) if spec.library == "timm" else _from_dynamize(spec)


def load_source(spec: SourceSpec, trust_code: bool | None) -> nn.Module:
    """The network of ``spec`` with its checkpoint, in eval mode.

    Args:
        trust_code: True runs the code that source and checkpoint name, None that of the source only, False none.

    Raises:
        DynamizeError: as ``build``, ``read_state_dict`` and ``load_into``.
    """
    pretrained = [key for key in _PRETRAINED_KEYS if spec.library and spec.kwargs.get(key)]
    if spec.checkpoint is not None and pretrained:
        raise DynamizeError(
            f"{spec.source} has both a checkpoint ({spec.checkpoint}) and {pretrained[0]}="
            f"{spec.kwargs[pretrained[0]]!r}: keep one of them."
        )
    weights, pickles = spec.weights, trust_code is True
    state = weights.read() if weights and not pickles else None  # a bad file is refused before any code runs
    model = build(spec, trust_code=trust_code)
    if weights is not None:
        state = weights.read(True, defining(spec.target[0])) if state is None else state
        load_into(model, state, spec.source, weights.file)
        rescales = spec.library == "torchvision" and spec.target[1] in _AUXILIARY
        if rescales and "transform_input" not in spec.kwargs:
            log.warning("%s: torchvision's own weights need transform_input=True; is this one?", spec.source)
    _ORIGINS[model] = spec
    return model.eval()


def origin(network: nn.Module) -> SourceSpec | None:
    """Where a network that ``load_source`` made came from; None for any other module."""
    return _ORIGINS.get(network)


def source(
    source: str | nn.Module,
    checkpoint: Weights | None = None,
    trust_code: bool | None = None,
    **kwargs: Scalar,
) -> nn.Module:
    """A trained network in eval mode, from a name or from a module of your own.

    ``source("torchvision:resnet50", checkpoint="mine.pt", num_classes=10)``. A module is filled from the
    checkpoint and returned. ``checkpoint={"file": "mine.pt", "weights": "model_ema"}`` takes the averaged weights.

    Args:
        trust_code: None runs the code that you name yourself here, True also that which a checkpoint of
            ``torch.save(model)`` names, False none.

    Raises:
        DynamizeError: as ``load_source``.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> sum(p.numel() for p in net.parameters())
        97562
    """
    if not isinstance(source, nn.Module):
        return load_source(parse(source, checkpoint, kwargs), trust_code)
    if kwargs:
        given = ", ".join(kwargs)
        raise DynamizeError(f"A module is already built and takes no arguments, got {given}: leave them out.")
    if checkpoint is not None:
        weights = parse("dynamize:module", checkpoint).weights
        assert weights is not None
        state = weights.read(trust_code is True, sys.modules.get(type(source).__module__))
        load_into(source, state, type(source).__name__, weights.file)
    return source.eval()


def available(library: Library) -> list[str]:
    """The networks of a library, by name, sorted. Classification networks only.

    Raises:
        DynamizeError: the library is unknown or not installed.
    """
    if library == "dynamize":
        return list(REGISTRY)
    if library == "torchvision":
        from torchvision import models

        return sorted(models.list_models(module=models))
    if library == "timm":
        return sorted(_timm().list_models())
    raise DynamizeError(f"No library {library!r}: use one of {', '.join(LIBRARIES)}.")


def _scalar(text: str) -> Scalar:
    """``true``, ``none``, ``3``, ``0.5`` or text, as a value."""
    word = text.strip()
    constants: dict[str, Scalar] = {"true": True, "false": False, "none": None, "null": None}
    if word.lower() in constants:
        return constants[word.lower()]
    for number in (int, float):
        try:
            return number(word) if not word.isalpha() else word
        except ValueError:
            continue
    return word


def _which_library(name: str) -> str:
    holders = [f"{library}:{name}" for library in ("dynamize", "torchvision") if name in available(library)]
    return "".join(f"{holder}, or in general " for holder in holders[:1])


def _unknown(library: Library, name: str, names: Sequence[str]) -> DynamizeError:
    close = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    meant = f" Did you mean {', '.join(close)}?" if close else ""
    command = f"python -c \"from dynamize.sources import available; print(*available('{library}'))\""
    return DynamizeError(f"{library} has no classification network {name!r}.{meant} All names: {command}")


def _from_dynamize(spec: SourceSpec) -> nn.Module:
    name = spec.target[1]
    if name not in REGISTRY:
        raise _unknown("dynamize", name, list(REGISTRY))
    try:
        return create(name, **spec.kwargs)
    except TypeError as error:
        raise _unaccepted(spec, error) from error


def _from_torchvision(spec: SourceSpec) -> nn.Module:
    from torchvision import models

    name = spec.target[1]
    if name not in models.list_models(module=models):
        raise _unknown("torchvision", name, available("torchvision"))
    if "pretrained" in spec.kwargs:
        raise DynamizeError(f"{spec.source}: torchvision's argument is called weights: pass weights=DEFAULT.")
    kwargs = dict(spec.kwargs)
    weights = _weights(spec, models.get_model_weights(name), kwargs.pop("weights", None))
    keeps_auxiliary = bool(kwargs.get("aux_logits"))
    if name in _AUXILIARY:
        if weights is None:
            kwargs = {"aux_logits": False, "init_weights": False, **kwargs}
        elif not keeps_auxiliary:  # torchvision refuses False: it loads its weights with the heads, then drops them
            kwargs.pop("aux_logits", None)
    try:
        model = models.get_model(name, weights=weights, **{"progress": False, **kwargs})
    except (OSError, http.client.HTTPException) as error:
        raise _no_download(spec, getattr(weights, "url", "the weights"), error) from error
    except (RuntimeError, TypeError, ValueError) as error:
        if "invalid hash" in str(error):  # torch.hub: the file came cut off or changed
            raise _no_download(spec, getattr(weights, "url", "the weights"), error) from error
        raise _unaccepted(spec, error) from error
    if name in _AUXILIARY and not keeps_auxiliary:
        model.aux_logits = False
        for head in ("aux1", "aux2") if name == "googlenet" else ("AuxLogits",):
            setattr(model, head, None)
    return model


def _weights(spec: SourceSpec, choices: Any, value: Scalar) -> Any:
    """The member of torchvision's weights enumeration that ``value`` names."""
    if value is None:
        return None
    key = str(value).rpartition(".")[2]
    if key not in choices.__members__:
        names = ", ".join(choices.__members__)
        raise DynamizeError(f"{spec.source} has no weights {value!r}: use one of {names}.")
    return choices[key]


def _timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise DynamizeError("timm is not installed: pip install 'dynamize[timm]'.") from error


def _from_timm(spec: SourceSpec) -> nn.Module:
    timm = _timm()
    name = spec.target[1]
    if not name.startswith(_REMOTE_TIMM) and not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    if "checkpoint_path" in spec.kwargs:
        raise DynamizeError(f"{spec.source}: leave out checkpoint_path and pass the file as checkpoint.")
    try:
        model: nn.Module = timm.create_model(name, **spec.kwargs)
    except (TypeError, ValueError) as error:
        raise _unaccepted(spec, error) from error
    except Exception as error:  # timm and the hub client raise many kinds when offline
        if spec.kwargs.get("pretrained") or name.startswith(_REMOTE_TIMM):
            raise _no_download(spec, "the weights", error) from error
        raise DynamizeError(f"timm cannot build {name}: {error}") from error
    return model


def _no_download(spec: SourceSpec, url: str, error: Exception) -> DynamizeError:
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    return DynamizeError(
        f"Cannot download {url} for {spec.source} ({reason}). Fetch the file by another way, then leave out "
        "weights and pretrained and pass checkpoint=FILE (on the command line: --checkpoint FILE)."
    )


def _unaccepted(spec: SourceSpec, error: Exception) -> DynamizeError:
    arguments = ", ".join(f"{key}={value!r}" for key, value in spec.kwargs.items()) or "no arguments"
    return DynamizeError(f"{spec.source} cannot be built with {arguments}: {error}. Change or omit arguments.")
