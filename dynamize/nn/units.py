"""Pieces that offer each image several ways through: a gate scores them, and each way runs for those who take it.

Training is dense: a unit computes all that its ways do and mixes it by hard decisions, so gradients reach the gate.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynamize.errors import DynamizeError
from dynamize.graph.macs import count_macs, counting_macs
from dynamize.graph.norms import own_statistics
from dynamize.nn.flow import Flow, put_rows, take_rows
from dynamize.nn.gates import Gate, choose, make_gate, make_memory
from dynamize.nn.instructions import Choose as ChooseWay
from dynamize.nn.instructions import Instruction
from dynamize.nn.piece import Call, Choose, Decision, Part, Piece, Run, Setting


class Unit(Piece):
    """A region of the network with P ways through it, the cheapest first and the original one last.

    Attributes:
        label: name of its decision, for people too, e.g. "layer1.2".
        gate: picks a way for each image.
        path_macs: MACs per image of each way, (P,).
        fresh: whether a recurrent gate starts anew here, as it does behind a place where images may leave.
        kind: of its decision.
        by_scores: whether its gate has a score for each of its options.
        slices: whether narrower ways slice the weights of the whole one.
        has_own: whether these have batch-norm statistics of their own.
    """

    path_costs: Tensor
    kind: ClassVar[str]
    by_scores: ClassVar[bool] = True
    slices: ClassVar[bool] = False
    has_own = False
    effect = "changes"

    def __init__(self, label: str, gate: Gate, paths: int) -> None:
        super().__init__()
        self.label, self.gate, self.fresh = label, gate, True
        self.path_macs: tuple[float, ...] = (1.0,) * paths
        self.frozen: nn.ModuleList | None = None
        self.register_buffer("path_costs", torch.ones(paths), persistent=False)

    @abstractmethod
    def ways(self) -> Sequence[nn.Module | None]:
        """A module for each way, None for one that changes nothing."""

    @abstractmethod
    def blend(self, features_NCHW: Tensor, shares_NP: Tensor) -> Tensor:
        """All ways, weighted: dense and differentiable."""

    @abstractmethod
    def options(self) -> Sequence[str]:
        """A label for each way."""

    @property
    def binary(self) -> bool:
        """Whether each decision of its gate is between two."""
        return len(self.path_macs) == 2

    def settles(self, option: int) -> bool:
        """Whether one option can be that of all images without a gate."""
        return True

    def trained(self, choice_N: Tensor) -> tuple[nn.Module, list[Tensor]]:
        """The module whose batch norms training moves when all images come here, and what it takes beside features."""
        whole = self.ways()[-1]
        assert whole is not None
        return whole, []

    @property
    def own_name(self) -> str:
        return self.label

    @property
    def decision(self) -> Decision:
        return Decision(self.name, self.kind, tuple(self.options()), self.path_macs, self.macs, self.effect)

    @property
    def option_count(self) -> int:
        return len(self.path_macs)

    @property
    def reads_means(self) -> bool:
        return self.gate.pooled

    @property
    def passes(self) -> bool:
        return None in self.paths()

    def paths(self) -> Sequence[nn.Module | None]:
        """The ways as they run: what was put in their places, or :meth:`ways`."""
        if self.frozen is None:
            return self.ways()
        return [None if isinstance(way, _Unchanged) else way for way in self.frozen]

    def sliced(self) -> set[nn.Module]:
        whole = self.ways()[-1]
        return set(whole.modules()) if self.slices and whole is not None else set()

    def own_statistics(self) -> None:
        """Let narrower ways have batch-norm statistics of their own; for those that slice."""

    def shared_statistics(self) -> None:
        """Undo :meth:`own_statistics`."""

    def fold(self) -> None:
        self.gate.fold()

    def quick_calls(self) -> dict[str, Call]:
        quick = self.gate.quick_paths(self.path_costs)
        return {} if quick is None else {"decide": quick}

    def freeze(self) -> None:
        self.fold()
        self.frozen = nn.ModuleList([_Unchanged() if way is None else way for way in self.paths()])

    def parts(self) -> list[Part]:
        ways = [
            Part(str(p), "path", way, way, self._putting(p)) for p, way in enumerate(self.paths()) if way is not None
        ]
        return [Part("gate", "gate", self.gate), *ways]

    def _putting(self, path: int) -> Callable[[nn.Module], None]:
        def put(module: nn.Module) -> None:
            assert self.frozen is not None, "a network is frozen before parts are exchanged"
            self.frozen[path] = module

        return put

    def bind(self, calls: Mapping[str, Call]) -> Run:
        ways = self.way_calls(calls)
        describe, pooled, name = calls["gate"], self.gate.pooled, self.name
        decide = calls.get("decide") or self.decide

        def run(flow: Flow, setting: Setting) -> None:
            means = flow.means
            described = means if means is not None and pooled else describe(flow.features)
            taken = decide(described, flow, setting.offset)
            if name in setting.forced:
                forced = setting.forced[name][torch.from_numpy(flow.rows)]
                taken = torch.where(forced < 0, len(ways) - 1, forced).tolist()
            flow.log.append((name, flow.rows, taken))
            _dispatch(ways, taken, flow, described if pooled else None)

        return run

    def instruct(self, files: Mapping[str, str]) -> Instruction:
        scores = self.gate.scorer(self.fresh)
        if scores is None:
            raise DynamizeError(f"the gate of {self.name} does not say how it decides (Gate.scorer)")
        return ChooseWay(
            self.name,
            ways=tuple(files.get(str(p)) for p in range(len(self.path_macs))),
            gate=files["gate"],
            means=self.gate.pooled,
            costs=tuple(self.path_costs.tolist()),
            scores=scores,
        )

    def decide(self, described: Tensor, flow: Flow, offset: float) -> list[int]:
        """The way of each image, in torch; a gate with a memory leaves it in the flow."""
        scores = self.gate.score(described, flow.extra, self.fresh)
        taken: list[int] = choose(scores, self.path_costs, offset).tolist()
        return taken

    def dense(self, flow: Flow, choose: Choose) -> None:
        if self.frozen is not None:
            raise DynamizeError(
                "a compiled or quantised network is not trained: train the network it was made of, then compile or "
                "quantise again"
            )
        self.mix(flow, choose)

    def mix(self, flow: Flow, choose: Choose) -> None:
        """What :meth:`dense` does, of a piece that is trained."""
        shares = choose(self.name, flow.features, self.read(flow))
        flow.shares[self.name] = shares
        flow.features = self.blend(flow.features, shares)

    def read(self, flow: Flow) -> Tensor:
        return self.gate.score(self.gate(flow.features), flow.extra, self.fresh)

    def count(self, flow: Flow) -> None:
        with counting_macs() as counted:
            self.read(flow)
        self.macs = counted()
        paths = self.paths()
        self.path_macs = tuple(0.0 if way is None else count_macs(way, flow.features.clone()) for way in paths)
        self.path_costs.copy_(torch.tensor(self.path_macs) / self.path_macs[-1])
        whole = paths[-1]
        assert whole is not None
        flow.features = whole(flow.features)


GateMaker = Callable[[int, int], Gate]
"""Channels and number of ways -> a gate."""


def gate_maker(kind: str, units: Sequence[Unit]) -> GateMaker:
    """Makes gates of a kind; all recurrent ones of a network share one memory, which ``units`` may have already."""
    memory = next((unit.gate.memory for unit in units if unit.gate.memory is not None), None)
    if kind == "recurrent" and memory is None:
        memory = make_memory()
    return lambda channels, paths: make_gate(kind, channels, paths, memory)


def unique_names(labels: Sequence[str], nodes: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Each label, or the name of the node at the end of the region where several have one label or it is taken."""
    return [
        label if labels.count(label) == 1 and label not in taken else node
        for label, node in zip(labels, nodes, strict=True)
    ]


