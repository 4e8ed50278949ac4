"""The converted network: a row of pieces, through which each image takes its own way."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from dynamize.errors import DynamizeError
from dynamize.graph.replace import every_module
from dynamize.graph.tracer import blank
from dynamize.nn.executor import CACHE, Program, Routed, execute, names, program
from dynamize.nn.exits import CONTEXT, Leaving
from dynamize.nn.flow import Flow
from dynamize.nn.joining import Joining
from dynamize.nn.piece import MAIN, Choose, Decision, Dense, Part, Piece, Point, Setting, eager_calls, setting_at
from dynamize.nn.routing import Routing
from dynamize.nn.row import build_row, needed, refuse_misplaced
from dynamize.nn.units import Unit

if TYPE_CHECKING:
    from dynamize.sources import SourceSpec


class DynamicNetwork(nn.Module):
    """A classifier as a row of pieces, some of which take a decision for each image.

    ``train()``: returns :class:`~dynamize.nn.piece.Dense`: the logits of all K exits and the shares of all gates, dense
    and differentiable; the logits (N, classes) alone where nothing is decided.
    ``eval()``: returns (N, classes), each image's answer from where it left; what it skips is not executed for it. A
    new network has all exits off and answers as the original does.

    Args:
        net: the original network's graph; any other module becomes one static piece.
        input_shape: (C, H, W).

    Attributes:
        nets: the graphs that the row is made of, by member, the network's own (:attr:`plain`) last; their layers are
            those of its static pieces.
        pieces: what was put into the row, by the name of its decision with "__" for dots.
        setting: the operating point at which it runs unless another one is given.
        choose: how decisions are taken in training.
        shapes: of one image's features at each border between pieces (:meth:`parts`).
        made: names of networks that were made here, to be trained; those of a group learn together.
        resized: names of networks in front that see images at another size than they were trained at, together with
            those that they build on.
        combining: how answers of several networks may be joined; calibration chooses.
        sizes: of the images that each of the networks sees, (C, H, W), by name.
        openings: numbers of the borders at which images come in.
        contexts: by piece, how wide the context is that reaches it; 0 for none.
        operating_points: what calibration found, or None before.
        history: the resolved transforms that made this network, as plain data.
        source: where the original network came from; None for a module made in Python.

    Example:
        >>> import torch
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.Exits()], (1, 8, 8))
        >>> images = torch.randn(2, 1, 8, 8)
        >>> torch.equal(dyn(images), net(images))
        True
    """

    def __init__(self, net: nn.Module, *, input_shape: Any) -> None:
        super().__init__()
        self.nets = nn.ModuleDict({MAIN: net})
        self.pieces = nn.ModuleDict()
        self.input_shape: tuple[int, ...] = tuple(input_shape)
        self.setting, self.choose = Setting(), Choose()
        self.operating_points: Any = None
        self.operating_point: Any = None
        self.history: list[dict[str, Any]] = []
        self.source: SourceSpec | None = None
        self.routing: Routing | None = None
        self.shapes: list[tuple[int, ...]] = []
        self.openings: set[int] = {0}
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.made: tuple[tuple[str, ...], ...] = ()
        self.resized: tuple[tuple[str, ...], ...] = ()
        self.combining: tuple[Joining, ...] = ("last",)
        self.contexts: dict[str, int] = {}
        self._row: tuple[Piece, ...] = ()
        self._frozen: tuple[nn.Module, ...] = ()
        self.rebuild()

    @property
    def plain(self) -> fx.GraphModule:
        """The original network's graph."""
        found = self._frozen[-1] if self._frozen else self.nets[MAIN]
        if not isinstance(found, fx.GraphModule):
            raise ValueError("a network made by hand has no original graph: make it with dynamize.convert")
        return found

    @property
    def graphs(self) -> dict[str, nn.Module]:
        """The graphs that the row is made of, by what paths of their modules begin with: MEMBER/, and nothing for the
        network's own."""
        every = self._frozen or tuple(self.nets.values())
        return dict(zip([*(f"{name}/" for name in self.members), ""], every, strict=True))

    def seen_by(self, prefix: str) -> tuple[int, ...]:
        """(C, H, W) of the images that one of :attr:`graphs` is given."""
        return self.sizes[prefix.removesuffix("/") or MAIN]

    @property
    def members(self) -> list[str]:
        """Names of the networks in front of the network's own, in order."""
        return list(dict.fromkeys(piece.member for piece in self._row if piece.member != MAIN))

    @property
    def frozen(self) -> bool:
        """Whether each piece has its parts for itself (:meth:`freeze`)."""
        return bool(self._frozen)

    @property
    def row(self) -> tuple[Piece, ...]:
        """All pieces in order of execution."""
        return self._row

    @property
    def leaving(self) -> list[Leaving]:
        """The pieces at which images may leave, in order."""
        return [cast(Leaving, piece) for piece in self._row if piece.effect == "leaves"]

    @property
    def scored(self) -> list[Any]:
        """The pieces that have a temperature, in order: those at which images may leave, and what joins answers."""
        return [piece for piece in self._row if piece.scored]

    @property
    def changing(self) -> list[Unit]:
        """The pieces whose decisions change what comes after, in order: units with a gate."""
        return [cast(Unit, piece) for piece in self._row if piece.effect == "changes"]

    @property
    def exit_count(self) -> int:
        """K, the network's own classifier included."""
        return len(self.leaving) + 1

    @property
    def exit_places(self) -> list[str]:
        """The nodes of the original graph at which images may leave, in order."""
        return [piece.place[0] for piece in self.leaving]

    @property
    def decision_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Of the decisions at which images leave, and of the others."""
        return names(self._row, "leaves"), names(self._row, "changes")

    def decisions(self) -> list[Decision]:
        """All decisions in order of execution."""
        return [piece.decision for piece in self._row if piece.decision is not None]

    def insert(self, pieces: Mapping[Any, Piece], nets: Mapping[str, nn.Module] | None = None) -> None:
        """Put pieces into the row, the one way in which a transform changes it.

        Args:
            pieces: by the node of the original graph that a piece stands behind, or the two that it stands between;
                "MEMBER/NODE" for one of another network of the row. A piece of the same name as one in the row takes
                its place.
            nets: further networks, traced, which go in front of the network's own in this order.

        Raises:
            DynamizeError: a place is no node of the graph or pieces overlap; all that do are named.
        """
        if self.frozen:
            raise DynamizeError("a network in bytes takes no more pieces: put the step before `quantize`")
        like, before, nets_before = blank(self), dict(self.pieces.items()), self.nets
        own = nets_before[MAIN]
        further = {name: net.to(like).train(self.training) for name, net in (nets or {}).items()}
        every: dict[str, nn.Module] = {
            **{name: nets_before[name] for name in nets_before if name != MAIN},
            **further,
            MAIN: own,
        }
        for place, piece in pieces.items():
            piece.member, piece.place = _located(place)
        new = {key_of(piece.name): piece for piece in pieces.values()}
        kept = {key: cast(Piece, piece) for key, piece in self.pieces.items() if key not in new}
        for name in dict.fromkeys(piece.member for piece in pieces.values()):
            placed = [piece for piece in (*kept.values(), *pieces.values()) if piece.member == name]
            refuse_misplaced(cast(fx.GraphModule, every[name]), placed)
        self.nets = nn.ModuleDict(every)
        for key, piece in new.items():
            self.pieces[key] = piece.to(like).train(self.training)
        try:
            self.rebuild()
        except Exception as error:
            self.pieces, self.nets = nn.ModuleDict(before), nets_before
            self.rebuild()
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DynamizeError(
                f"{', '.join(piece.name for piece in pieces.values())} cannot run where they were put: {reason}. Put "
                "them at cut points, and give them the channels of the features there. Nothing was changed."
            ) from error

    def remove(self, decisions: Iterable[str]) -> None:
        """Take pieces out of the row, by their names; what they stood for is static again."""
        gone = set(decisions)
        for name in gone:
            del self.pieces[key_of(name)]
        kept = {name: threshold for name, threshold in self.setting.thresholds.items() if name not in gone}
        self.setting = replace(self.setting, thresholds=kept)
        self.rebuild()

    def rebuild(self) -> None:
        """Cut the static pieces out of the original graphs anew, and count MACs."""
        placed = self._pieces()
        rows = [build_row(net, [one for one in placed if one.member == name], name) for name, net in self.nets.items()]
        self._row = tuple(piece for row in rows for piece in row)
        known = {id(piece): key for key, piece in self.pieces.items()}
        self.pieces = nn.ModuleDict({known[id(piece)]: piece for piece in self._row if id(piece) in known})
        self.count()

    def take(self, members: Sequence[str]) -> "DynamicNetwork":
        """Neighbouring networks of the row as a row by themselves, of the same layers, to be changed and :meth:`put`;
        the last of them is the main one there."""
        *front, last = members
        alone = DynamicNetwork(self.nets[last], input_shape=self.sizes[last])
        alone.input_shape = self.sizes[members[0]]
        alone.nets = nn.ModuleDict({**{name: self.nets[name] for name in front}, MAIN: self.nets[last]})
        for piece in self._pieces():
            if piece.member in members and not _at_an_end(piece, members):
                piece.member = MAIN if piece.member == last else piece.member
                alone.pieces[key_of(piece.name)] = piece
        alone.rebuild()
        return alone.train(self.training)

    def put(self, members: Sequence[str], alone: "DynamicNetwork") -> None:
        """Let networks that :meth:`take` gave stand in the row again, as they are now."""
        for name, net in zip(members, alone.nets.values(), strict=True):
            self.nets[name] = net
        kept = [piece for piece in self._pieces() if piece.member not in members or _at_an_end(piece, members)]
        given = alone._pieces()
        for piece in given:
            piece.member = members[-1] if piece.member == MAIN else piece.member
        self.pieces = nn.ModuleDict({key_of(piece.name): piece for piece in [*given, *kept]})
        self.rebuild()

    def _pieces(self) -> list[Piece]:
        return [cast(Piece, piece) for piece in self.pieces.values()]

    def count(self) -> None:
        """Count the MACs of all pieces on one blank image, as they stand, and note shapes."""
        training = self.training
        self.eval()
        flow = Flow(blank(self, 1, *self.input_shape))
        self.shapes, self.contexts, self.openings = [tuple(flow.features.shape[1:])], {}, {0}
        self.sizes = {}
        try:
            with torch.no_grad():
                for piece in self._row:
                    if not piece.restarts:
                        self.sizes.setdefault(piece.member, tuple(flow.features.shape[1:]))
                    self.contexts[piece.name] = flow.extra[CONTEXT].shape[1] if CONTEXT in flow.extra else 0
                    piece.count(flow)
                    self.openings |= {len(self.shapes)} if piece.restarts else set()
                    self.shapes += [] if piece.passes else [tuple(flow.features.shape[1:])]
        finally:
            self.train(training)

    def freeze(self) -> None:
        """Give each piece its parts for itself, so that each can be exchanged (:meth:`Part.put`) and saved; the graphs
        that they were cut from are left out of the state. For execution only, and for good."""
        for piece in self._row:
            piece.freeze()
        self._frozen, self.nets = tuple(self.nets.values()), nn.ModuleDict()
        self.pieces = nn.ModuleDict({key_of(piece.name): piece for piece in self._row})

    def parts(self) -> list[Part]:
        """All static graphs in order of execution, with the borders between them; images come in at border 0."""
        found: list[Part] = []
        border, spare = 0, -1
        for piece in self._row:
            after = border if piece.passes else border + 1
            for part in piece.parts():
                gives = after if part.role == "path" else spare
                prefix = f"pieces.{key_of(piece.name)}.{part.prefix}" if part.prefix else ""
                found.append(replace(part, owner=piece.name, prefix=prefix, before=border, after=gives))
                spare -= part.role != "path"
            border = after
        return found

    def forward(self, images_NCHW: Tensor) -> Tensor | Dense:
        if self.training:
            dense = self.dense(images_NCHW)
            return dense if len(dense.logits) > 1 or dense.shares else dense.logits[0]
        routed = self.run(images_NCHW)
        if self.routing is not None:
            self.routing.add(routed)
        return routed.logits

    def run(
        self, images_NCHW: Tensor, setting: Setting | None = None, *, everyone: bool = False, cache: int = CACHE
    ) -> Routed:
        """Run a batch in eval mode at a setting, by default the network's own; see :func:`execute`."""
        setting = self.setting if setting is None else setting
        return execute(self._program(setting, everyone), setting, images_NCHW, everyone=everyone, cache=cache)

    def _program(self, setting: Setting, everyone: bool) -> Program:
        active = needed(self._row, setting, everyone)
        bound = [
            (piece, piece.bind(eager_calls(piece, after is not None and after.reads_means)))
            for piece, after in zip(active, [*active[1:], None], strict=True)
        ]
        return program(bound, self._row)

    def dense(self, images_NCHW: Tensor) -> Dense:
        """The training forward: everything for all images."""
        flow = Flow(images_NCHW, everyone=True)
        flow.ahead = self.exit_count
        for piece in self._row:
            piece.dense(flow, self.choose)
        return Dense([*(logits for _, logits, _ in flow.seen or []), flow.features], flow.shares)

    def all_exits(self, images_NCHW: Tensor, setting: Setting | None = None) -> list[Tensor]:
        """Logits of all K exits for every image, each (N, classes), in either mode."""
        if self.training:
            return self.dense(images_NCHW).logits
        routed = self.run(images_NCHW, setting, everyone=True)
        return [*(logits for _, logits, _ in routed.seen), routed.logits]

    def set_operating_point(self, point: Point | str | None) -> None:
        """Switch to another operating point; no retraining, no copy.

        Args:
            point: one of :attr:`operating_points`, its name, or None for all exits off.

        Raises:
            DynamizeError: an unknown name, or thresholds for other exits.
        """
        if isinstance(point, str):
            if self.operating_points is None:
                raise DynamizeError("the network has no operating points yet: run the `calibrate` step first")
            point = cast(Point, self.operating_points[point])
        if point is not None and set(point.thresholds) != set(self.decision_names[0]):
            raise DynamizeError(
                f"the operating point has thresholds for {', '.join(point.thresholds) or 'no exit'}, the network "
                f"{', '.join(self.decision_names[0]) or 'no early exit'}: calibrate this network again"
            )
        self.operating_point = point
        self.setting = Setting() if point is None else setting_at(point)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module's; what is assigned is computed with everywhere."""
        with self._sharing():
            return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DynamicNetwork":
        with self._sharing():
            super()._apply(fn, recurse)
            for net in self._frozen:
                net._apply(fn, recurse)
        return self

    @contextmanager
    def _sharing(self) -> Iterator[None]:
        """Exchange all that shares tensors together: graphs cut out of others hold some that those hold too."""
        registered = set(self.modules())
        owners = {
            id(tensor): (held, name)
            for module in registered
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
        }
        sharing = [
            (held, name, *owners[id(tensor)])
            for module in every_module(self)
            if module not in registered
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None and id(tensor) in owners
        ]
        yield
        for held, name, owner, key in sharing:
            cast(dict[str, Any], held)[name] = owner[key]


