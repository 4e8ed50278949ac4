"""`exits`: intermediate classifiers at cut points, so that easy images leave early."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import fx, nn

from dynamize.calibration.places import best_places
from dynamize.errors import DynamizeError
from dynamize.graph.cuts import CutPoint, cut_points, find_cut
from dynamize.graph.macs import annotated_macs, count_macs
from dynamize.graph.nodes import output_value, positions
from dynamize.graph.tails import tail
from dynamize.graph.trace import annotate
from dynamize.graph.tracer import blank
from dynamize.nn.confidence import ConfidenceName
from dynamize.nn.exits import Exit, Fusion
from dynamize.nn.heads import ExitHead, conv_body, linear_classifier, zero_fusion
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Piece
from dynamize.nn.row import outside
from dynamize.training.probe import probe
from dynamize.transform import Applied, Context, Kind, Transform

if TYPE_CHECKING:
    from dynamize.data import Splits

_WIDTH_STEP = 16  # convolution widths that are no multiple of 16 lose on CPUs
_WIDEST = 1024
_NARROW = (1, 2, 4, 8)  # where not even one step fits
_ROUNDING = 1.0001
_TRIES = 5

Names = Annotated[list[str], Field(min_length=1)]
Budgets = Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]


class Exits(Transform):
    """Insert intermediate classifiers (Huang et al. 2018, MSDNet, sec. 3; Teerapittayanon et al. 2016, BranchyNet).

    ``at: auto`` puts them where the network is most accurate at ``budgets``, by what a closed-form probe on calibration
    images says that heads of this kind and size could answer; without data it spreads them evenly over the MACs.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.Exits(at=["layer1", "layer2"])], (1, 8, 8))
        >>> dyn.history[0]["at"]
        ['layer1_2_relu2', 'layer2_2_relu2']
    """

    pass_name: Literal["exits"] = Field("exits", alias="pass")
    at: Literal["auto"] | Names = Field("auto", description="cut points: node names or module paths, or auto")
    count: PositiveInt = Field(2, description="number of early exits for `at: auto`; the network's own comes on top")
    head: Literal["linear", "conv", "tail"] = Field(
        "conv",
        description="linear: pooling and a linear layer; conv: stride-2 convolutions before it (MSDNet); tail: a copy "
        "of the network's own later layers without the blocks that keep the shape",
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.15, description="most that all heads together may cost, as a share of the network's MACs"
    )
    size: Literal["auto"] | list[NonNegativeInt] = Field(
        "auto",
        description="per exit; conv: width in channels, tail: same-shape blocks kept per resolution. auto: the "
        "largest that `share` allows",
    )
    pool: Literal["auto"] | list[PositiveInt] = Field(
        "auto",
        description="per exit, for conv: side of the squares of the feature map that are averaged first. auto: 1, or "
        "what it takes for 16 channels to fit into `share`; with a `size` that is given, 1",
    )
    budgets: Budgets = Field(
        [0.4, 0.6, 0.8], description="for `at: auto`: mean MACs, as shares of the network's, at which accuracy counts"
    )
    chain: bool = Field(False, description="let each exit build on what the heads before it saw")
    confidence: ConfidenceName = Field("top_probability", description="what the thresholds are compared with")

    added: ClassVar[tuple[str, ...]] = ("member", "pool", "budgets")
    version: ClassVar[int] = 2
    once: ClassVar[bool] = True
    kind: ClassVar[Kind] = Kind.ADDS_EXITS | Kind.FITS_CALIBRATION
    not_after: ClassVar[Kind] = Kind.TRAINS

    @classmethod
    def upgrade(cls, step: dict[str, Any], version: int) -> dict[str, Any]:
        """Heads of version 1 averaged nothing."""
        return step | {"pool": [1] * len(step["at"])} if isinstance(step.get("at"), list) else step

    def passes(self, data: "Splits") -> float:
        return len(data.calibration) if self.at == "auto" else 0

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        if network.leaving:
            raise DynamizeError("the network has exits already: give all of them in one `exits` step")
        traced = network.plain
        annotate(traced, network.input_shape)
        every = cut_points(traced)
        position = positions(traced.graph)
        cuts = [cut for cut in every if outside(position, cut.name, network.changing)]
        if len(cuts) < 2:
            raise DynamizeError(
                "the network has no cut point before its last layers, so an exit has no place: some value from its "
                "beginning is used until its end"
            )
        if self.at != "auto":
            _refuse_inside_units(self.at, every, cuts)
        with torch.random.fork_rng():  # initialising layers draws from the global generator
            chosen, notes = self._place(traced, cuts, context)
            heads, sizes = self._build_heads(traced, chosen)
            fusion = Fusion(zero_fusion(_context_width(heads, chosen), _classes(traced))) if self.chain else None
        names = [cut.name for cut in chosen]
        placed: dict[str, Piece] = {
            cut: Exit(f"exit.{number}", head, self.confidence, self.chain)
            for number, (cut, head) in enumerate(zip(names, heads, strict=True), start=1)
        }
        if fusion is not None:
            placed[output_value(traced.graph).name] = fusion
        network.insert(placed)
        found = {"size": [size for size, _ in sizes], "pool": [pool for _, pool in sizes]}
        resolved = self.model_copy(update={"at": names, "count": len(chosen), **found})
        return Applied(network, resolved, [_cost_note(heads, chosen, traced), *notes])

    def _place(
        self, traced: fx.GraphModule, cuts: list[CutPoint], context: Context
    ) -> tuple[list[CutPoint], list[str]]:
        if self.at != "auto":
            chosen = {find_cut(cuts, name) for name in self.at}
            if len(chosen) < len(self.at):
                raise DynamizeError(f"exits at {self.at}: two of these are the same cut point; name each once")
            ordered = sorted(chosen, key=lambda cut: cut.macs)
            if self.size != "auto" and ordered != [find_cut(cuts, name) for name in self.at]:
                raise DynamizeError(
                    f"exits at {self.at}: sizes are given one for each exit in the order of execution, which is "
                    f"{[cut.name for cut in ordered]}: write `at` and `size` in that order"
                )
            return ordered, []
        total = annotated_macs(traced)
        early = [cut for cut in cuts if cut.macs < (0.95 - self.share) * total] or cuts[:1]
        trials = {cut: self._trial(traced, cut) for cut in early}
        allowed = self.share * total / self.count * _ROUNDING
        candidates = {cut: head for cut, head in trials.items() if _head_macs(head, cut) <= allowed}
        if len(candidates) < self.count:
            raise DynamizeError(self._too_few(len(early), len(candidates)))
        places = list(candidates)
        costs = torch.tensor([cut.macs / total for cut in places]).double()
        if context.data is None:
            even = _nearest(costs, [(k + 1) / (self.count + 1) for k in range(self.count)])
            return [places[i] for i in even], []
        bodies = {cut.name: head.body for cut, head in candidates.items()}
        found = probe(traced.to(context.device), bodies, context.data.calibration.batches(256), context.device)
        picked = best_places(
            found.right.numpy(),
            found.scores.numpy(),
            found.own.numpy(),
            costs.numpy(),
            np.array([_head_macs(head, cut) / total for cut, head in candidates.items()]),
            classes=found.classes,
            budgets=self.budgets,
            count=self.count,
        )
        shares = ", ".join(f"{float(found.right[i].double().mean()):.1%}" for i in picked)
        return [places[i] for i in picked], [f"a probe there answers {shares} of the calibration images right"]

    def _too_few(self, early: int, fitting: int) -> str:
        """Why there are not enough places."""
        if early < self.count:
            where = "lie early enough to save work"
            return f"exits: count {self.count}, but only {early} cut points {where}: use count: {early}"
        fewer = f"use count: {fitting}, or " if fitting else ""
        other = "linear" if self.head == "conv" else "conv"
        return (
            f"exits: count {self.count}, but only {fitting} cut points take a {self.head} head within share: "
            f"{self.share}. Raise share, {fewer}use head: {other}"
        )

    def _trial(self, traced: fx.GraphModule, cut: CutPoint) -> ExitHead:
        """About the head that an exit here would have, among as many as are wanted."""
        torch.manual_seed(0)
        size, pool = 0, 1
        if self.head != "linear" and self.size != "auto":
            size = min(self.size)
        elif self.head == "conv":
            size, pool = self._largest_width(
                traced, cut, self.share * annotated_macs(traced) / self.count, self._pools[0]
            )
        return self._head(traced, cut, size, pool, 0)

    def _build_heads(
        self, traced: fx.GraphModule, chosen: list[CutPoint]
    ) -> tuple[list[ExitHead], list[tuple[int, int]]]:
        allowed = left = self.share * annotated_macs(traced)
        for _ in range(_TRIES):  # what chained heads add to each other is only known when they are there
            sizes = self._sizes(traced, chosen, left)
            heads: list[ExitHead] = []
            torch.manual_seed(0)
            for cut, (size, pool) in zip(chosen, sizes, strict=True):
                heads.append(self._head(traced, cut, size, pool, _context_width(heads, chosen)))
            spent = sum(_head_macs(h, cut) for h, cut in zip(heads, chosen, strict=True))
            if spent <= allowed or not self.chain or self.size != "auto":
                break
            left *= allowed / spent
        if spent > allowed * _ROUNDING:
            raise DynamizeError(
                f"exits: the {self.head} heads cost {spent / annotated_macs(traced):.1%} of the network, more than "
                f"share: {self.share}. Raise share, use fewer or later exits, or head: "
                + ("linear" if self.head == "conv" else "conv")
            )
        return heads, sizes

    def _sizes(self, traced: fx.GraphModule, chosen: list[CutPoint], allowed: float) -> list[tuple[int, int]]:
        """Size and pooling of each head."""
        for name in ("size", "pool"):
            given = getattr(self, name)
            if given != "auto" and len(given) != len(chosen):
                raise DynamizeError(
                    f"exits: {name} has {len(given)} entries for {len(chosen)} exits; give one for each"
                )
        if self.head == "linear":
            return [(0, 1)] * len(chosen)
        if self.size == "auto":
            return self._largest_sizes(traced, chosen, allowed)
        if self.head == "conv" and 0 in self.size:
            raise DynamizeError("exits: a conv head needs a size of at least 1 channel; without any: head: linear")
        pools = [1] * len(chosen) if self.pool == "auto" else self.pool
        return list(zip(self.size, pools, strict=True))

    def _head(self, traced: fx.GraphModule, cut: CutPoint, size: int, pool: int, context_width: int) -> ExitHead:
        classes = _classes(traced)
        fusion = zero_fusion(context_width, classes) if self.chain and context_width else None
        body: nn.Module
        classifier: nn.Module
        if self.head == "tail":
            body, classifier = tail(traced, cut.name, size)
        elif self.head == "conv":
            body = conv_body(cut.shape[0], size, min(cut.shape[1:]), pool)
            classifier = linear_classifier(size, classes)
        else:
            body, classifier = nn.Identity(), linear_classifier(cut.shape[0], classes)
        return ExitHead(body, classifier, fusion).to(blank(traced)).eval()

    def _largest_sizes(self, traced: fx.GraphModule, chosen: list[CutPoint], allowed: float) -> list[tuple[int, int]]:
        """The largest sizes that fit: an equal share for each convolutional head, one depth for all tails."""
        if self.head == "conv":
            given = self._pools * len(chosen) if len(self._pools) == 1 else self._pools
            return [
                self._largest_width(traced, cut, allowed / len(chosen), pool)
                for cut, pool in zip(chosen, given, strict=True)
            ]
        depth, fitting = 0, 0
        blocks = len(cut_points(traced))
        while depth < blocks:
            heads = [self._head(traced, cut, depth, 1, 0) for cut in chosen]
            if sum(_head_macs(h, cut) for h, cut in zip(heads, chosen, strict=True)) > allowed:
                break
            fitting, depth = depth, depth + 1
        return [(fitting, 1)] * len(chosen)

    @property
    def _pools(self) -> list[int | None]:
        """The pooling of each exit, or one None."""
        return [None] if self.pool == "auto" else list(self.pool)

    def _largest_width(
        self, traced: fx.GraphModule, cut: CutPoint, allowed: float, pool: int | None
    ) -> tuple[int, int]:
        """The widest convolutions that fit, on a map that is averaged as given, or as little as that takes."""
        widths, most = range(_WIDTH_STEP, _WIDEST + 1, _WIDTH_STEP), min(cut.shape[1:])
        pools = [2**k for k in range(most.bit_length())] if pool is None else [pool]
        for pool in pools:
            fitting = self._fitting(traced, cut, widths, pool, allowed)
            if fitting:
                return widths[fitting - 1], pool
        return _NARROW[max(0, self._fitting(traced, cut, _NARROW, pools[-1], allowed) - 1)], pools[-1]

    def _fitting(self, traced: fx.GraphModule, cut: CutPoint, widths: Sequence[int], pool: int, allowed: float) -> int:
        """How many of these widths, which rise, fit."""
        return bisect_right(widths, allowed, key=lambda width: _head_macs(self._head(traced, cut, width, pool, 0), cut))


def _cost_note(built: Sequence[ExitHead], chosen: list[CutPoint], traced: fx.GraphModule) -> str:
    total = annotated_macs(traced)
    heads = sum(_head_macs(head, cut) for head, cut in zip(built, chosen, strict=True))
    places = ", ".join(f"{cut.module or cut.name} ({cut.macs / total:.0%} of MACs)" for cut in chosen)
    return f"exits after {places}; all heads together cost {heads / total:.1%} of the network"


def _refuse_inside_units(names: Sequence[str], every: list[CutPoint], outside: list[CutPoint]) -> None:
    for name in names:
        if find_cut(every, name) not in outside:
            raise DynamizeError(
                f"exits: '{name}' lies between blocks that share a gate, so an exit has no place there: put `exits` "
                "before `skip_gates`, which then parts the blocks there, or give these blocks a gate each"
            )


def _nearest(costs: torch.Tensor, wanted: Sequence[float]) -> list[int]:
    """Indexes of distinct candidates nearest to the wanted costs, ascending."""
    picked: list[int] = []
    for goal in wanted:
        free = [i for i in range(len(costs)) if i not in picked]
        picked.append(min(free, key=lambda i: abs(float(costs[i]) - goal)))
    return sorted(picked)


def _classes(traced: fx.GraphModule) -> int:
    return int(output_value(traced.graph).meta["shape"][1])


def _head_macs(head: ExitHead, cut: CutPoint) -> float:
    context = None if head.fusion is None else blank(head, 1, head.fusion.in_features)
    return count_macs(head, blank(head, 1, *cut.shape), context)


def _context_width(heads: Sequence[ExitHead], chosen: Sequence[CutPoint]) -> int:
    """Channels of everything that these heads hand on."""
    width = 0
    for head, cut in zip(heads, chosen, strict=False):
        with torch.no_grad():
            width += head.body(blank(head, 1, *cut.shape)).shape[1]
    return width
