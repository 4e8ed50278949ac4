"""What a run is going to do, as `dynamize check` shows it and `dynamize run` times itself by."""

import time
from dataclasses import dataclass, field

import torch
from torch import nn

from dynamize.calibration.intervals import guessed
from dynamize.data import Splits
from dynamize.data.splits import SPLITS
from dynamize.evaluation import Evaluator, Judgement
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.recipe import Settings
from dynamize.rehearsal import Rehearsed, rehearse
from dynamize.runtime.engine import engine_class
from dynamize.subject import Subject
from dynamize.training.probe import probe
from dynamize.transform import Context

_LONGEST_TIMING, _SHORTEST_TIMING = 5.0, 0.1  # seconds
_TIMING_SHARE = 0.1  # of what the steps take


@dataclass(frozen=True)
class PlannedExit:
    """A place where images will leave: after which node, at which share of the original network's MACs, its head's
    share, and the share of calibration images that a probe there answers right; None where none can be put."""

    name: str
    kind: str
    after: str
    macs_ratio: float
    head_ratio: float
    probe: float | None


@dataclass(frozen=True)
class PlannedGate:
    """A gate: what it chooses from, and what each option costs as a share of the original network's MACs."""

    name: str
    kind: str
    options: tuple[str, ...]
    macs_ratios: tuple[float, ...]


@dataclass(frozen=True)
class PlannedStep:
    """A step with about how many minutes it takes, and what was found when it was tried."""

    transform: str
    minutes: float
    notes: list[str]


@dataclass(frozen=True)
class Plan:
    """A run before its first step; ``accuracy`` is the untouched network's on the test images, ``macs`` are per image,
    ``cheapest_ratio`` is what the cheapest path costs of them."""

    source: str
    input: tuple[int, ...]
    macs: float
    images: dict[str, int]
    classes: int
    accuracy: float
    cheapest_ratio: float
    exits: list[PlannedExit]
    gates: list[PlannedGate]
    steps: list[PlannedStep]
    warnings: list[str] = field(default_factory=list)

    @property
    def minutes(self) -> float:
        """Of all steps, with what is measured after each."""
        return sum(step.minutes for step in self.steps)


def probed(network: DynamicNetwork, data: Splits, device: torch.device) -> dict[str, float]:
    """By exit of an untrained network, the share of calibration images that its head could answer right, about."""
    if network.members:  # whose exits are whole networks
        return {}
    graphs = {piece.place[0]: piece.parts()[0].graph for piece in network.leaving}
    heads = {place: body for place, body in graphs.items() if body is not None}
    if not heads:
        return {}
    found = probe(network.plain.to(device), heads, data.calibration.batches(256), device)
    shares = dict(zip(heads, found.right.double().mean(1).tolist(), strict=True))
    return {piece.name: shares[piece.place[0]] for piece in network.leaving if piece.place[0] in shares}


def planned_exits(network: DynamicNetwork, static_macs: float, probes: dict[str, float]) -> list[PlannedExit]:
    """The exits of the network in the structure that it will have."""
    costs = exit_costs(network)
    return [
        PlannedExit(
            one.name, one.kind, piece.place[0], macs / static_macs, one.always / static_macs, probes.get(one.name)
        )
        for piece, one, macs in zip(network.leaving, costs.leaving, costs.cumulative().tolist(), strict=False)
    ]


def planned_gates(network: DynamicNetwork, static_macs: float) -> list[PlannedGate]:
    """The decisions on what comes after."""
    return [
        PlannedGate(one.name, one.kind, one.options, tuple(macs / static_macs for macs in one.macs))
        for one in exit_costs(network).changing
    ]


