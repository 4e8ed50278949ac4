"""Backends: each compiles the static parts of a network, and says what it likes.

A backend is a subclass of :class:`Engine`; those of this package are imported when they are first asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

from dynamize.errors import DynamizeError, closest
from dynamize.runtime.threads import Threads

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dynamize.nn.network import DynamicNetwork

_HOMES = {
    "eager": "eager",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "openvino-bf16": "openvino",
}
ANYWHERE = "eager"  # the backend that runs on any device
_LOCK = Lock()
_HELD: list[int] = []  # torch's own number of threads, then one entry for each call that holds it at one
FASTEST = {"cpu": "onnxruntime"}  # as measured; that one elsewhere


class RefusedPart(DynamizeError):
    """A backend cannot take a part."""


@dataclass(frozen=True)
class Border:
    """What two neighbouring parts agree on about the features between them.

    Attributes:
        shape: of one image's features, (C, H, W), or (classes,).
        dtype: of them; None for that of the network.
        blocked: whether they are in the engine's own layout.
        means: whether their channel means are handed on beside them.
        may_overwrite: whether a part may write over what it is given.
    """

    shape: tuple[int, ...]
    dtype: "torch.dtype | None" = None
    blocked: bool = False
    means: bool = False
    may_overwrite: bool = False


class Engine(ABC):
    """Compiles the parts of one network.

    Attributes:
        name: what people call the backend.
        devices: kinds of devices that it runs on; empty for all.
        liked_multiple: numbers of channels that it computes without waste.
        one_torch_thread: whether torch has to keep to one thread between calls: a parallel region of torch, however
            small, leaves its threads spinning against those of sessions.
        late_gates: whether a gate is compiled when it is first needed: mostly the way before has handed on what it
            reads.
        tried: numbers of images that a part is tried with once it is compiled (:mod:`dynamize.runtime.trial`).
        limit: what it may differ by from torch, as a share of the spread of the values.
        threads: whose its sessions run on.
    """

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ()
    liked_multiple: ClassVar[int] = 8
    one_torch_thread: ClassVar[bool] = False
    late_gates: ClassVar[bool] = False
    tried: ClassVar[tuple[int, ...]] = (3, 1)
    limit: ClassVar[float] = 1e-3
    threads: Threads = "own"

    def __init__(self, device: "torch.device") -> None:
        if self.devices and device.type not in self.devices:
            raise DynamizeError(
                f"backend {self.name} runs on the {' or '.join(self.devices).upper()} here, not on {device}: use "
                f"--backend {ANYWHERE}"
            )
        self.device = device
        self.byte_borders: set[int] = set()  # numbers of those at which features are handed on as bytes

    def prepare(self, network: "DynamicNetwork") -> "DynamicNetwork":
        """The network, a copy of the user's in eval mode, as its parts are compiled."""
        return network.to(self.device)

    def blocks(self, shape: tuple[int, ...]) -> bool:
        """Whether features of this shape, (C, H, W), can be handed on in the engine's own layout."""
        return False

    def plain(self, features: "torch.Tensor") -> "torch.Tensor":
        """Features (N, C, H, W) out of the engine's own layout."""
        return features

    def own(self, features: "torch.Tensor") -> "torch.Tensor":
        """Features (N, C, H, W) brought into the engine's own layout."""
        return features

    def grid(self, features: "torch.Tensor") -> "torch.Tensor":
        """A view of features in the engine's own layout whose dimensions 2 and 3 are their rows and columns."""
        return features

    @abstractmethod
    def path(self, module: "nn.Module", takes: Border, gives: Border, beside: int = 0) -> Callable[..., Any]:
        """Features, and rows (n, ``beside``) if that is not 0 -> (features, channel means (n, C) if ``gives.means``,
        else None)."""

    @abstractmethod
    def gate(self, gate: "nn.Module", takes: Border) -> Callable[..., Any]:
        """Features -> description (n, D)."""

    @abstractmethod
    def head(self, head: "nn.Module", takes: Border, context: int) -> Callable[..., Any]:
        """Features and context (n, ``context``), or None if that is 0 -> what the head's forward gives."""

    def both(self, path: "nn.Module", head: "nn.Module", takes: Border, gives: Border, context: int) -> Any:
        """A path and the head behind it as one: features, context -> (features, what the head gives...); None where the
        engine gains nothing by it."""
        return None


def engine_class(name: str) -> type[Engine]:
    """The backend of this name, in this package or a subclass that the user has made; a DynamizeError lists all."""
    if name in _HOMES:
        import_module(f"dynamize.runtime.{_HOMES[name]}")
    known = _loaded()
    if name not in known:
        raise DynamizeError(unknown_backend(name))
    return known[name]


def unknown_backend(name: str) -> str:
    """What to say of a name that no backend has."""
    known = backend_names()
    return f"'{name}' is no backend. {closest(name, known)}Known: {', '.join(known)}."


def backend_names() -> list[str]:
    """Of all backends, without loading any."""
    return list(dict.fromkeys([*_HOMES, *_loaded()]))


def default_backend(device: "torch.device") -> str:
    """The fastest backend on a device that was measured to be."""
    return FASTEST.get(device.type, ANYWHERE)


def _loaded() -> dict[str, type[Engine]]:
    """All backends whose modules have been imported, by name."""
    found: list[type[Engine]] = []
    waiting = list(Engine.__subclasses__())
    while waiting:
        found.append(waiting.pop(0))
        waiting += found[-1].__subclasses__()
    return {cls.name: cls for cls in found if "name" in vars(cls)}


def torch_threads() -> int:
    """How many torch has between calls that hold it at one."""
    import torch

    with _LOCK:
        return _HELD[0] if _HELD else torch.get_num_threads()


class OneTorchThread:
    """Around the small products between sessions; what several threads set at a time is put back by the last."""

    def __enter__(self) -> None:
        import torch

        with _LOCK:
            if not _HELD:
                _HELD.append(torch.get_num_threads())
                torch.set_num_threads(1)
            _HELD.append(1)

    def __exit__(self, *error: object) -> None:
        import torch

        with _LOCK:
            _HELD.pop()
            if len(_HELD) == 1:
                torch.set_num_threads(_HELD.pop())
