"""`calibrate`: choose the thresholds of all exits for a budget, from one pass over the calibration images."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from dynamize.calibration.collect import TableMaker
from dynamize.calibration.offsets import OffsetTables, best_point, curve, with_chosen
from dynamize.calibration.operating import OperatingPoint, no_ratio
from dynamize.calibration.points import point_for_budget, point_for_drop
from dynamize.calibration.table import ConfidenceTable
from dynamize.errors import DynamizeError, InfeasibleError, rounded_up
from dynamize.measure.controls import adaptivity
from dynamize.nn.network import DynamicNetwork
from dynamize.transform import Applied, Context, Kind, Transform, gates_are_fused

_DEFAULT_DROP = 0.2


class Calibrate(Transform):
    """Fit a temperature to each head, solve the thresholds of exits and the offset of gates for a budget, and list
    points along the whole curve.

    At most one of ``max_drop``, ``macs_ratio``, ``macs`` and ``latency_ms``; none means ``max_drop: 0.2``. The
    others stay reachable without retraining through ``set_operating_point`` and ``predict --budget``.

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
    latency_batch: PositiveInt = Field(1, description="batch size at which the exits are timed")
    points: PositiveInt = Field(20, description="operating points along the curve")

    structural: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    collective: ClassVar[bool] = False
    kind: ClassVar[Kind] = Kind.SOLVES
    needs: ClassVar[Kind] = Kind.ADDS_EXITS | Kind.ADDS_GATES

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [name for name in ("max_drop", "macs_ratio", "macs", "latency_ms") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are budgets both; give one of them")
        return self

    @field_validator("macs_ratio")
    @classmethod
    def _is_a_share(cls, ratio: float | None) -> float | None:
        if ratio is not None and (fault := no_ratio(ratio)):
            raise ValueError(f"{fault} (given: {ratio:g})")
        return ratio

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        if not network.decisions():
            if gates_are_fused(network):
                return Applied(network, self, ["nothing to solve: `fuse_gates` left a static network"])
            raise DynamizeError(
                "calibrate: the network has neither exits nor gates: put `exits`, `skip_gates` or `channel_gates` "
                "before"
            )
        data = context.needs_data(self)
        teacher = context.needs_teacher(self)
        maker = TableMaker(network, data.calibration, teacher, context.device, context.backend, self.latency_batch)
        tables = OffsetTables(maker)
        resolved = self if self._given() else self.model_copy(update={"max_drop": _DEFAULT_DROP})
        cheapest = resolved.max_drop is not None
        solved = best_point(tables, lambda table: resolved._solve(table, context.seed), cheapest)
        along = curve(tables, self.points, context.seed)
        network.operating_points, chosen = with_chosen(along, solved, resolved._allows, cheapest)
        network.set_operating_point(chosen)
        notes = [*data.warnings, _promise(chosen)]
        if network.changing:
            notes.append(adaptivity(network, data.calibration, context.device, context.seed).verdict())
        return Applied(network, resolved, notes)

    def _given(self) -> bool:
        return any(v is not None for v in (self.max_drop, self.macs_ratio, self.macs, self.latency_ms))

    def _solve(self, table: ConfidenceTable, seed: int) -> OperatingPoint:
        if self.max_drop is not None:
            return point_for_drop(table, self.max_drop, seed=seed)
        if self.latency_ms is not None:
            return point_for_budget(table, self.latency_ms, "ms", seed=seed)
        macs = self.macs if self.macs_ratio is None else self.macs_ratio * table.static_cost["macs"]
        assert macs is not None
        try:
            return point_for_budget(table, macs, seed=seed)
        except InfeasibleError as error:
            raise error if self.macs is None else error.asking("macs", rounded_up(error.nearest)) from None

    def _allows(self, point: OperatingPoint) -> bool:
        """Whether a point keeps the budget."""
        if self.max_drop is not None:
            return 100 * point.accuracy_drop <= self.max_drop
        limits = ((self.macs_ratio, point.macs_ratio), (self.macs, point.macs), (self.latency_ms, point.latency_ms))
        return all(limit is None or (found is not None and found <= limit) for limit, found in limits)


def _promise(point: OperatingPoint) -> str:
    low, high = (100 * end for end in point.accuracy_drop_ci)
    return (
        f"expected at this operating point: {point.macs_ratio:.3f} of the MACs at an accuracy drop of "
        f"{100 * point.accuracy_drop:.2f} points (95 %: {low:.2f} to {high:.2f})"
    )