class Planner:
    """Looks ahead on a run.

    Args:
        settings: of the run.
        subject: what it is about.
        teacher: the untouched network.
        data: its images.
        evaluator: of the untouched network, on the test images.
    """

    def __init__(
        self, settings: Settings, subject: Subject, teacher: nn.Module, data: Splits, evaluator: Evaluator
    ) -> None:
        self.settings, self.subject, self.teacher, self.data = settings, subject, teacher, data
        self.evaluator = evaluator

    def warnings(self) -> list[str]:
        """What is wrong with the untouched network on these images."""
        subject = self.subject
        return [*subject.warnings(self.teacher), *guessing(self.evaluator.reference, subject.forgotten())]

    def rehearse(self, network: DynamicNetwork, context: Context, first: int) -> list[Rehearsed]:
        """The steps from ``first`` on, tried on ``network``, which is consumed; times are compared for as long as the
        settings say or, where they leave it open, as follows from how long the steps take."""
        steps = self._try(network, context, first)[1]
        asked = self.settings.timing_seconds
        self.evaluator.hurry(self._share(steps) if asked == "auto" else asked, self._image_seconds)
        return steps

    def plan(self, network: DynamicNetwork, context: Context) -> Plan:
        """The whole run, tried on ``network``, which is consumed.

        Raises:
            DynamizeError: it cannot work.
        """
        changed, steps = self._try(network, context, 1)
        static, data, evaluator = self.evaluator.static_macs, self.data, self.evaluator
        timing = len(evaluator.backends) * len(evaluator.batches) * evaluator.seconds
        judging = len(evaluator.reference.labels) * self._image_seconds
        after = [judging + timing] * len(steps)
        if after:
            after[-1] += self._contestants() * (judging + timing / 2)
        return Plan(
            source=self.subject.name,
            input=self.subject.input_shape,
            macs=static,
            images={name: len(getattr(data, name)) for name in SPLITS},
            classes=len(data.classes),
            accuracy=evaluator.reference.accuracy,
            cheapest_ratio=exit_costs(changed).cheapest() / static,
            exits=planned_exits(changed, static, probed(changed, data, context.device)),
            gates=planned_gates(changed, static),
            steps=[
                PlannedStep(one.step.pass_name, (self._seconds(one) + one.seconds + more) / 60, one.notes)
                for one, more in zip(steps, after, strict=True)
            ],
            warnings=self.warnings(),
        )

    def _share(self, steps: list[Rehearsed]) -> float:
        """Seconds of each comparison of times that together are a share of what the steps take."""
        training = sum(self._seconds(one) for one in steps)
        rows = len(steps) + 1 + self._contestants() / 2
        comparisons = len(self.evaluator.backends) * len(self.evaluator.batches) * rows
        return max(_SHORTEST_TIMING, training * _TIMING_SHARE / comparisons)

    def _contestants(self) -> int:
        """How many operating points and rivals are measured in the end, at most."""
        points = [step.leaves_points() for step in self.settings.steps]
        return max([1, *points]) + len(self.settings.compare)

    def _try(self, network: DynamicNetwork, context: Context, first: int) -> tuple[DynamicNetwork, list[Rehearsed]]:
        for backend in self.evaluator.backends:
            engine_class(backend)(context.device)
        started = time.monotonic()
        judged = self.evaluator.reference
        self._image_seconds = (time.monotonic() - started) / len(judged.labels)
        return rehearse(network, self.settings.transforms()[first - 1 :], context, first)

    def _seconds(self, one: Rehearsed) -> float:
        """What a step still takes, about."""
        return 0.0 if one.network is not None else one.step.passes(self.data) * self._image_seconds


def longest_timing(settings: Settings) -> float:
    """Seconds that a comparison of times takes at most."""
    return _LONGEST_TIMING if settings.timing_seconds == "auto" else settings.timing_seconds


def guessing(judged: Judgement, forgotten: str) -> list[str]:
    """What to say of a network that answers no better than always the commonest class does, and what may have been
    ``forgotten``."""
    commonest = guessed(judged.answers == judged.labels, judged.labels)
    if commonest is None:
        return []
    return [
        f"the untouched network answers {100 * judged.accuracy:.1f} % of the test images right, and guessing "
        f"{100 * commonest:.1f} %: {forgotten}"
    ]