class _Unchanged(nn.Module):
    """Stands where a way changes nothing."""


class SkipUnit(Unit):
    """A residual block, or a run of them, that an image may skip (SkipNet, Wang et al. 2018, eq. 1).

    Args:
        body: the block; it does not write to its input. Its layers are the network's.
        bypass: what an image that skips it goes through (a projection shortcut); None changes nothing.
        masked: body and bypass in one, ``(features, runs) -> features`` with ``runs`` (N,) multiplied into what is
            added to the shortcut; for a block with a bypass.
    """

    kind = "skip"

    def __init__(
        self, label: str, gate: Gate, body: nn.Module, bypass: nn.Module | None = None, masked: nn.Module | None = None
    ) -> None:
        super().__init__(label, gate, 2)
        self._sharing = (bypass, body)  # tuples: their modules are the network's, which registers them
        self._masked = (masked,)

    def ways(self) -> Sequence[nn.Module | None]:
        return self._sharing

    def options(self) -> Sequence[str]:
        return "skipped", "whole"

    def blend(self, features_NCHW: Tensor, shares_NP: Tensor) -> Tensor:
        bypass, body = self._sharing
        (masked,) = self._masked
        if masked is not None:
            return cast(Tensor, masked(features_NCHW, shares_NP[:, 1]))
        assert body is not None
        computed = body(features_NCHW)
        skips, runs = shares_NP.to(computed.dtype)[:, :, None, None, None].unbind(1)
        blended: Tensor = runs * computed + skips * features_NCHW
        return blended


