"""The converted network: static segments, the exit heads between them, and the one place that decides."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from dynamize.errors import DynamizeError
from dynamize.nn.confidence import CONFIDENCES, ConfidenceName
from dynamize.nn.dispatch import Piece
from dynamize.nn.gated import GatedSegment, Unit
from dynamize.nn.heads import ExitHead, extend_context
from dynamize.nn.routing import Routing, StageOutput, run_stages

if TYPE_CHECKING:
    from dynamize.calibration.points import OperatingPoint, OperatingPoints
    from dynamize.sources import SourceSpec


class DynamicNetwork(nn.Module):
    """A classifier in K segments with an exit after each.

    ``train()``: returns the logits of all K exits, a list of (N, classes), dense and differentiable.
    ``eval()``: returns (N, classes), each image's answer from the exit it left at; what comes after is not executed
    for that image. A new network has all exits off and answers as the original does.

    Args:
        segments: K modules; the last one returns logits.
        heads: K - 1 exit heads.
        fusion: lets the last exit build on what the heads saw, (N, D) -> (N, classes).
        confidence: what the thresholds are compared with.
        input_shape: (C, H, W).
        plain: the original network's graph, of which the segments are parts.
        cuts: the K - 1 cut points of ``plain`` that the heads stand at.
        memory: what recurrent gates share.

    Attributes:
        gate_offset: moves all gates towards their dearer (positive) or cheaper (negative) paths; ALL_OPEN opens them.
        thresholds: one score for each early exit, None where it is off; set by :meth:`set_operating_point`.
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

    temperatures: Tensor

    def __init__(
        self,
        segments: Sequence[nn.Module],
        heads: Sequence[ExitHead] = (),
        *,
        input_shape: Sequence[int],
        fusion: nn.Linear | None = None,
        confidence: ConfidenceName = "top_probability",
        plain: fx.GraphModule | None = None,
        cuts: Sequence[str] = (),
        memory: nn.LSTMCell | None = None,
    ) -> None:
        super().__init__()
        if len(segments) != len(heads) + 1:
            raise ValueError(f"{len(segments)} segments need {len(segments) - 1} heads, given {len(heads)}")
        self.segments = nn.ModuleList(segments)
        self._gate_offset = 0.0
        self.heads = nn.ModuleList(heads)
        self.fusion = fusion
        self.confidence: ConfidenceName = confidence
        self.input_shape = tuple(input_shape)
        self._plain = (plain,)  # a tuple: its modules are those of the segments, which hold them already
        self.cuts = list(cuts)
        self.memory = memory
        self.register_buffer("temperatures", torch.ones(len(heads)))
        self.thresholds: list[float | None] = [None] * len(heads)
        self.operating_points: OperatingPoints | None = None
        self.operating_point: OperatingPoint | None = None
        self.gradient_equilibrium = False
        self.history: list[dict[str, Any]] = []
        self.source: SourceSpec | None = None
        self.routing: Routing | None = None

    @property
    def plain(self) -> fx.GraphModule:
        """The original network's graph; it shares its modules with the segments."""
        (plain,) = self._plain
        if plain is None:
            raise ValueError("a network made by hand has no original graph: make it with dynamize.convert")
        return plain

    @property
    def units(self) -> list[Unit]:
        """All gated units in order of execution."""
        return [unit for segment in self.segments if isinstance(segment, GatedSegment) for unit in segment.units]

    @property
    def gate_offset(self) -> float:
        return self._gate_offset

    @gate_offset.setter
    def gate_offset(self, offset: float) -> None:
        self._gate_offset = offset
        for segment in self.segments:
            if isinstance(segment, GatedSegment):
                segment.offset = offset

    def force_paths(self, choices_NU: Tensor | None) -> None:
        """Let the images of the next batches take these paths through all units whatever the gates say; None ends it.

        The images must keep their rows, so exits have to be off.
        """
        column = 0
        for segment in self.segments:
            if isinstance(segment, GatedSegment):
                following = column + len(segment.units)
                segment.forced = None if choices_NU is None else choices_NU[:, column:following]
                column = following

    @property
    def exit_count(self) -> int:
        """K, the network's own classifier included."""
        return len(self.segments)

    @property
    def chained(self) -> bool:
        """Whether exits build on earlier heads, so that a head runs even where its exit is off."""
        return self.fusion is not None

    def forward(self, images_NCHW: Tensor) -> Tensor | list[Tensor]:
        if self.training:
            logits = self.all_exits(images_NCHW)
            return logits if len(logits) > 1 else logits[0]
        routed = run_stages(self.stages(), self.thresholds, images_NCHW)
        if self.routing is not None:
            self.routing.add(routed)
        return routed.logits

    def all_exits(self, images_NCHW: Tensor) -> list[Tensor]:
        """Logits of all K exits for every image, each (N, classes), in either mode."""
        features, context, found = images_NCHW, None, []
        for k, head in enumerate(self.heads):
            features = self.segments[k](features)
            left = self.exit_count - k
            branch = features
            if self.gradient_equilibrium and self.training:
                branch, features = _Rescale.apply(features, 1 / left), _Rescale.apply(features, (left - 1) / left)
            logits, pooled = head(branch, context)
            found.append(logits)
            context = extend_context(context, pooled.detach()) if self.chained else None
        logits = self.segments[-1](features)
        return [*found, logits if self.fusion is None else logits + self.fusion(context)]

    def stages(self) -> list["NetworkStage"]:
        """What runs between two decisions, stage by stage."""
        return [NetworkStage(self, k) for k in range(self.exit_count)]

    def set_operating_point(self, point: "OperatingPoint | str | None") -> None:
        """Switch to another operating point; no retraining, no copy.

        Args:
            point: one of :attr:`operating_points`, its name, or None for all exits off.

        Raises:
            DynamizeError: an unknown name, or thresholds for another number of exits.
        """
        if isinstance(point, str):
            if self.operating_points is None:
                raise DynamizeError("the network has no operating points yet: run the `calibrate` step first")
            point = self.operating_points[point]
        thresholds = [None] * len(self.heads) if point is None else list(point.thresholds)
        if len(thresholds) != len(self.heads):
            raise DynamizeError(
                f"the operating point has {len(thresholds)} thresholds, the network {len(self.heads)} early exits: "
                "calibrate this network again"
            )
        self.thresholds, self.operating_point = cast(list[float | None], thresholds), point
        self.gate_offset = 0.0 if point is None or point.gate_offset is None else point.gate_offset

    def scores(self, logits: Tensor, exit_index: int) -> Tensor:
        """Confidence of one early exit after its temperature: (N, classes) -> (N,), float32."""
        return CONFIDENCES[self.confidence](logits.float() / self.temperatures[exit_index].to(logits.device))


