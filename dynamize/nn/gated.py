"""Segments with gates inside: pieces that always run, and units that offer each image several ways through.

Training is dense: a unit computes all that its paths do and mixes it by hard decisions, so that gradients reach the
gates. In eval mode each path runs for the images that chose it, and for no others.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dynamize.errors import DynamizeError
from dynamize.graph.replace import every_module
from dynamize.nn.dispatch import Chooser, Piece, Run, run_pieces
from dynamize.nn.gates import Gate, State, choose, pool, sample_paths

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
        raise DynamizeError(
            "a compiled or quantised network is not trained: train the network it was made of, then compile or "
            "quantise again"
        )


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
        gate = module.gate
        pieces.append(Piece(ways, gate.pooled, compile_description(gate), compile_choice(module)))
    return pieces