class CoarseUnit(Unit):
    """A residual block, or a run of them, whose branches an image computes on a coarser grid or in full (Xie et al.
    2020, sec. 3, with a grid in the place of sampled positions).

    Both ways share all weights, but the coarse one has batch-norm statistics of its own from the start, which are part
    of the state dict: means of 2 x 2 positions vary less. In training each way's come from all images, as those of the
    network do. With shared ones the digits network, at half of its MACs, answers 68 % right in the place of 95 %.

    Args:
        body: the block; it does not write to its input. Its layers are the network's.
        coarse: the same layers on the coarser grid (:func:`dynamize.graph.coarse.coarse`).

    Attributes:
        norms: the batch norms of the coarse way.
    """

    kind = "grid"
    has_own = True

    def __init__(self, label: str, gate: Gate, body: nn.Module, coarse: fx.GraphModule) -> None:
        super().__init__(label, gate, 2)
        self.norms = nn.ModuleList(own_statistics(coarse))
        self._sharing = (coarse, body)  # a tuple: their other modules are the network's, which registers them

    def ways(self) -> Sequence[nn.Module | None]:
        return self._sharing

    def options(self) -> Sequence[str]:
        return "coarse", "whole"

    def count(self, flow: Flow) -> None:
        """An offset moves its gate as far as one that skips: by what the cheaper way saves, taken as one."""
        super().count(flow)
        self.path_costs.copy_(torch.tensor([0.0, 1.0]))

    def freeze(self) -> None:
        super().freeze()
        self.norms = nn.ModuleList()

    def blend(self, features_NCHW: Tensor, shares_NP: Tensor) -> Tensor:
        coarse, body = self._sharing
        computed = body(features_NCHW)
        with _kept(coarse, besides=set(self.norms)):
            roughly = coarse(features_NCHW)
        first, last = shares_NP.to(computed.dtype)[:, :, None, None, None].unbind(1)
        blended: Tensor = last * computed + first * roughly
        return blended


@contextmanager
def _kept(path: nn.Module, besides: set[nn.Module]) -> Iterator[None]:
    """Let statistics of batch norms stay as they are inside the block, and normalise by them."""
    norms = [one for one in path.modules() if isinstance(one, _BatchNorm) and one.training and one not in besides]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


def _dispatch(ways: Sequence[Call | None], taken: Sequence[int], flow: Flow, means: Tensor | None) -> None:
    """Send each image the way it has taken. Rows are gathered, computed and written back in place; nothing is
    concatenated.

    Args:
        means: of the channels of ``flow.features``, if the gate has read them.
    """
    if len(set(taken)) < 2:
        way = ways[taken[0] if taken else -1]
        if way is None:
            flow.means = means
        else:
            flow.features, flow.means = way(flow.own())
        return
    source = flow.own()
    if torch.is_grad_enabled():
        source, means = source.clone(), None if means is None else means.clone()
    target = source if None in ways else None
    target_means = means if None in ways else None
    known = means is not None or None not in ways  # else the means of those who pass unchanged are missing
    for path in sorted(set(taken)):
        way = ways[path]
        if way is None:
            continue
        rows = np.array([row for row, one in enumerate(taken) if one == path])
        found, found_means = way(take_rows(source, rows))
        if target is None:
            alike = found.shape[1:] == source.shape[1:] and found.dtype == source.dtype
            target = source if alike else found.new_empty(len(taken), *found.shape[1:])
        put_rows(target, rows, found)
        known = known and found_means is not None
        if known:
            if target_means is None:
                target_means = found_means.new_empty(len(taken), found_means.shape[1])
            put_rows(target_means, rows, found_means)
    assert target is not None
    flow.features, flow.means = target, target_means if known else None
