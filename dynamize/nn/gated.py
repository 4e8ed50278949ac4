"""Segments with gates inside: pieces that always run, and units that offer each image several ways through.

Training is dense: a unit computes all that its paths do and mixes it by hard decisions, so that gradients reach the
gates. In eval mode each path runs for the images that chose it, and for no others.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dynamize.graph.replace import every_module
from dynamize.nn.gates import Gate, State, choose, pool, sample_paths

_BYTES = 2**22  # of feature maps that go through the units together

Run = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # features -> features and their channel means, if asked for
Chooser = Callable[[Tensor, State, float], tuple[list[int], State]]
"""Description (N, D), state and offset -> the path of each image and the next state."""
Policy = Callable[[Tensor, Tensor], Tensor]  # features that reach a unit and its gate's scores (N, P) -> shares (N, P)


class Unit(nn.Module, ABC):
    """A region of the network with P paths through it, the cheapest first and the original one last.

    Attributes:
        label: for people, e.g. "layer1.2".
        region: the two cut points that it lies between.
        gate: picks a path for each image.
        path_macs: MACs per image of each path, (P,).
        gate_macs: MACs per image of the gate.
    """

    path_costs: Tensor

    def __init__(
        self, label: str, region: tuple[str, str], gate: Gate, path_macs: Sequence[float], gate_macs: float
    ) -> None:
        super().__init__()
        self.label, self.region = label, region
        self.gate = gate
        self.path_macs, self.gate_macs = tuple(path_macs), gate_macs
        costs = torch.tensor(self.path_macs, dtype=torch.float32) / self.path_macs[-1]
        self.register_buffer("path_costs", costs, persistent=False)

    @abstractmethod
    def paths(self) -> list[nn.Module | None]:
        """A module for each path, None for one that changes nothing."""

    @abstractmethod
    def blend(self, features_NCHW: Tensor, shares_NP: Tensor) -> Tensor:
        """All paths, weighted: dense and differentiable."""

    def forward(self, features_NCHW: Tensor) -> Tensor:
        """The original path, for everyone."""
        original = self.paths()[-1]
        assert original is not None
        return cast(Tensor, original(features_NCHW))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Unit":
        move_together(self, lambda: super(Unit, self)._apply(fn, recurse))
        return self


class SkipUnit(Unit):
    """A residual block, or a run of them, that an image may skip (SkipNet, Wang et al. 2018, eq. 1).

    Args:
        body: the block; it does not write to its input.
        bypass: what an image that skips it goes through (a projection shortcut); None changes nothing.
        masked: body and bypass in one, ``(features, runs) -> features`` with ``runs`` (N,) multiplied into what is
            added to the shortcut; for a block with a bypass. Both hold the same modules as ``body``, which alone
            registers them.
    """

    def __init__(
        self,
        label: str,
        region: tuple[str, str],
        gate: Gate,
        body: nn.Module,
        bypass: nn.Module | None,
        masked: nn.Module | None,
        path_macs: Sequence[float],
        gate_macs: float,
    ) -> None:
        super().__init__(label, region, gate, path_macs, gate_macs)
        self.body = body
        self._sharing = (bypass, masked)  # a tuple: their modules are those of the body

    @property
    def bypass(self) -> nn.Module | None:
        return self._sharing[0]

    @property
    def masked(self) -> nn.Module | None:
        return self._sharing[1]

    def paths(self) -> list[nn.Module | None]:
        return [self.bypass, self.body]

    def blend(self, features_NCHW: Tensor, shares_NP: Tensor) -> Tensor:
        if self.masked is not None:
            return cast(Tensor, self.masked(features_NCHW, shares_NP[:, 1]))
        computed = self.body(features_NCHW)
        skips, runs = shares_NP.to(computed.dtype)[:, :, None, None, None].unbind(1)
        return runs * computed + skips * features_NCHW


class _FrozenUnit(Unit):
    """A unit whose ways were compiled one by one."""

    def __init__(self, unit: Unit, ways: Sequence[nn.Module | None]) -> None:
        super().__init__(unit.label, unit.region, unit.gate, unit.path_macs, unit.gate_macs)
        self.ways = nn.ModuleList([nn.Identity() if way is None else way for way in ways])
        self.unchanged = [way is None for way in ways]

    def paths(self) -> list[nn.Module | None]:
        return [None if same else way for way, same in zip(self.ways, self.unchanged, strict=True)]

    def blend(self, features_NCHW: Tensor, shares_NP: Tensor) -> Tensor:
        raise RuntimeError("a compiled network is not trained")


@dataclass(frozen=True)
class Piece:
    """A piece as a backend runs it: one way for everybody, or a unit's paths."""

    ways: list[Run | None]
    unit: Unit | None = None  # its gate and costs
    describe: Callable[[Tensor], Tensor] | None = None  # reads the gate's description from features
    choose: Chooser | None = None


