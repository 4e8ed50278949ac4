"""What a dynamic network is a row of: pieces, of which some take a decision for each image.

A decision is one integer for each image, with a table of what each choice costs. Execution, costs, calibration,
reports and export speak of decisions, never of kinds of pieces.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor, fx, nn

from dynamize.errors import DynamizeError
from dynamize.graph.macs import counting_macs
from dynamize.nn.flow import Flow, Indices
from dynamize.nn.gates import pool, sample_paths
from dynamize.nn.instructions import Instruction, Through
from dynamize.nn.joining import Joining

Effect = Literal["leaves", "changes"]
"""What a decision does (:class:`Decision`). Steps that train, fix or quantise ways ask those of :class:`Unit` of all
that change, and those of :class:`Leaving` of all that leave."""
Role = Literal["path", "gate", "head"]
Call = Callable[..., Any]
"""A part as a backend runs it. path: features, and rows where it takes some (:attr:`Part.beside`) -> (features, their
channel means if they are handed on, else None);
gate: features -> description (n, D); head: features, context or None -> what the piece's own forward gives. Beside the
parts of a piece that computes windows stands ``grid``, features -> a view of them whose dimensions 2 and 3 are rows and
columns, where the backend has a layout of its own."""
Run = Callable[[Flow, "Setting"], None]
Ends = Callable[[str, Indices], bool]

LEAVES, GOES_ON = 0, 1  # the options of a decision at which images leave
MAIN = "main"  # the recipe's own network among those that a row is made of


@dataclass(frozen=True)
class Decision:
    """What is decided for each image at one place.

    Attributes:
        name: "exit.1", "layer2.0": the key in operating points, routing and report.
        kind: exit, skip, channels, ...: for words and colours only.
        options: labels, the cheapest first.
        macs: per image and option, (P,), without ``always``.
        always: MACs per image of the gate or head itself.
        effect: "leaves": images are answered here or go on, and one cached pass knows all that a threshold decides;
            "changes": what comes after differs, so there is one pass for each value of the shared offset.
    """

    name: str
    kind: str
    options: tuple[str, ...]
    macs: tuple[float, ...]
    always: float
    effect: Effect


@dataclass(frozen=True)
class Setting:
    """An operating point as the executor reads it: an argument of running, never state.

    Attributes:
        thresholds: by decision that ``leaves``, the score from which an image leaves; None, or no entry, is off.
        offset: added to the score of each option of what ``changes`` times its relative cost.
        forced: by decision, the option of each image of the batch (N,), whatever is decided; -1, as
            :class:`~dynamize.nn.executor.Routed` has it for images that do not come there, is the last one.
        combine: how the answers of several networks in a row are joined.
        ends: asked at each place where images may leave, with its name and which images of the batch would go on:
            whether these leave there too.
    """

    thresholds: Mapping[str, float | None] = field(default_factory=dict)
    offset: float = 0.0
    forced: Mapping[str, Tensor] = field(default_factory=dict)
    combine: Joining = "last"
    ends: Ends | None = None


class Point(Protocol):
    """An operating point, as far as a network reads it."""

    @property
    def name(self) -> str: ...
    @property
    def thresholds(self) -> Mapping[str, float | None]: ...
    @property
    def offset(self) -> float: ...
    @property
    def combine(self) -> Joining: ...


def setting_at(point: Point) -> Setting:
    """What the executor reads of an operating point."""
    return Setting(point.thresholds, point.offset, combine=point.combine)


class Choose:
    """How decisions are taken in training.

    Attributes:
        noise: how much they are sampled, 1 to 0 (:func:`dynamize.nn.gates.sample_paths`).
        equilibrium: rescale gradients so that each exit counts alike in shared layers (Li et al. 2019, IMTA, sec. 3.2).
    """

    def __init__(self, noise: float = 1.0, equilibrium: bool = False) -> None:
        self.noise, self.equilibrium = noise, equilibrium

    def __call__(self, name: str, features: Tensor, scores_NP: Tensor) -> Tensor:
        """Shares (N, P) of the options of decision ``name`` from the features that reach it and its scores (N, P)."""
        return sample_paths(scores_NP, self.noise)


class Dense(NamedTuple):
    """What the training forward returns: the logits (N, classes) of all K exits, the network's own last, and the shares
    (N, P) of each decision that ``changes``."""

    logits: list[Tensor]
    shares: dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A static graph of a piece, which is compiled, or written anew, by itself.

    Attributes:
        name: within its piece.
        role: path: a way for features; gate: describes them for a decision; head: answers.
        module: what is compiled.
        graph: what of it maps features to features, which ``put`` can exchange; None where nothing does.
        put: lets another module stand in the place of ``graph``.
        prefix: what the names of the graph's layers begin with; nothing for those of the original network.
        owner: name of the piece.
        before: number of the border that it reads from.
        after: number of the border that it gives to. What passes a piece unchanged lies on the same border as what was
            computed there.
        beside: of a path, how wide the rows are that it takes beside the features, (n, D); 0 for none.
        size: height and width of what it is given and gives, where that is a part of the maps at these borders.
    """

    name: str
    role: Role
    module: nn.Module
    graph: nn.Module | None = None
    put: Callable[[nn.Module], None] | None = None
    prefix: str = ""
    owner: str = ""
    before: int = -1
    after: int = -1
    beside: int = 0
    size: tuple[int, int] | None = None


