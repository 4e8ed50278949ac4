"""What a transform is: a step of a recipe, with typed fields, that takes a network and returns a network."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto
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


class Kind(Flag):
    """What a step does, as far as others have to know: the rules of order are about these, never about names.

    A step may do several things, or none of them.
    """

    ADDS_EXITS = auto()
    ADDS_GATES = auto()
    SPLITS_CHANNELS = auto()  # so that layers are computed in part
    FUSES_BRANCHES = auto()
    RESHAPES_LAYERS = auto()  # narrower ones, or products, stand in the place of layers
    TRAINS = auto()
    REFINES_GATES = auto()
    ESTIMATES = auto()  # statistics of batch norms
    SETTLES_GATES = auto()  # makes them static
    SOLVES = auto()  # thresholds of exits and offsets of gates
    SOLVES_AGAIN = auto()  # by itself, where they had been solved
    TURNS_INTO_BYTES = auto()


class Transform(BaseModel, ABC):
    """Base of all transforms; a subclass in ``dynamize.transforms`` with its own ``pass`` literal is registered.

    The same frozen object is the YAML step, the Python call and the JSON schema. ``apply`` with the *resolved*
    object rebuilds the same structure on a fresh network without any data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    structural: ClassVar[bool] = True  # changes the graph, so that loading an artifact replays it
    exact: ClassVar[bool] = True  # right after it, the eval output is bit-equal to before
    collective: ClassVar[bool] = True  # every process of a run takes part; else only the main one
    once: ClassVar[bool] = False  # may occur once in a recipe
    kind: ClassVar[Kind] = Kind(0)
    needs: ClassVar[Kind] = Kind(0)  # a step of one of these kinds must come earlier
    not_after: ClassVar[Kind] = Kind(0)  # no step of these kinds may come earlier

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


def of_kind(kind: Kind) -> list[str]:
    """Names of the transforms that do one of these things, those that leave the answers bit-equal first."""
    found = [(not cls.exact, name) for name, cls in registered().items() if cls.kind & kind]
    return [name for _, name in sorted(found)]


def gates_are_fused(network: DynamicNetwork) -> bool:
    """Whether a step has made all gates of the network static."""
    return not network.units and last_step(network, Kind.SETTLES_GATES) is not None


def last_step(network: DynamicNetwork, kind: Kind) -> Transform | None:
    """The last step of one of these kinds that the network has behind it."""
    steps = [step for step in network.history if find_transform(step["pass"]).kind & kind]
    return parse_step(steps[-1]) if steps else None


def has_gates_to_refine(step: Transform, network: DynamicNetwork) -> bool:
    """Whether there are gates to train; False where an earlier step has made all of them static.

    Raises:
        DynamizeError: there never were any.
    """
    if not network.units and not gates_are_fused(network):
        adding, training = of_kind(Kind.ADDS_GATES), of_kind(Kind.TRAINS & ~Kind.REFINES_GATES)
        raise DynamizeError(
            f"{step.pass_name}: the network has no gates: put {_either(adding)} before, and {_either(training)}, "
            "which trains them first"
        )
    return bool(network.units)


def check_order(steps: Sequence[Transform], done: Sequence[str] = ()) -> None:
    """Refuse an order of steps that cannot work, naming both steps and the repair.

    ``done`` are the passes that the network has behind it already.
    """
    order = [*map(find_transform, done), *map(type, steps)]
    names = [*done, *(step.pass_name for step in steps)]
    for i in range(len(done), len(order)):
        step, name, earlier = order[i], names[i], order[:i]
        if step.needs and not any(one.kind & step.needs for one in earlier):
            needed = _either(of_kind(step.needs))
            raise DynamizeError(f"step {i + 1} `{name}` needs {needed} before it: add that step above")
        for k, one in enumerate(earlier):
            if names[k] != name and _undoes(step, one):
                raise DynamizeError(
                    f"step {i + 1} `{name}` comes after step {k + 1} `{names[k]}`, which it would undo: move `{name}` "
                    f"above `{names[k]}`"
                )
        if step.once and name in names[:i]:
            raise DynamizeError(f"step {i + 1} is a second `{name}`: merge it into step {names.index(name) + 1}")


def _undoes(step: type[Transform], earlier: type[Transform]) -> bool:
    """Whether what ``earlier`` did would not hold any more after ``step``."""
    solved = earlier.kind & Kind.SOLVES and not step.kind & (Kind.SOLVES | Kind.SOLVES_AGAIN)
    in_bytes = earlier.kind & Kind.TURNS_INTO_BYTES and not step.kind & Kind.SOLVES
    adds_too_late = step.kind & earlier.needs
    return bool(solved or in_bytes or adds_too_late or step.not_after & earlier.kind)


def _either(names: Sequence[str]) -> str:
    return " or ".join(f"`{name}`" for name in names)