class GatedSegment(nn.Module):
    """A segment as a row of static modules and :class:`Unit`.

    ``forward`` returns features. In train mode it leaves the decisions of each unit in ``shares``, a list of (N, P)
    that carry gradients; in eval mode the chosen paths in ``choices``, (N, U), int64.

    Attributes:
        offset: added to the score of each path times its relative cost; ALL_OPEN opens all gates.
        noise: how much decisions are sampled in train mode, 1 to 0 (:func:`dynamize.nn.gates.sample_paths`).
        policy: takes the decisions in train mode instead of the gates' own sampling, for reinforcement learning.
        forced: paths that the images of the next batches take whatever the gates say, (N, U); None lets gates decide.
    """

    def __init__(self, pieces: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)
        self.offset = 0.0
        self.noise = 1.0
        self.policy: Policy | None = None
        self.forced: Tensor | None = None
        self.shares: list[Tensor] = []
        self.choices: Tensor | None = None

    @property
    def units(self) -> list[Unit]:
        """In order of execution."""
        return [piece for piece in self.pieces if isinstance(piece, Unit)]

    def __getstate__(self) -> dict[str, Any]:
        """Without the last batch's decisions, whose gradients cannot be copied."""
        return {**self.__dict__, "shares": [], "choices": None}

    def forward(self, features_NCHW: Tensor) -> Tensor:
        if self.training:
            return self._blend(features_NCHW)
        features, self.choices = run_pieces(self.as_pieces(), self.offset, features_NCHW, self.forced)
        return features

    def _blend(self, features: Tensor) -> Tensor:
        state: State = None
        self.shares = []
        for piece in self.pieces:
            if isinstance(piece, Unit):
                scores, state = piece.gate.decide(piece.gate.describe(features), state)
                policy = self.policy
                shares = policy(features, scores) if policy else sample_paths(scores, self.noise)
                self.shares.append(shares)
                features = piece.blend(features, self.shares[-1])
            else:
                features = piece(features)
        return features

    def as_pieces(self) -> list[Piece]:
        """What :func:`run_pieces` runs."""
        return make_pieces(list(self.pieces), eager_run, lambda gate: gate.describe, eager_choice)

    def compiled(self, compile_way: Callable[[nn.Module], nn.Module]) -> "GatedSegment":
        """A segment for eval mode only, each of whose ways is what ``compile_way`` makes of it.

        Its gates, which it shares with this one, are folded.
        """
        pieces: list[nn.Module] = []
        for piece in self.pieces:
            if isinstance(piece, Unit):
                piece.gate.fold()
                pieces.append(_FrozenUnit(piece, [None if way is None else compile_way(way) for way in piece.paths()]))
            else:
                pieces.append(compile_way(piece))
        frozen = GatedSegment(pieces).eval()
        frozen.offset = self.offset
        return frozen


def move_together(root: nn.Module, move: Callable[[], object]) -> None:
    """Run ``move``, which takes ``root`` to another device or type, for all modules that share tensors with it.

    Moving a module replaces its buffers; graphs in tuples, which are not registered, would keep the old ones where they
    hold a buffer themselves and not in a layer.
    """
    registered = set(root.modules())
    owners = {id(buffer): (module, name) for module in registered for name, buffer in module._buffers.items()}
    sharing = [
        (module, name, *owners[id(buffer)])
        for module in every_module(root)
        if module not in registered
        for name, buffer in module._buffers.items()
        if buffer is not None and id(buffer) in owners
    ]
    move()
    for module, name, owner, key in sharing:
        module._buffers[name] = owner._buffers[key]


def eager_run(module: nn.Module, pooled: bool) -> Run:
    """A module as a way through a piece, with the channel means of its output if a gate wants them."""

    def run(features: Tensor) -> tuple[Tensor, Tensor | None]:
        features = module(features)
        return features, pool(features) if pooled else None

    return run


def eager_choice(unit: Unit) -> Chooser:
    """A gate's decisions in torch."""

    def choose_paths(described: Tensor, state: State, offset: float) -> tuple[list[int], State]:
        scores, state = unit.gate.decide(described, state)
        return choose(scores, unit.path_costs, offset).tolist(), state

    return choose_paths