class NetworkStage:
    """Segment ``index`` of a network and the exit behind it: static, so a backend can compile it by itself."""

    def __init__(self, network: DynamicNetwork, index: int) -> None:
        self.network, self.index = network, index

    def __call__(self, features: Tensor, context: Tensor | None, decide: bool) -> StageOutput:
        segment = self.network.segments[self.index]
        features = segment(features)
        choices = segment.choices if isinstance(segment, GatedSegment) else None
        return self.exit(features, context, decide)._replace(choices=choices)

    def pieces(self) -> list[Piece]:
        """What a stage with gates consists of; empty without gates."""
        segment = self.network.segments[self.index]
        return segment.as_pieces() if isinstance(segment, GatedSegment) else []

    def exit(self, features: Tensor, context: Tensor | None, decide: bool) -> StageOutput:
        """What follows the segment."""
        network = self.network
        if self.index == network.exit_count - 1:
            logits = features if network.fusion is None else features + network.fusion(context)
            return StageOutput(None, None, logits, None)
        if not decide and not network.chained:
            return StageOutput(features, None, None, None)
        logits, pooled = network.heads[self.index](features, context)
        context = extend_context(context, pooled) if network.chained else None
        if not decide:
            return StageOutput(features, context, None, None)
        return StageOutput(features, context, logits, network.scores(logits, self.index))


class _Rescale(torch.autograd.Function):
    """Identity whose gradient is multiplied: gradient equilibrium (Li et al. 2019, IMTA, sec. 3.2)."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
