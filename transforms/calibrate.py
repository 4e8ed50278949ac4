"""`calibrate`: choose the thresholds of all exits for a budget, from one pass over the calibration images."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from dynamize.calibration.certified import Trial, verdict
from dynamize.calibration.collect import TableMaker
from dynamize.calibration.goal import UNLABELLED, Goal
from dynamize.calibration.offsets import (
    OffsetTables,
    best_of_all,
    best_point,
    curve_of_all,
    every_asking,
    order_without_images,
    with_chosen,
)
from dynamize.calibration.operating import OperatingPoint, no_ratio
from dynamize.calibration.solver import unreachable
from dynamize.errors import DynamizeError, InfeasibleError, rounded_up
from dynamize.graph.macs import count_macs
from dynamize.graph.tracer import blank
from dynamize.measure.controls import adaptivity
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import setting_at
from dynamize.transform import Applied, Context, Kind, Transform, find_transform, gates_are_fused

if TYPE_CHECKING:
    from dynamize.data import Splits

Allows = Callable[[OperatingPoint], bool]


class Calibrate(Transform):
    """Fit a temperature to each head, solve the thresholds of exits and the offset of gates for a budget, and list
    points along the whole curve.

    At most one of ``max_drop``, ``macs_ratio``, ``macs`` and ``latency_ms``; none means ``max_drop: 0.2``. The
    others stay reachable without retraining through ``set_operating_point`` and ``predict --budget``.

    What is found is expected to keep the limit, and about half of the time does not quite; with ``certain: 0.95`` it
    keeps it in 95 % of draws of the calibration images, at a price that is stated. Without labels, disagreement with
    the original network is limited instead, which the drop cannot exceed.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> steps = [dz.Exits(count=1), dz.Distill(epochs=1), dz.Calibrate(macs_ratio=0.8)]
        >>> dyn = dz.convert(net, steps, (1, 8, 8), context)  # a dz.Context
        >>> dyn.operating_points.at(macs_ratio=0.9).macs_ratio <= 0.9
        True
    """

    pass_name: Literal["calibrate"] = Field("calibrate", alias="pass")
    max_drop: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="largest expected accuracy drop against the original network, in points"
    )
    macs_ratio: PositiveFloat | None = Field(None, description="mean MACs as a share of the original network's")
    macs: PositiveFloat | None = Field(None, description="mean MACs per image")
    latency_ms: PositiveFloat | None = Field(
        None, description="mean milliseconds per image on the run's backend at `latency_batch`"
    )
    labels: Literal["given", "none"] = Field(
        "given", description="none: judge by the original network's answers, on images whose labels are not read"
    )
    certain: Annotated[float, Field(ge=0.5, lt=1)] | None = Field(
        None, description="confidence, over draws of the calibration images, with which the limit is kept, such as 0.95"
    )
    latency_batch: PositiveInt = Field(1, description="batch size at which the exits are timed")
    points: PositiveInt = Field(20, description="operating points along the curve")

    structural: ClassVar[bool] = False
    added: ClassVar[tuple[str, ...]] = ("member", "labels", "certain")
    whole: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    collective: ClassVar[bool] = False
    kind: ClassVar[Kind] = Kind.SOLVES
    needs: ClassVar[Kind] = Kind.ADDS_EXITS | Kind.ADDS_GATES

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = self._given()
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are budgets both; give one of them")
        return self

    @field_validator("macs_ratio")
    @classmethod
    def _is_a_share(cls, ratio: float | None) -> float | None:
        if ratio is not None and (fault := no_ratio(ratio)):
            raise ValueError(f"{fault} (given: {ratio:g})")
        return ratio

    @field_validator("macs")
    @classmethod
    def _is_no_share(cls, macs: float | None) -> float | None:
        if macs is not None and macs <= 1:
            raise ValueError(
                f"{macs:g} for an image is less than any network takes; for a share, write macs_ratio: {macs:g}"
            )
        return macs

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        if not network.decisions():
            if gates_are_fused(network):
                return Applied(network, self, ["nothing to solve: `fuse_gates` left a static network"])
            raise DynamizeError(
                "calibrate: the network has neither exits nor gates: put `exits`, `skip_gates` or `channel_gates` "
                "before"
            )
        data, teacher = context.needs_data(self), context.needs_teacher(self)
        trial = self._trial(network, len(data.calibration), context.seed)
        maker = TableMaker(
            network,
            data.calibration,
            teacher,
            context.device,
            context.backend,
            self.latency_batch,
            labelled=self.labels == "given",
            fitted_on=None if trial is None else trial.learnt,
        )
        every, given = every_asking(maker), self._given()
        self._refuse_what_limits_nothing(maker.static_cost["macs"])
        goal = Goal.of(maker.static_cost["macs"], **given)
        resolved = self if given else self.model_copy(update={goal.asked: goal.typed})
        notes = [*data.warnings, *([] if maker.labelled else [UNLABELLED])]
        solved, allows = self._solve(every, goal, trial, context.seed, notes)
        notes += [] if trial is None else _fitted_before(network)
        along = curve_of_all(every, self.points, context.seed)
        network.operating_points, chosen = with_chosen(along, solved, allows, goal.about_accuracy)
        network.set_operating_point(chosen)
        notes += [_promise(chosen), *_asked(network, chosen)]
        if network.changing:
            notes.append(adaptivity(network, data.calibration, context.device, context.seed).verdict())
        return Applied(network, resolved, notes)

    def passes(self, data: "Splits") -> float:
        return 2 * len(data.calibration)

    def leaves_points(self) -> int:
        return self.points + 1

    def check_budget(self, network: DynamicNetwork, context: Context) -> None:
        static = count_macs(network.plain, blank(network.plain, 1, *network.input_shape))
        self._refuse_what_limits_nothing(static)
        asked = self.macs if self.macs_ratio is None else self.macs_ratio * static
        cheapest = exit_costs(network).cheapest()
        if asked is not None and asked < cheapest * (1 - 1e-9):
            error = unreachable(asked, cheapest, static, "macs")
            raise error if self.macs is None else error.asking("macs", rounded_up(cheapest))

    def _refuse_what_limits_nothing(self, static_macs: float) -> None:
        if self.macs is not None and no_ratio(self.macs / static_macs):
            raise DynamizeError(
                f"calibrate: macs: {self.macs:g} limits nothing, as the original network takes {static_macs:.0f} for "
                f"an image: write {static_macs / 2:.0f} for half of them"
            )

    def _given(self) -> dict[str, float]:
        limits = {"max_drop": self.max_drop, "macs_ratio": self.macs_ratio}
        limits |= {"macs": self.macs, "latency_ms": self.latency_ms}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def _trial(self, network: DynamicNetwork, images: int, seed: int) -> Trial | None:
        if self.certain is None:
            return None
        order = order_without_images(network)
        return Trial.of(self.certain, order, images, seed, chooses=bool(network.members))

    def _solve(
        self, every: Sequence[OffsetTables], goal: Goal, trial: Trial | None, seed: int, notes: list[str]
    ) -> tuple[OperatingPoint, Allows]:
        """The point, and which points of the curve may take its place."""
        if trial is None:
            return best_of_all(every, lambda table: goal.solve(table, seed), goal.about_accuracy)[0], goal.allows
        tables = every[0]
        if len(every) > 1:
            learnt = trial.learnt
            solved = best_of_all(every, lambda table: goal.solve(table.subset(learnt), seed), goal.about_accuracy)
            tables = solved[1]
        try:
            plain = tables.put(best_point(tables, lambda table: goal.solve(table, seed), goal.about_accuracy))
        except InfeasibleError:
            plain = None
        found = trial.certify(tables.at, tables.offsets(), goal, tables.dearest(goal.measure))
        notes += verdict(found, plain, goal)
        return tables.put(found.point), lambda _: False


def _asked(network: DynamicNetwork, point: OperatingPoint) -> list[str]:
    """Which networks of a row are asked at a point, and how their answers are joined."""
    if not network.members:
        return []
    asked = [piece.name for piece in network.leaving if piece.links and not piece.idle(setting_at(point))]
    if not asked:
        return ["chosen on calibration images: none of the networks in front is asked"]
    return [f"chosen on calibration images: first {', '.join(asked)}, and answers joined by {point.combine}"]


def _fitted_before(network: DynamicNetwork) -> list[str]:
    steps = [step["pass"] for step in network.history if find_transform(step["pass"]).kind & Kind.FITS_CALIBRATION]
    if not steps:
        return []
    names = ", ".join(f"`{name}`" for name in dict.fromkeys(steps))
    return [f"{names} may have chosen by the same calibration images, which the confidence does not account for"]


def _promise(point: OperatingPoint) -> str:
    low, high = (100 * end for end in point.accuracy_drop_ci)
    lost = "an accuracy drop of" if point.labels == "given" else "answers that differ from the original network's by"
    return (
        f"expected at this operating point: {point.macs_ratio:.3f} of the MACs at {lost} "
        f"{100 * point.accuracy_drop:.2f} points (95 %: {low:.2f} to {high:.2f})"
    )
