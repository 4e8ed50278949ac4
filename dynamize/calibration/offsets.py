"""Operating points of a network, with gates or without: one offset added to all gate scores moves it along its curve.

Under each offset images take other paths, so each has a table of its own; exits are solved within each table.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from dynamize.arguments import given_network
from dynamize.calibration.asking import EVERYONE_ASKED, Asking, askings
from dynamize.calibration.certified import Candidate, fixed_order
from dynamize.calibration.collect import TableMaker
from dynamize.calibration.operating import OperatingPoint, OperatingPoints, named_by_cost, undominated
from dynamize.calibration.points import operating_points
from dynamize.calibration.table import ConfidenceTable
from dynamize.data.given import given_images
from dynamize.errors import DynamizeError, InfeasibleError
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork
from dynamize.runtime.engine import default_backend

OFFSETS = (-4.0, -2.5, -1.5, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 1.5, 2.5, 4.0, ALL_OPEN)
_REFINEMENTS = 2
_POINTS_EACH = 8  # exits' settings per offset on the curve

Solver = Callable[[ConfidenceTable], OperatingPoint]


def calibrate(
    network: DynamicNetwork, loader: Any, teacher: nn.Module, *, count: int = 20, seed: int = 0
) -> OperatingPoints:
    """Operating points of ``network`` along its whole curve, also kept on it; which one it stands at is not changed.

    Args:
        network: trained, with exits or gates; the temperatures of exits are fitted here.
        loader: calibration images that ``teacher`` was not trained on, under the test-time transform: a DataLoader, a
            dataset or a pair (images, labels), as :func:`dynamize.splits` takes them.
        teacher: the original network, which accuracy drops refer to.
        count: how many points.
        seed: of the cross-fitting folds.

    Raises:
        DynamizeError: the network decides nothing, or there are no images, or some without a class of the network.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.Exits(), dz.Distill(epochs=1)], (1, 8, 8), context)  # a dz.Context
        >>> points = dz.calibrate(dyn, context.data.calibration, net)
        >>> dyn.set_operating_point(points.at(macs_ratio=0.9))
    """
    if not isinstance(network, DynamicNetwork):
        raise DynamizeError("dz.calibrate takes a converted network: make it with dz.convert(network, [dz.Exits()])")
    if not network.decisions():
        raise DynamizeError("dz.calibrate: the network has neither exits nor gates: convert it with dz.Exits() first")
    given_network(teacher, "teacher")
    device = next(network.parameters()).device
    images = loader if hasattr(loader, "batches") else given_images("calibration", loader)
    maker = TableMaker(network, images, teacher, device, default_backend(device))
    network.operating_points = curve_of_all(every_asking(maker), count, seed)
    return network.operating_points


class OffsetTables:
    """Tables by offset, made when they are first asked for; without gates there is one, at 0.

    ``asking`` is which networks of a row are asked.
    """

    def __init__(self, maker: TableMaker, asking: Asking = EVERYONE_ASKED) -> None:
        self.maker, self.asking = maker, asking
        self._tables: dict[float, ConfidenceTable] = {}

    def offsets(self) -> list[float]:
        """The grid, the cheapest first."""
        return list(OFFSETS) if self.maker.network.changing else [0.0]

    def put(self, point: OperatingPoint) -> OperatingPoint:
        """A point that was found on these tables, for the whole network."""
        return self.asking.put(self.maker.network, point)

    def dearest(self, measure: str) -> float:
        """The most that any image can cost."""
        return float(self.at(self.offsets()[-1]).cost(measure).max())

    def at(self, offset: float) -> ConfidenceTable:
        """The table at this offset."""
        if offset not in self._tables:
            self._tables[offset] = self.maker.table(offset, asking=self.asking)
        return self._tables[offset]


def every_asking(maker: TableMaker) -> list[OffsetTables]:
    """The tables of each choice of the networks that are asked; one for a network by itself."""
    return [OffsetTables(maker, asking) for asking in askings(maker.network, maker.labelled)]


def best_of_all(every: Sequence[OffsetTables], solve: Solver, cheapest: bool) -> tuple[OperatingPoint, OffsetTables]:
    """The best point that ``solve`` finds, whoever is asked, and the tables that it is on.

    Raises:
        InfeasibleError: there is none; the error is that of what comes nearest.
    """
    found: dict[float, OperatingPoint] = {}
    refused: list[InfeasibleError] = []
    for number, tables in enumerate(every):
        try:
            found[number] = tables.put(best_point(tables, solve, cheapest))
        except InfeasibleError as error:
            refused.append(error)
    if not found:
        raise min(refused, key=lambda error: error.nearest)
    best = _best(found, cheapest)
    return found[best], every[int(best)]


def curve_of_all(every: Sequence[OffsetTables], count: int, seed: int) -> OperatingPoints:
    """Up to ``count`` points along the best of the curves of all."""
    if len(every) == 1:
        return curve(every[0], count, seed)
    points = [
        tables.put(point).model_copy(update={"name": "macs"})
        for tables in every
        for point in curve(tables, _POINTS_EACH if tables.maker.network.changing else count, seed)
    ]
    return _thinned(points, count, every[0])


def order_without_images(network: DynamicNetwork) -> list[Candidate] | None:
    """An order in which its settings can be tested that needs no images, if there is one: of its single threshold, or
    of its offset, twice as fine as the grid."""
    if not network.changing:
        return fixed_order(len(network.leaving))
    middles = [(low + high) / 2 for low, high in pairwise(OFFSETS) if high < ALL_OPEN]
    return fixed_order(len(network.leaving), [*OFFSETS, *middles])


def best_point(tables: OffsetTables, solve: Solver, cheapest: bool) -> OperatingPoint:
    """The point that ``solve`` finds at the best offset: of the fewest MACs, or else of the highest accuracy.

    The grid of offsets is refined around the best one.

    Raises:
        InfeasibleError: no offset meets the limit; the error is that of the offset which comes nearest.
    """
    tried: list[float] = []
    found: dict[float, OperatingPoint] = {}
    refused: list[InfeasibleError] = []

    def consider(offset: float) -> None:
        tried.append(offset)
        try:
            found[offset] = solve(tables.at(offset)).model_copy(update={"offset": offset})
        except InfeasibleError as error:
            refused.append(error)

    for offset in tables.offsets():
        consider(offset)
    if not found:
        raise min(refused, key=lambda error: error.nearest)
    for _ in range(_REFINEMENTS if len(tables.offsets()) > 1 else 0):
        best = _best(found, cheapest)
        for offset in _between(tried, best):
            consider(offset)
    return found[_best(found, cheapest)]


def curve(tables: OffsetTables, count: int, seed: int) -> OperatingPoints:
    """Up to ``count`` points along the whole curve, none of which another one beats in both accuracy and MACs."""
    offsets = tables.offsets()
    if len(offsets) == 1:
        return operating_points(tables.at(offsets[0]), count, seed=seed)
    every = [
        point.model_copy(update={"offset": offset, "name": "macs"})
        for offset in offsets
        for point in operating_points(tables.at(offset), _POINTS_EACH, seed=seed)
    ]
    return _thinned(every, count, tables)


def _thinned(every: Sequence[OperatingPoint], count: int, tables: OffsetTables) -> OperatingPoints:
    front = undominated(every)
    picked = sorted({round(i * (len(front) - 1) / max(1, count - 1)) for i in range(count)})
    static = tables.at(tables.offsets()[0]).static_cost["macs"]
    return OperatingPoints(tuple(named_by_cost([front[place] for place in picked], static)))


def with_chosen(
    along: OperatingPoints, chosen: OperatingPoint, within: Callable[[OperatingPoint], bool], cheapest: bool
) -> tuple[OperatingPoints, OperatingPoint]:
    """The curve with the point that was solved for among it, as "chosen-0.48", and without those that it beats; and
    that point.

    Solving for one limit looks at other settings than making the curve, so a point of the curve that is ``within`` the
    limit and better takes its place.
    """
    met: dict[float, OperatingPoint] = dict(enumerate([chosen, *filter(within, along)]))
    best = met[_best(met, cheapest)]
    others = [point.model_copy(update={"name": point.name.partition("-")[0]}) for point in along if point is not best]
    best = best.model_copy(update={"name": "chosen"})
    kept = undominated([best, *others])
    if best not in kept:  # it is there for its milliseconds
        kept = sorted([*kept, best], key=lambda point: point.macs)
    place = kept.index(best)
    points = OperatingPoints(tuple(named_by_cost(kept, best.macs / best.macs_ratio)))
    return points, points[place]


def _best(found: Mapping[float, OperatingPoint], cheapest: bool) -> float:
    if cheapest:
        return min(found, key=lambda offset: (found[offset].macs, -found[offset].accuracy))
    return max(found, key=lambda offset: (found[offset].accuracy, -found[offset].macs))


def _between(offsets: Sequence[float], best: float) -> list[float]:
    """Midpoints to both neighbours of an offset."""
    known = sorted(offsets)
    place = known.index(best)
    neighbours = [one for one in (known[place - 1 : place] + known[place + 1 : place + 2]) if abs(one) < ALL_OPEN]
    return [(best + one) / 2 for one in neighbours if abs(best) < ALL_OPEN]
