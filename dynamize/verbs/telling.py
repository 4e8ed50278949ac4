"""What a report shows beside the ledger, from the networks as they were last measured: the operating points, who
answers, what is decided where, and how answers fall on classes."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dynamize.calibration.asking import Asking
from dynamize.calibration.collect import confidences, macs_table
from dynamize.calibration.protocols import budgeted_batch
from dynamize.data import Images, ImageSet, Splits
from dynamize.errors import DynamizeError
from dynamize.evaluation import Evaluator, Judgement
from dynamize.final import Final, Point
from dynamize.measure.accuracy import Seen, accuracy, everything
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import MAIN
from dynamize.report import Answerer, Classes, Ledger, Mark, Place, ReportData, Section, Standing
from dynamize.report.data import exit_names
from dynamize.verbs.glimpses import glimpses, looks_at_parts
from dynamize.verbs.pictures import Pictures

_BUDGETS = 12  # points of a budgeted-batch curve
_CONFUSED = 400  # pairs of classes that are kept


def report_data(
    ledger: Ledger, final: Final, network: DynamicNetwork, evaluator: Evaluator, data: Splits
) -> ReportData:
    """Everything the HTML page needs of a network and the test split."""
    names = answerer_names(network)
    judged = [evaluator.reference, *(one.judged for one in final.points)]
    classes = max(len(data.classes), *(int(one.answers.max()) + 1 for one in judged))
    pictures = Pictures(data.test, looks_at_parts(network)) if isinstance(data.test, ImageSet) else None
    report = ReportData(
        ledger=ledger,
        operating_points=list(network.operating_points or []),
        selected=None if network.operating_point is None else final.selected,
        sections=_sections(network),
        images=len(evaluator.reference.labels),
        class_names=list(data.classes),
        classes=_classes(evaluator.reference, classes),
    )
    report.standings = [_standing(point, network, names, classes, pictures) for point in final.points]
    report.pictures = [] if pictures is None else pictures.base64()
    if not network.decisions():
        return report
    seen = everything(network, evaluator.images, evaluator.device)
    asking = Asking.at(network, network.setting)
    if network.leaving:
        report.answerers = _answerers(names, seen)
    if len(asking.kept(network.decision_names[0])) > 1:
        report.anytime = _anytime(network, asking.seen(network, seen), asking, names)
        try:
            report.budgeted = _budgeted(network, seen, evaluator, data.calibration, asking)
        except DynamizeError as error:  # few images, or confidences that are no numbers
            report.notes.append(f"no curve of budgeted batches: {error}")
    return report


def answerer_names(network: DynamicNetwork) -> list[str]:
    """What those that answer are called: the networks of a cascade by their names, exits by number."""
    leaving = network.decision_names[0]
    return exit_names(leaving, MAIN) if network.members else exit_names(leaving)


def _standing(
    point: Point, network: DynamicNetwork, names: list[str], classes: int, pictures: Pictures | None
) -> Standing:
    judged = point.judged
    images = len(judged.labels)
    right = judged.answers == judged.labels
    at = [right[judged.exits == k] for k in range(len(names))]
    ways = torch.stack([*judged.taken.values()], 1).unique(dim=0) if judged.taken else None
    looks = partial(glimpses, network, setting=point.setting) if looks_at_parts(network) else None
    new = {
        "words": {piece.name: piece.condition(point.setting.thresholds.get(piece.name)) for piece in network.leaving},
        "reached": [float(one.mean()) for one in exit_costs(network).runs(judged.taken, images)],
        "right": [float(one.double().mean()) if len(one) else None for one in at],
        "routings": None if ways is None else len(ways),
        "classes": _classes(judged, classes),
        "gallery": [] if pictures is None else pictures.galleries(names, bool(network.changing), judged, looks),
    }
    return point.standing.model_copy(update=new)


def _sections(network: DynamicNetwork) -> list[Section]:
    found = []
    for piece in network.row:
        one = piece.decision
        place = None
        if one is not None:
            place = Place(
                name=one.name,
                kind=one.kind,
                effect=one.effect,
                options=list(one.options),
                macs=list(one.macs),
                always=one.always,
            )
        macs = piece.macs if one is None else 0.0
        found.append(Section(name=piece.name, member=piece.member, macs=macs, place=place, restarts=piece.restarts))
    return found


def _classes(judged: Judgement, classes: int) -> Classes:
    pairs = torch.zeros(classes, classes, dtype=torch.int64)
    pairs.index_put_((judged.labels, judged.answers), torch.ones((), dtype=torch.int64), accumulate=True)
    right = pairs.diagonal().clone()
    wrong: Tensor = pairs - right.diag()
    order = wrong.flatten().argsort(descending=True, stable=True)[:_CONFUSED].tolist()
    confused = [(i // classes, i % classes, int(wrong.flatten()[i])) for i in order]
    return Classes(count=pairs.sum(1).tolist(), right=right.tolist(), confused=[one for one in confused if one[2]])


def _answerers(names: Sequence[str], seen: Seen) -> list[Answerer]:
    """What each would have answered alone."""
    alone = torch.stack([logits.argmax(1) for logits in seen.logits])
    alike = (alone[:, None] == alone[None]).double().mean(2).tolist()
    return [
        Answerer(name=name, alone=accuracy(logits, seen.labels), alike=row)
        for name, logits, row in zip(names, seen.logits, alike, strict=True)
    ]


def _anytime(network: DynamicNetwork, seen: Seen, asking: Asking, names: Sequence[str]) -> list[Mark]:
    """What it costs and gives if all images leave at one exit of those that are asked, with gates as they stand."""
    costs = exit_costs(network)
    saved = costs.up_to_exits(asking.savings(costs.savings(seen.taken)))
    whole = asking.costs(network, costs.cumulative())
    return [
        Mark(name=names[k], macs=float(whole[k] - np.mean(saved[k])), accuracy=accuracy(seen.logits[k], seen.labels))
        for k in asking.kept(network.decision_names[0])
    ]


def _budgeted(
    network: DynamicNetwork, seen: Seen, evaluator: Evaluator, calibration: Images, asking: Asking
) -> list[Mark]:
    """MSDNet's sweep: thresholds set on calibration images, judged on the test images that were ``seen``."""
    judged = macs_table(network, seen, evaluator.reference.answers, evaluator.static_macs)
    held_out = asking.seen(network, everything(network, calibration, evaluator.device))
    scores = confidences(held_out)[asking.kept(network.decision_names[0])]
    return [
        Mark(name=f"budget {point.cost / evaluator.static_macs:.2f}", macs=point.cost, accuracy=point.accuracy)
        for point in budgeted_batch(scores, judged, count=_BUDGETS)
    ]