@contextmanager
def record_routing(network: DynamicNetwork) -> Iterator[Routing]:
    """Record which options each image takes while ``network`` runs in eval mode inside the block.

    Example:
        >>> import torch
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.Exits(count=2)], (1, 8, 8))
        >>> with dz.record_routing(dyn) as routing:  # all exits are off: images leave at the last of three
        ...     logits = dyn(torch.randn(2, 1, 8, 8))
        >>> routing.exits.tolist()
        [2, 2]
    """
    outer, network.routing = network.routing, Routing(*network.decision_names)
    try:
        yield network.routing
    finally:
        network.routing = outer


def _at_an_end(piece: Piece, members: Sequence[str]) -> bool:
    """Whether it links networks to what is before or behind them."""
    return piece.links and piece.member == (members[0] if piece.restarts else members[-1])


def _located(place: Any) -> tuple[str, tuple[str, str]]:
    """The network that a place is in, and the nodes at its ends."""
    ends = (place, place) if isinstance(place, str) else place
    found = [end.rpartition("/") for end in ends]
    return found[0][0] or MAIN, (found[0][2], found[1][2])


def key_of(name: str) -> str:
    """Under which a piece is registered, by its name: a module's name has no dots."""
    key = name.replace(".", "__")
    return f"{key}_" if hasattr(nn.ModuleDict, key) else key