def make_pieces(
    modules: Sequence[nn.Module],
    compile_way: Callable[[nn.Module, bool], Run],
    compile_description: Callable[[Gate], Callable[[Tensor], Tensor]],
    compile_choice: Callable[[Unit], Chooser],
) -> list[Piece]:
    """The pieces of a segment with each way compiled by itself; a way hands on the channel means only where the next
    unit's gate reads them."""
    pieces = []
    for module, following in zip(modules, [*modules[1:], None], strict=True):
        pooled = isinstance(following, Unit) and following.gate.pooled
        if not isinstance(module, Unit):
            pieces.append(Piece([compile_way(module, pooled)]))
            continue
        ways = [None if way is None else compile_way(way, pooled) for way in module.paths()]
        pieces.append(Piece(ways, module, compile_description(module.gate), compile_choice(module)))
    return pieces


def run_pieces(
    pieces: Sequence[Piece], offset: float, features_NCHW: Tensor, forced_NU: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run each piece for the images that need it, where its gate or ``forced_NU`` says so.

    Large feature maps go through the units a few images at a time: what a cache holds is gathered at little cost, and
    one image alone needs no gathering.

    Returns:
        features, and the path that each image took through each unit, (N, U), int64. The features given are not
        written to unless the segment begins with a unit, and then only without autograd.
    """
    features, means = features_NCHW, None
    first = next(i for i, piece in enumerate(pieces) if piece.unit is not None)
    for piece in pieces[:first]:
        assert piece.ways[0] is not None
        features, means = piece.ways[0](features)
    rows = max(1, _BYTES // (features.shape[1:].numel() * features.element_size()))
    if len(features) <= rows:
        return _run_units(pieces[first:], offset, features, means, forced_NU)
    parts = [
        _run_units(
            pieces[first:],
            offset,
            features[start : start + rows],
            None if means is None else means[start : start + rows],
            None if forced_NU is None else forced_NU[start : start + rows],
        )
        for start in range(0, len(features), rows)
    ]
    return torch.cat([part for part, _ in parts]), torch.cat([choices for _, choices in parts])


def _run_units(
    pieces: Sequence[Piece], offset: float, features: Tensor, means: Tensor | None, forced_NU: Tensor | None
) -> tuple[Tensor, Tensor]:
    state: State = None
    chosen: list[list[int]] = []
    for piece in pieces:
        unit = piece.unit
        if unit is None:
            assert piece.ways[0] is not None
            features, means = piece.ways[0](features)
            continue
        assert piece.describe is not None
        assert piece.choose is not None
        described = means if means is not None and unit.gate.pooled else piece.describe(features)
        taken, state = piece.choose(described, state, offset)
        if forced_NU is not None:
            taken = forced_NU[:, len(chosen)].tolist()
        features, means = _dispatch(piece.ways, taken, features, described if unit.gate.pooled else None)
        chosen.append(taken)
    return features, torch.from_numpy(np.array(chosen, np.int64).T)


def _dispatch(
    ways: Sequence[Run | None], taken: Sequence[int], features: Tensor, means: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Send each image the way it has taken. Rows are gathered, computed and written back in place; nothing is
    concatenated."""
    if len(set(taken)) < 2:
        way = ways[taken[0] if taken else -1]
        return (features, means) if way is None else way(features)
    if torch.is_grad_enabled():
        features, means = features.clone(), None if means is None else means.clone()
    source = features
    target = features if None in ways else None
    target_means = means if None in ways else None
    known = means is not None or None not in ways  # else the means of those who pass unchanged are missing
    for path in sorted(set(taken)):
        way = ways[path]
        if way is None:
            continue
        rows = torch.tensor([row for row, one in enumerate(taken) if one == path])
        found, found_means = way(take_rows(source, rows))
        if target is None:
            target = source if found.shape[1:] == source.shape[1:] else found.new_empty(len(taken), *found.shape[1:])
        put_rows(target, rows, found)
        if found_means is not None and known:
            if target_means is None:
                target_means = found_means.new_empty(len(taken), found_means.shape[1])
            put_rows(target_means, rows, found_means)
    assert target is not None
    return target, target_means if known else None


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Copies of these rows. numpy where it can: a parallel region of torch would leave its threads spinning against
    those of ONNX Runtime."""
    if _by_numpy(values):
        return torch.from_numpy(values.numpy().take(rows.numpy(), axis=0))
    return values[rows]


def put_rows(values: Tensor, rows: Tensor, found: Tensor) -> None:
    """Write rows in place."""
    if _by_numpy(values) and _by_numpy(found):
        values.numpy()[rows.numpy()] = found.numpy()
    else:
        values[rows] = found


def _by_numpy(values: Tensor) -> bool:
    cpu = values.device.type == "cpu" and not values.requires_grad
    return cpu and values.is_contiguous() and values.dtype in (torch.float32, torch.float64)
