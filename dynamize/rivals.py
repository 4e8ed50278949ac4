"""What a user could do instead of a run's network: the networks that the recipe names, alone and one behind the other,
judged and timed beside it."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dynamize.calibration.intervals import prediction_interval
from dynamize.conversion import apply, wrap
from dynamize.errors import DynamizeError, InfeasibleError
from dynamize.evaluation import Evaluator, Judgement, latency_table, speedup_table
from dynamize.graph.macs import annotated_macs
from dynamize.nn.network import DynamicNetwork
from dynamize.report.ledger import RIVAL, Interval, Rival, Row
from dynamize.transform import Context, Kind, Transform
from dynamize.transforms.calibrate import Calibrate
from dynamize.transforms.cascade import Cascade, Member, build, names_of

CASCADE = "cascade"  # of all that are cheaper than the recipe's own network, in front of it


class Rivals:
    """The networks under ``compare:`` of a recipe, read before anything is trained.

    Args:
        members: as the recipe has them.
        teacher: the recipe's own network, untouched.
        input_shape: (C, H, W) of its images.
        context: with the images and the device.

    Raises:
        DynamizeError: one cannot be read, or tells other classes apart.
    """

    def __init__(
        self, members: Sequence[Member], teacher: nn.Module, input_shape: Sequence[int], context: Context
    ) -> None:
        self._teacher, self._input_shape, self._context = teacher, input_shape, context
        self._members = dict(zip(_names(members), members, strict=True))
        static = wrap(teacher, input_shape)
        self._macs = annotated_macs(static.plain)
        self._networks = {name: self._read(name, member, static) for name, member in self._members.items()}

    def rows(
        self, network: DynamicNetwork, last: Row, evaluator: Evaluator, steps: Sequence[Transform]
    ) -> tuple[Row, list[Rival]]:
        """The last row with its times from the rounds in which the rivals took turns too, and their rows.

        Args:
            network: as the run leaves it.
            last: its row.
            evaluator: of the run.
            steps: of the recipe; the last one that solves says what the cascade is calibrated for.
        """
        networks = {f"{RIVAL}{name}": one for name, one in self._networks.items()}
        notes: list[str] = []
        if not network.members and (first := self._cheaper()):
            try:
                networks[RIVAL + CASCADE] = self._cascade(first, last.macs, steps)
            except DynamizeError as error:  # too few calibration images: no reason to lose a finished run
                notes.append(f"not compared as a cascade: {error}")
        ours = evaluator.judge(network)
        judged = {name: evaluator.judge(one) for name, one in networks.items()}
        taking_turns = {"dynamic": network, **networks} if last.step else networks
        times = evaluator.times_together(taking_turns, {"dynamic": ours, **judged})
        if last.step:
            new = {"latency": latency_table(times, "dynamic"), "speedup": speedup_table(times, "dynamic")}
            last = last.model_copy(update=new)
        rows = []
        for number, (name, one) in enumerate(networks.items(), start=last.step + 1):
            row = evaluator.describe(number, name, one, judged[name])
            row = evaluator.timed(row, name, times)
            lead, lead_ci = _lead(judged[name], ours)
            rows.append(Rival(**dict(row), lead=lead, lead_ci=lead_ci))
        rows[-1] = rows[-1].model_copy(update={"notes": [*rows[-1].notes, *notes]})
        return last, rows

    def _read(self, name: str, member: Member, static: DynamicNetwork) -> DynamicNetwork:
        with _told_of_compare():
            graph = build(member.model_copy(update={"name": name}), static, self._context)[1]
        read = DynamicNetwork(graph, input_shape=self._input_shape).eval().to(self._context.device)
        blank = torch.zeros(1, *self._input_shape, device=self._context.device)
        with torch.no_grad():
            found, wanted = read(blank).shape[1], self._teacher(blank).shape[1]
        if found != wanted:
            raise DynamizeError(
                f"compare: {name} tells {found} classes apart, and the run's own network {wanted}: give a checkpoint "
                "that was trained on the same images"
            )
        return read

    def _cheaper(self) -> list[Member]:
        """Those that could stand in front of the recipe's own network, the cheapest first."""
        costs = {name: annotated_macs(one.plain) for name, one in self._networks.items()}
        return [self._members[name] for name in sorted(costs, key=costs.__getitem__) if costs[name] < self._macs]

    def _cascade(self, first: Sequence[Member], macs: float, steps: Sequence[Transform]) -> DynamicNetwork:
        """Calibrated as the recipe's own network is, or at the point whose ``macs`` are nearest to these."""
        solving = [step for step in steps if step.kind & Kind.SOLVES]
        if solving:
            try:
                return self._applied([Cascade(first=list(first)), solving[-1]])
            except InfeasibleError:  # its budget is out of this cascade's reach
                pass
        network = self._applied([Cascade(first=list(first)), Calibrate()])
        points = network.operating_points or ()
        network.set_operating_point(min(points, key=lambda point: abs(point.macs - macs)))
        return network

    def _applied(self, steps: Sequence[Transform]) -> DynamicNetwork:
        network = wrap(self._teacher, self._input_shape)
        for step in steps:
            network = apply(network, step, self._context)[0]
        return network.eval()


def _names(members: Sequence[Member]) -> list[str]:
    with _told_of_compare():
        return names_of(members, [CASCADE])


@contextmanager
def _told_of_compare() -> Iterator[None]:
    """What the step `cascade` refuses is said of the section of the recipe that is meant."""
    try:
        yield
    except DynamizeError as error:
        raise DynamizeError(f"compare: {str(error).removeprefix('cascade: ')}") from error


def _lead(rival: Judgement, ours: Judgement) -> tuple[float, Interval]:
    """How much more of all such images the rival gets right: on the same test images, with its 95 % interval."""
    right = (rival.answers == rival.labels).double() - (ours.answers == ours.labels).double()
    lead, low, high = prediction_interval(right.numpy(), fresh=sys.maxsize, bounds=(-1.0, 1.0))
    return lead, (low, high)
