"""What a transform is: a step of a recipe, with typed fields, that takes a network and returns a network."""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Flag, auto
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_origin

import torch
from pydantic import ConfigDict, Field, TypeAdapter, model_validator
from torch import nn

from dynamize.errors import DynamizeError, unknown
from dynamize.nn.network import DynamicNetwork
from dynamize.runtime.engine import FASTEST
from dynamize.sections import InWords, Section
from dynamize.usercode import load_entry_points

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
        data: train, calibration and test images (:func:`dynamize.splits`), or None when only the structure is built.
        teacher: the untouched network, frozen.
        members: networks made in Python that a step puts in front of it, by the names that the step gives them.
        trust_code: whether sources that steps name may be imported.
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
    members: Mapping[str, nn.Module] = field(default_factory=dict)
    trust_code: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    backend: str = FASTEST["cpu"]
    work: Path | None = None
    resume: bool = False
    progress: Progress = quiet

    def needs_data(self, transform: "Transform") -> "Splits":
        """The data, or a DynamizeError that names the step."""
        if self.data is None:
            raise DynamizeError(
                f"`{transform.pass_name}` needs images: give the recipe a `data:` section, or in Python pass "
                "Context(data=dz.splits(...))"
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
    FITS_CALIBRATION = auto()  # chooses by the calibration images, which then certify less than they seem to


class Transform(Section, ABC, metaclass=InWords):
    """Base of all transforms. Writing a subclass with a ``pass`` of its own registers it, in whichever package::

        class Mine(Transform):
            pass_name: Literal["mine"] = Field("mine", alias="pass")

    The same frozen object is the YAML step, the Python call and the JSON schema. ``apply`` with the *resolved*
    object rebuilds the same structure on a fresh network without any data.
    """

    model_config = ConfigDict(populate_by_name=True)

    structural: ClassVar[bool] = True  # changes the graph, so that loading an artifact replays it
    exact: ClassVar[bool] = True  # right after it, the eval output is bit-equal to before
    collective: ClassVar[bool] = True  # every process of a run takes part; else only the main one
    once: ClassVar[bool] = False  # may occur once in a recipe, for each network of a row
    whole: ClassVar[bool] = False  # is about all networks of a row, so that no ``member`` can be named
    added: ClassVar[tuple[str, ...]] = ("member",)  # fields that came later: at their defaults, runs from before go on
    version: ClassVar[int] = 1  # to be raised where steps that were written before would be read differently
    kind: ClassVar[Kind] = Kind(0)
    needs: ClassVar[Kind] = Kind(0)  # a step of one of these kinds must come earlier
    not_after: ClassVar[Kind] = Kind(0)  # no step of these kinds may come earlier

    pass_name: str
    member: str | None = Field(
        None, description="which network of a cascade the step is for, by its name, or main; default: main"
    )

    @model_validator(mode="after")
    def _not_of_one(self) -> Self:
        if self.whole and self.member is not None:
            raise ValueError(f"`{self.pass_name}` is about all networks of a row: leave out member")
        return self

    @abstractmethod
    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        """Transform ``network``, which may be changed or consumed."""

    @property
    def learns(self) -> bool:
        """Whether it goes through all train images again and again, so that they are decoded in advance."""
        return Kind.TRAINS in self.kind

    def passes(self, data: "Splits") -> float:
        """About how many images the step takes through the network, forwards, of which training is three or four: for
        an estimate of its time."""
        return 0.0

    def leaves_points(self) -> int:
        """At most how many operating points the network has after it; 0 leaves those that it has."""
        return 0

    def check(self, network: DynamicNetwork, context: Context) -> None:
        """Refuse what cannot work, before any step has trained: files and parts of the network that are not there.

        Args:
            network: in the structure that it will have, with the original weights.
        """

    def check_budget(self, network: DynamicNetwork, context: Context) -> None:
        """Refuse a budget that ``network``, whose costs are those that it will have, cannot meet."""

    @classmethod
    def choices(cls) -> Iterable["type[Transform]"]:
        """All that may stand where a transform is meant."""
        return registered().values()

    @classmethod
    def upgrade(cls, step: dict[str, Any], version: int) -> dict[str, Any]:
        """What an artifact says that was written at an earlier ``version``, as it is said now."""
        return step

    def describe(self) -> dict[str, Any]:
        """This step as plain data, the way an artifact writes it: that of a recipe, and the version."""
        fields = self.model_dump(mode="json", by_alias=True)
        member = fields.pop("member")
        named = {} if member is None else {"member": member}
        return {"pass": fields.pop("pass"), "version": self.version, **named, **fields}


def registered() -> dict[str, type[Transform]]:
    """Every transform by its ``pass`` name: dynamize's, those of installed packages (entry points in the group
    ``dynamize.transforms``), and whatever else has been imported. A class written anew, as in a notebook, counts
    instead of the earlier one.

    Raises:
        DynamizeError: two transforms have one name, or a name is not written as it must be.
    """
    import dynamize.transforms  # noqa: F401  importing the folder defines the subclasses

    _load_installed()
    found: dict[str, type[Transform]] = {}
    for cls in _subclasses(Transform):
        name = None if inspect.isabstract(cls) else _own_pass(cls)
        if name is None:
            continue
        first = found.setdefault(name, cls)
        if (cls.__module__, cls.__qualname__) == (first.__module__, first.__qualname__):
            found[name] = cls
        elif not issubclass(cls, first):
            both = " and ".join(f"{one.__module__}.{one.__qualname__}" for one in (first, cls))
            raise DynamizeError(f"two transforms are called `{name}`: {both}: give one of them another `pass`")
    return dict(sorted(found.items()))


@functools.cache
def _load_installed() -> None:
    load_entry_points("dynamize.transforms")


def _subclasses(cls: type[Any]) -> Iterator[type[Transform]]:
    """All of them at any depth, bases before what is derived from them."""
    for one in cls.__subclasses__():
        yield one
        yield from _subclasses(one)


def _own_pass(cls: type[Transform]) -> str | None:
    """The name of a transform; None for a class that has none, as it is a base of others."""
    field = cls.model_fields["pass_name"]
    if field.is_required():
        return None
    name = str(field.default)
    if get_origin(field.annotation) is not Literal or field.alias != "pass":
        raise DynamizeError(
            f"{cls.__module__}.{cls.__qualname__} does not say its name as a step of a recipe does: write "
            f'`pass_name: Literal["{name}"] = Field("{name}", alias="pass")`'
        )
    return name


def any_step() -> TypeAdapter[Transform]:
    """What reads a step of any transform that is registered now."""
    union: Any = Union[tuple(registered().values())]  # noqa: UP007
    return TypeAdapter(Annotated[union, Field(discriminator="pass_name")])


def parse_step(step: dict[str, Any]) -> Transform:
    """A transform from plain data such as ``{"pass": "exits", "version": 1, "count": 2}``.

    Raises:
        DynamizeError: no or an unknown ``pass`` or ``version``. Wrong fields raise pydantic's ValidationError.
    """
    return find_transform(str(step.get("pass"))).model_validate(upgraded(step))


def upgraded(step: dict[str, Any]) -> dict[str, Any]:
    """A step as a recipe would write it now; one that names no version is of the first.

    Raises:
        DynamizeError: no or an unknown ``pass`` or ``version``.
    """
    cls, fields = find_transform(str(step.get("pass"))), dict(step)
    name, version = step["pass"], fields.pop("version", 1)
    if type(version) is not int or version < 1:
        raise DynamizeError(f"`{name}`: version {version!r} is none: versions are 1 to {cls.version}, or leave it out")
    if version > cls.version:
        raise DynamizeError(
            f"`{name}`: the step is of version {version}, and this installation knows `{name}` up to version "
            f"{cls.version}: install the newer one that wrote it, or run the recipe again with this one"
        )
    return cls.upgrade(fields, version) if version < cls.version else fields


def find_transform(name: str) -> type[Transform]:
    """The transform with this ``pass`` name; a DynamizeError lists those there are."""
    known = registered()
    if name not in known:
        raise DynamizeError(unknown(name, "transform", list(known)))
    return known[name]


def of_kind(kind: Kind) -> list[str]:
    """Names of the transforms that do one of these things, those that leave the answers bit-equal first."""
    found = [(not cls.exact, name) for name, cls in registered().items() if cls.kind & kind]
    return [name for _, name in sorted(found)]


def gates_are_fused(network: DynamicNetwork) -> bool:
    """Whether a step has made all gates of the network static."""
    return not network.changing and last_step(network, Kind.SETTLES_GATES) is not None


def last_step(network: DynamicNetwork, kind: Kind) -> Transform | None:
    """The last step of one of these kinds that the network has behind it."""
    steps = [step for step in network.history if find_transform(step["pass"]).kind & kind]
    return parse_step(steps[-1]) if steps else None


def has_gates_to_refine(step: Transform, network: DynamicNetwork) -> bool:
    """Whether there are gates to train; False where an earlier step has made all of them static.

    Raises:
        DynamizeError: there never were any.
    """
    if not network.changing and not gates_are_fused(network):
        adding, training = of_kind(Kind.ADDS_GATES), of_kind(Kind.TRAINS & ~Kind.REFINES_GATES)
        raise DynamizeError(
            f"{step.pass_name}: the network has no gates: put {_either(adding)} before, and {_either(training)}, "
            "which trains them first"
        )
    others = [unit.name for unit in network.changing if not unit.by_scores]
    if others:
        raise DynamizeError(
            f"{step.pass_name}: the gate of {others[0]} decides tile by tile, which has no score for each option to "
            f"refine: leave {step.pass_name} out"
        )
    return bool(network.changing)


def comes_first(step: Transform, network: DynamicNetwork) -> None:
    """Refuse a step that puts networks in front of another one where there are some.

    Raises:
        DynamizeError: there are.
    """
    if network.members:
        raise DynamizeError(
            f"{step.pass_name}: the network has others in front of it already: use one of `cascade` and `glance_focus`"
        )


def check_order(steps: Sequence[Transform], done: Sequence[str | Mapping[str, Any]] = ()) -> None:
    """Refuse an order of steps that cannot work, naming both steps and the repair.

    ``done`` are the passes, or the resolved steps, that the network has behind it already.
    """
    before = [{"pass": step} if isinstance(step, str) else step for step in done]
    names = [*(step["pass"] for step in before), *(step.pass_name for step in steps)]
    members = [*(step.get("member") for step in before), *(step.member for step in steps)]
    order = [find_transform(name) for name in names[: len(done)]] + [type(step) for step in steps]
    for i in range(len(done), len(order)):
        step, name = order[i], names[i]
        earlier = [k for k in range(i) if step.whole or order[k].whole or members[k] == members[i]]
        if step.needs and not any(order[k].kind & step.needs for k in earlier):
            needed = _either(of_kind(step.needs))
            raise DynamizeError(f"step {i + 1} `{name}` needs {needed} before it: add that step above")
        for k in earlier:
            if names[k] != name and _undoes(step, order[k]):
                raise DynamizeError(
                    f"step {i + 1} `{name}` comes after step {k + 1} `{names[k]}`, which it would undo: move `{name}` "
                    f"above `{names[k]}`"
                )
        second = [k for k in earlier if step.once and names[k] == name]
        if second:
            raise DynamizeError(f"step {i + 1} is a second `{name}`: merge it into step {second[0] + 1}")


def _undoes(step: type[Transform], earlier: type[Transform]) -> bool:
    """Whether what ``earlier`` did would not hold any more after ``step``."""
    solved = earlier.kind & Kind.SOLVES and not step.kind & (Kind.SOLVES | Kind.SOLVES_AGAIN)
    in_bytes = earlier.kind & Kind.TURNS_INTO_BYTES and not step.kind & Kind.SOLVES
    adds_too_late = step.kind & earlier.needs
    return bool(solved or in_bytes or adds_too_late or step.not_after & earlier.kind)


def _either(names: Sequence[str]) -> str:
    return " or ".join(f"`{name}`" for name in names)
