"""What a user could do instead of a run's network: the networks that the recipe names, alone and one behind the
other."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from dynamize.conversion import apply, wrap
from dynamize.errors import DynamizeError, InfeasibleError
from dynamize.graph.macs import annotated_macs
from dynamize.member import Member, names_of
from dynamize.nn.network import DynamicNetwork
from dynamize.report.ledger import RIVAL
from dynamize.transform import Context, Kind, Transform
from dynamize.transforms.calibrate import Calibrate
from dynamize.transforms.cascade import Cascade, build

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

    def networks(
        self, network: DynamicNetwork, macs: float, steps: Sequence[Transform]
    ) -> tuple[dict[str, DynamicNetwork], list[str]]:
        """All that the run's network is compared with, by name, and what is to be told of them.

        Args:
            network: as the run leaves it.
            macs: what it costs.
            steps: of the recipe; the last one that solves says what the cascade is calibrated for.
        """
        found = {f"{RIVAL}{name}": one for name, one in self._networks.items()}
        notes: list[str] = []
        if not network.members and (first := self._cheaper()):
            try:
                found[RIVAL + CASCADE] = self._cascade(first, macs, steps)
            except DynamizeError as error:  # too few calibration images: no reason to lose a finished run
                notes.append(f"not compared as a cascade: {error}")
        return found, notes

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
