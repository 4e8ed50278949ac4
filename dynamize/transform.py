"""What a transform is: a step of a recipe, with typed fields, that takes a network and returns a network."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from dynamize.errors import DynamizeError, closest
from dynamize.nn.network import DynamicNetwork

if TYPE_CHECKING:
    from dynamize.data import Splits

Share = Annotated[float, Field(ge=0, le=1)]
NOTHING_TO_REFINE = "nothing to refine: `fuse_gates` left no gates"
T = TypeVar("T")
Progress = Callable[[Iterable[T], str, int], Iterable[T]]


def quiet(items: Iterable[T], label: str, total: int) -> Iterable[T]:
    """The progress reporter that reports nothing."""
    return items


@dataclass(frozen=True)
class Context:
    """What a transform may use besides the network.

    Attributes:
        data: train, calibration and test images, or None when only the structure is built.
        teacher: the untouched network, frozen.
        device: where training and measuring happen.
        seed: of everything random.
        backend: what latency is measured on.
        work: folder for checkpoints and metrics; None keeps nothing.
        resume: whether a training checkpoint found in ``work`` is continued.
        progress: wraps long loops: (items, label, total) -> items.

    Example:
        >>> from dynamize.data import DataSpec, load_data
        >>> digits = load_data(DataSpec(source="digits", train_limit=64), (1, 8, 8), 10)
        >>> context = dz.Context(data=digits, backend="eager")
    """

    data: "Splits | None" = None
    teacher: nn.Module | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    backend: str = "onnxruntime"
    work: Path | None = None
    resume: bool = False
    progress: Progress = quiet

    def needs_data(self, transform: "Transform") -> "Splits":
        """The data, or a DynamizeError that names the step."""
        if self.data is None:
            raise DynamizeError(
                f"`{transform.pass_name}` needs images: give the recipe a `data:` section, or in Python pass "
                "Context(data=...)"
            )
        return self.data

    def needs_teacher(self, transform: "Transform") -> nn.Module:
        """The teacher on the device, or a DynamizeError that names the step."""
        if self.teacher is None:
            raise DynamizeError(f"`{transform.pass_name}` needs the original network: pass Context(teacher=...)")
        return self.teacher.to(self.device).eval()


@dataclass(frozen=True)
class Applied:
    """What a transform returns: the network, itself with every `auto` decided, and plain-words notes."""

    network: DynamicNetwork
    resolved: "Transform"
    notes: list[str] = field(default_factory=list)


class Transform(BaseModel, ABC):
    """Base of all transforms; a subclass in ``dynamize.transforms`` with its own ``pass`` literal is registered.

    The same frozen object is the YAML step, the Python call and the JSON schema. ``apply`` with the *resolved*
    object rebuilds the same structure on a fresh network without any data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    structural: ClassVar[bool] = True  # changes the graph, so that loading an artifact replays it
    exact: ClassVar[bool] = True  # right after it, the eval output is bit-equal to before
    once: ClassVar[bool] = False  # may occur once in a recipe
    after: ClassVar[tuple[str, ...]] = ()  # passes of which at least one must come earlier
    before: ClassVar[tuple[str, ...]] = ()  # passes that must not come earlier

    pass_name: str

    @abstractmethod
    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        """Transform ``network``, which may be changed or consumed."""

    def describe(self) -> dict[str, Any]:
        """This step as plain data, the way a recipe writes it."""
        return self.model_dump(mode="json", by_alias=True)


def registered() -> dict[str, type[Transform]]:
    """Every transform by its ``pass`` name."""
    import dynamize.transforms  # noqa: F401  importing the folder defines the subclasses

    return {cls.model_fields["pass_name"].default: cls for cls in Transform.__subclasses__()}


def parse_step(step: dict[str, Any]) -> Transform:
    """A transform from plain data such as ``{"pass": "exits", "count": 2}``.

    Raises:
        DynamizeError: no or an unknown ``pass``. Wrong fields raise pydantic's ValidationError.
    """
    return find_transform(str(step.get("pass"))).model_validate(step)


def find_transform(name: str) -> type[Transform]:
    """The transform with this ``pass`` name; a DynamizeError lists those there are."""
    known = registered()
    if name not in known:
        raise DynamizeError(f"'{name}' is no transform. {closest(name, list(known))}Known: {', '.join(sorted(known))}.")
    return known[name]


def gates_are_fused(network: DynamicNetwork) -> bool:
    """Whether `fuse_gates` has made all gates of the network static."""
    return not network.units and any(step["pass"] == "fuse_gates" for step in network.history)


def has_gates_to_refine(step: Transform, network: DynamicNetwork) -> bool:
    """Whether there are gates to train; False where `fuse_gates` has left none.

    Raises:
        DynamizeError: there never were any.
    """
    if not network.units and not gates_are_fused(network):
        raise DynamizeError(
            f"{step.pass_name}: the network has no gates: put `skip_gates` or `channel_gates` before, and `distill`, "
            "which trains them first"
        )
    return bool(network.units)


def check_order(steps: list[Transform], done: Sequence[str] = ()) -> None:
    """Refuse an order of steps that cannot work, naming both steps and the repair.

    ``done`` are the passes that the network has behind it already.
    """
    names = [*done, *(step.pass_name for step in steps)]
    for i, step in enumerate(steps, start=len(done)):
        earlier = names[:i]
        if step.after and not set(step.after) & set(earlier):
            needed = " or ".join(f"`{name}`" for name in step.after)
            raise DynamizeError(f"step {i + 1} `{step.pass_name}` needs {needed} before it: add that step above")
        for name in step.before:
            if name in earlier:
                raise DynamizeError(
                    f"step {i + 1} `{step.pass_name}` comes after step {earlier.index(name) + 1} `{name}`, which "
                    f"it would undo: move `{step.pass_name}` above `{name}`"
                )
        if step.once and step.pass_name in earlier:
            raise DynamizeError(
                f"step {i + 1} is a second `{step.pass_name}`: merge it into step {earlier.index(step.pass_name) + 1}"
            )
