"""`exits`: intermediate classifiers at cut points, so that easy images leave early."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import fx, nn

from dynamize.errors import DynamizeError
from dynamize.graph.cuts import CutPoint, cut_points, find_cut
from dynamize.graph.macs import annotated_macs, count_macs
from dynamize.graph.nodes import output_value, positions
from dynamize.graph.tails import tail
from dynamize.graph.trace import annotate, blank
from dynamize.nn.confidence import ConfidenceName
from dynamize.nn.exits import Exit, Fusion
from dynamize.nn.heads import ExitHead, conv_body, linear_classifier, zero_fusion
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Piece
from dynamize.nn.row import outside
from dynamize.training.probe import probe
from dynamize.transform import Applied, Context, Kind, Transform

_WIDTH_STEP = 16  # convolution widths that are no multiple of 16 lose on CPUs
_WIDEST = 1024

Names = Annotated[list[str], Field(min_length=1)]


class Exits(Transform):
    """Insert intermediate classifiers (Huang et al. 2018, MSDNet, sec. 3; Teerapittayanon et al. 2016, BranchyNet).

    ``at: auto`` weighs the MACs up to each cut point against what a closed-form probe on calibration features says
    a head there could answer; without data it spreads the exits evenly over the MACs.

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
    chain: bool = Field(False, description="let each exit build on what the heads before it saw")
    confidence: ConfidenceName = Field("top_probability", description="what the thresholds are compared with")

    once: ClassVar[bool] = True
    kind: ClassVar[Kind] = Kind.ADDS_EXITS
    not_after: ClassVar[Kind] = Kind.TRAINS

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
        chosen = self._place(traced, cuts, context)
        with torch.random.fork_rng():  # initialising layers draws from the global generator
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
        note = _cost_note(heads, chosen, traced)
        resolved = self.model_copy(update={"at": names, "size": sizes, "count": len(chosen)})
        return Applied(network, resolved, [note])

    def _place(self, traced: fx.GraphModule, cuts: list[CutPoint], context: Context) -> list[CutPoint]:
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
            return ordered
        total = annotated_macs(traced)
        candidates = [cut for cut in cuts if cut.macs < (0.95 - self.share) * total] or cuts[:1]
        if len(candidates) < self.count:
            raise DynamizeError(
                f"exits: count {self.count}, but only {len(candidates)} cut points lie early enough to save work: "
                f"use count: {len(candidates)}"
            )
        costs = torch.tensor([cut.macs / total for cut in candidates])
        even = [(k + 1) / (self.count + 1) for k in range(self.count)]
        picked = _nearest(costs, even)
        if context.data is not None:
            traced.to(context.device)
            batches = context.data.calibration.batches(256)
            right = probe(traced, [cut.name for cut in candidates], batches, context.device)
            picked = _cheapest(right, costs, picked, self.share)
        return [candidates[i] for i in picked]

    def _build_heads(self, traced: fx.GraphModule, chosen: list[CutPoint]) -> tuple[list[ExitHead], list[int]]:
        allowed = self.share * annotated_macs(traced)
        if self.head == "linear":
            sizes = [0] * len(chosen)
        elif self.size != "auto":
            sizes = list(self.size)
            if len(sizes) != len(chosen):
                raise DynamizeError(f"exits: size has {len(sizes)} entries for {len(chosen)} exits; give one for each")
            if self.head == "conv" and 0 in sizes:
                raise DynamizeError("exits: a conv head needs a size of at least 1 channel; without any: head: linear")
        else:
            sizes = self._largest_sizes(traced, chosen, allowed)
        heads: list[ExitHead] = []
        torch.manual_seed(0)
        for cut, size in zip(chosen, sizes, strict=True):
            heads.append(self._head(traced, cut, size, _context_width(heads, chosen)))
        spent = sum(_head_macs(h, cut) for h, cut in zip(heads, chosen, strict=True))
        if spent > allowed * 1.0001:
            raise DynamizeError(
                f"exits: the {self.head} heads cost {spent / annotated_macs(traced):.1%} of the network, more than "
                f"share: {self.share}. Raise share, use fewer or later exits, or head: "
                + ("linear" if self.head == "conv" else "conv")
            )
        return heads, sizes

    def _head(self, traced: fx.GraphModule, cut: CutPoint, size: int, context_width: int) -> ExitHead:
        classes = _classes(traced)
        fusion = zero_fusion(context_width, classes) if self.chain and context_width else None
        body: nn.Module
        classifier: nn.Module
        if self.head == "tail":
            body, classifier = tail(traced, cut.name, size)
        elif self.head == "conv":
            body, classifier = conv_body(cut.shape[0], size, min(cut.shape[1:])), linear_classifier(size, classes)
        else:
            body, classifier = nn.Identity(), linear_classifier(cut.shape[0], classes)
        return ExitHead(body, classifier, fusion).to(blank(traced)).eval()

    def _largest_sizes(self, traced: fx.GraphModule, chosen: list[CutPoint], allowed: float) -> list[int]:
        """The largest sizes that fit: an equal share for each convolutional head, one depth for all tails."""
        if self.head == "conv":
            return [self._largest_width(traced, cut, allowed / len(chosen)) for cut in chosen]
        depth, fitting = 0, 0
        blocks = len(cut_points(traced))
        while depth < blocks:
            heads = [self._head(traced, cut, depth, 0) for cut in chosen]
            if sum(_head_macs(h, cut) for h, cut in zip(heads, chosen, strict=True)) > allowed:
                break
            fitting, depth = depth, depth + 1
        return [fitting] * len(chosen)

    def _largest_width(self, traced: fx.GraphModule, cut: CutPoint, allowed: float) -> int:
        widths = range(_WIDTH_STEP, _WIDEST + 1, _WIDTH_STEP)
        fitting = bisect_right(widths, allowed, key=lambda width: _head_macs(self._head(traced, cut, width, 0), cut))
        return widths[max(0, fitting - 1)]


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


def _cheapest(right: torch.Tensor, costs: torch.Tensor, start: list[int], share: float) -> list[int]:
    """Exits that minimise the mean cost if each image leaves at the first one whose probe is right.

    Coordinate descent from ``start``: each exit in turn moves to its best place until none moves.
    """

    def mean_cost(picked: list[int]) -> float:
        order = sorted(picked)
        cost = torch.full((right.shape[1],), 1 + share)
        for rank, i in reversed(list(enumerate(order))):
            cost = torch.where(right[i], costs[i] + share * (rank + 1) / len(order), cost)
        return float(cost.mean())

    picked, moved = list(start), True
    while moved:
        moved = False
        for k in range(len(picked)):
            others = picked[:k] + picked[k + 1 :]
            best = min((i for i in range(len(costs)) if i not in others), key=lambda i: mean_cost([*others, i]))
            if mean_cost([*others, best]) < mean_cost(picked) - 1e-9:
                picked, moved = [*picked[:k], best, *picked[k + 1 :]], True
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