class Piece(nn.Module, ABC):
    """A piece of the row, static or with a decision.

    Attributes:
        member: which of the networks that the row is made of it belongs to.
        place: the two nodes of that network's graph that it stands between; the same one twice for a piece that only
            reads what passes.
        rank: orders pieces that stand at one place.
        links: whether it stands between two networks of the row, and is no part of the one that it belongs to.
        restarts: whether it goes back to the images, so that whatever runs before it only serves decisions.
        cuts: whether what comes in again is a part of each image, so that it runs even where the images have just come.
        waits: whether what it does waits until a part of an image is asked for, and is left out where none is.
        scored: whether it has a ``temperature``, by which logits are divided before they are scored or joined.
        reads: whether layers of its own :meth:`read` the features that come there.
        reads_means: whether it reads nothing but channel means, which the piece before can hand on.
        passes: whether features may pass it unchanged, so that both sides are one border.
        answers: whether it is a classifier.
        trains_alone: whether its layers may be trained while the network's own stay as they are.
        continues: whether it goes on with what a network before it has found, so that its own network is not to be
            trained without that one.
        straight: whether running it means running its one path and nothing else, so that a path and the head behind it
            can be one call, and be exported.
        effect: of its decision, if it takes one.
        macs: per image, of a static piece; of the gate or head, if it decides.
    """

    answers: ClassVar[bool] = False
    trains_alone: ClassVar[bool] = False
    continues: ClassVar[bool] = False
    links: ClassVar[bool] = False
    restarts: ClassVar[bool] = False
    cuts: ClassVar[bool] = False
    waits: ClassVar[bool] = False
    scored: ClassVar[bool] = False
    rank: ClassVar[int] = 0
    straight = False
    effect: ClassVar[Effect | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.member = MAIN
        self.place: tuple[str, str] = ("", "")
        self.macs = 0.0

    @property
    def name(self) -> str:
        """Of its decision, or of where it ends; within a network in front of the main one, MEMBER/NAME."""
        return self.own_name if self.member == MAIN else f"{self.member}/{self.own_name}"

    @property
    @abstractmethod
    def own_name(self) -> str:
        """Its name within its network."""

    @property
    def decision(self) -> Decision | None:
        """What it decides; None for a static piece."""
        return None

    @property
    def option_count(self) -> int:
        """How many options its decision has."""
        return 2

    @property
    def reads_means(self) -> bool:
        """Whether it reads nothing but channel means, which the piece before can hand on."""
        return False

    @property
    def reads(self) -> bool:
        """Whether layers of its own :meth:`read` the features that come there."""
        return self.effect is not None

    @property
    def passes(self) -> bool:
        """Whether features may pass it unchanged, so that both sides are one border."""
        return False

    def settle(self, plain: fx.GraphModule) -> None:
        """Take from its network's graph what it needs besides what it stands between, whenever pieces are cut anew."""

    @abstractmethod
    def parts(self) -> list[Part]:
        """Its static graphs as they stand now."""

    @abstractmethod
    def bind(self, calls: Mapping[str, Call]) -> Run:
        """What the executor runs in eval mode, which really skips.

        Who sets the features of a flow sets their means too, to None where they are not known.

        Args:
            calls: by name of the part.
        """

    def way_calls(self, calls: Mapping[str, Call]) -> list[Call | None]:
        """What runs by each option of what changes features, of its compiled parts; None where nothing does."""
        return [calls.get(str(option)) for option in range(self.option_count)]

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        """What :meth:`bind` runs, for the driver of an export.

        Args:
            files: by name of the part.

        Raises:
            DynamizeError: nothing is said of it.
        """
        raise DynamizeError(f"{self.name} does not say what it does (Piece.instruct)")

    @abstractmethod
    def dense(self, flow: Flow, choose: Choose) -> None:
        """Training: everything for all images, differentiable, mixed by shares."""

    def read(self, flow: Flow) -> Tensor:
        """What its gate or head makes of the features: scores (N, P), or logits (N, classes); nothing is decided."""
        return flow.features

    @abstractmethod
    def count(self, flow: Flow) -> None:
        """Count MACs, in eval mode, on what reaches the piece, one image; ``flow`` goes on by the original path."""

    def idle(self, setting: Setting) -> bool:
        """Whether it does nothing at this setting, so that it need not run."""
        return False

    def sliced(self) -> set[nn.Module]:
        """Modules whose weights it slices while it runs, so that they have to stay as they are."""
        return set()

    def fold(self) -> None:
        """Fold what can be folded; for execution only."""

    def freeze(self) -> None:
        """Hold all of its parts itself, so that each can be exchanged; for execution only."""

    def quick_calls(self) -> dict[str, Call]:
        """What a folded piece does on the CPU between two sessions, by name, faster than torch."""
        return {}


class Static(Piece):
    """A part of the network that all images run through.

    Attributes:
        overwrites: whether it writes to what it is given, as in-place layers do.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.overwrites = False

    @property
    def straight(self) -> bool:  # type: ignore[override]
        return type(self).bind is Static.bind

    @property
    def own_name(self) -> str:
        return f"upto.{self.place[1]}"

    def parts(self) -> list[Part]:
        return [Part("path", "path", self.module, self.module, self._put)]

    def _put(self, module: nn.Module) -> None:
        self.module = module

    def bind(self, calls: Mapping[str, Call]) -> Run:
        path = calls["path"]

        def run(flow: Flow, setting: Setting) -> None:
            flow.features, flow.means = path(flow.own() if self.overwrites else flow.features)

        return run

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        return Through(files["path"])

    def dense(self, flow: Flow, choose: Choose) -> None:
        flow.features = self.module(flow.own() if self.overwrites else flow.features)

    def count(self, flow: Flow) -> None:
        given = flow.features
        version = None if given.is_inference() else given._version
        with counting_macs() as counted:
            flow.features = self.module(given)
        self.macs = counted()
        self.overwrites = version is None or given._version != version


def eager_calls(piece: Piece, means: bool) -> dict[str, Call]:
    """A piece's parts in torch; with ``means``, paths hand on the channel means of what they give."""
    return {part.name: eager_call(part, means and part.size is None) for part in piece.parts()}


def eager_call(part: Part, means: bool) -> Call:
    """A part in torch."""
    module = part.module
    if part.role != "path":
        return module

    def path(features: Tensor, *beside: Tensor) -> tuple[Tensor, Tensor | None]:
        features = module(features, *beside)
        return features, pool(features) if means else None

    return path
