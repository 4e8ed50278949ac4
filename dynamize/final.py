"""The last measurement of a run, from which all numbers of its report are: the untouched network, the run's at every
operating point, and its rivals are judged on the test images, and timed in turns in the same rounds."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dynamize.calibration.intervals import guessed, prediction_interval
from dynamize.evaluation import Contestant, Evaluator, Judgement, latency_table, speedup_table
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting, setting_at
from dynamize.report.ledger import RIVAL, Interval, Rival, Row
from dynamize.report.standing import Standing
from dynamize.rivals import Rivals
from dynamize.transform import Transform
from dynamize.transforms.cascade import chance_notes

_HERE = "dynamic"  # the contestant that stands as the run leaves the network, as rows of earlier steps call it
UNNAMED_POINT = "as the steps left it"


@dataclass(frozen=True)
class Point:
    """An operating point as it was measured: the setting, what it does on the test images, and its figures."""

    setting: Setting
    judged: Judgement
    standing: Standing


@dataclass(frozen=True)
class Final:
    """What was measured.

    Attributes:
        rows: of the ledger; the first and the last with the times of these rounds.
        rivals: beside the last row.
        points: the operating points, the cheapest first; one for a network that has none.
        selected: name of the one at which the network stands.
    """

    rows: list[Row]
    rivals: list[Rival]
    points: list[Point]
    selected: str


def measure(
    network: DynamicNetwork,
    rows: Sequence[Row],
    evaluator: Evaluator,
    rivals: Rivals | None = None,
    steps: Sequence[Transform] = (),
) -> Final:
    """Judge and time everything that a report shows side by side.

    Args:
        network: as the run leaves it.
        rows: of the ledger, one for each step.
        evaluator: of the run.
        rivals: what the recipe compares with.
        steps: of the recipe.
    """
    settings, selected = _settings(network)
    judged = {name: evaluator.judge(network, setting) for name, setting in settings.items()}
    here = judged[selected]
    others, notes = ({}, []) if rivals is None else rivals.networks(network, float(here.macs.mean()), steps)
    beside = {name: evaluator.judge(one) for name, one in others.items()}

    called = {name: _HERE if name == selected else f"point: {name}" for name in settings}
    every = {called[name]: Contestant(network, judged[name], setting) for name, setting in settings.items()}
    if len(rows) == 1:  # no step was taken: the network is the static one
        every = {}
    every |= {name: Contestant(one, beside[name]) for name, one in others.items()}
    times = evaluator.times_together(every)

    first, last = evaluator.timed(rows[0], "static", times), rows[-1]
    if len(rows) == 1:
        last, called = first, {selected: "static"}
    else:
        last = evaluator.timed(last, _HERE, times)
    points = []
    for name, setting in settings.items():
        new = evaluator.figures(network, judged[name], setting)
        new |= {"latency": latency_table(times, called[name]), "notes": []}
        new |= {"speedup": {} if called[name] == "static" else speedup_table(times, called[name])}
        points.append(Point(setting, judged[name], Standing(**{**dict(last), **new}, point=name)))
    points.sort(key=lambda point: point.standing.macs)

    rival_rows = []
    for number, name in enumerate(others, start=last.step + 1):
        row = evaluator.timed(evaluator.describe(number, name, others[name], beside[name]), name, times)
        lead, lead_ci = _lead(beside[name], here)
        told = {"notes": [*row.notes, *_chance(name, beside[name], here)]}
        rival_rows.append(Rival(**dict(row) | told, lead=lead, lead_ci=lead_ci))
    if notes:
        rival_rows[-1] = rival_rows[-1].model_copy(update={"notes": [*rival_rows[-1].notes, *notes]})
    return Final([first, *rows[1:-1], last][: len(rows)], rival_rows, points, selected)


def _settings(network: DynamicNetwork) -> tuple[dict[str, Setting], str]:
    """The setting of each operating point by name, and the name of the one at which the network stands."""
    found = {point.name: setting_at(point) for point in network.operating_points or []}
    standing = network.operating_point
    name = UNNAMED_POINT if standing is None else standing.name
    found[name] = network.setting
    return found, name


def _chance(name: str, rival: Judgement, ours: Judgement) -> list[str]:
    """That a rival only guesses, where the run's own network does not."""
    labels = rival.labels
    if guessed(ours.answers == labels, labels) is not None:
        return []
    return chance_notes(name.removeprefix(RIVAL), rival.answers == labels, labels, "test")


def _lead(rival: Judgement, ours: Judgement) -> tuple[float, Interval]:
    """How much more of all such images the rival gets right: on the same test images, with its 95 % interval."""
    right = (rival.answers == rival.labels).double() - (ours.answers == ours.labels).double()
    lead, low, high = prediction_interval(right.numpy(), fresh=sys.maxsize, bounds=(-1.0, 1.0))
    return lead, (low, high)
