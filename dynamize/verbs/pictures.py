"""What the report shows beside the ledger: the curve, who answers, the gates, and the images at either end."""

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dynamize.calibration.asking import Asking
from dynamize.calibration.collect import confidences, macs_table
from dynamize.calibration.protocols import budgeted_batch
from dynamize.calibration.temperature import answer_temperature
from dynamize.data import Images, ImageSet, Splits
from dynamize.errors import DynamizeError
from dynamize.evaluation import Evaluator, Judgement, gather
from dynamize.measure.accuracy import Seen, accuracy, everything
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import MAIN
from dynamize.report import (
    Answerer,
    DecisionUse,
    Gallery,
    GalleryImage,
    Ledger,
    Network,
    OptionUse,
    ReportData,
    Rival,
    Usage,
)
from dynamize.report.data import exit_names
from dynamize.report.ledger import RIVAL

_SHOWN = 12
_BUDGETS = 12  # points of a budgeted-batch curve
_LARGEST = 96  # pixels of a gallery image


def report_data(ledger: Ledger, network: DynamicNetwork, evaluator: Evaluator, data: Splits) -> ReportData:
    """Everything the HTML page needs, from the network at its operating point and the test split."""
    static_row = ledger.rows[0]
    timing = static_row.latency.get(ledger.backend, {}).get("1")
    static = Network(
        name="static",
        macs=static_row.macs,
        accuracy=static_row.accuracy,
        accuracy_ci=static_row.accuracy_ci,
        latency_ms=timing.median_ms if timing else None,
    )
    report = ReportData(
        ledger=ledger,
        operating_points=list(network.operating_points or []),
        static=static,
        rivals=[_rival(one, static.latency_ms, ledger.backend) for one in ledger.rivals],
        latency_label=f"ms per image, batch 1, {ledger.backend}",
        selected=network.operating_point.name if network.operating_point else None,
        class_names=list(data.classes),
    )
    if not network.decisions():
        return report
    seen = everything(network, evaluator.images, evaluator.device)
    judged = evaluator.judge(network)
    names = answerer_names(network)
    report.usage = _usage(network, judged)
    asking = Asking.at(network, network.setting)
    together = asking.seen(network, seen)
    asked = asking.kept(network.decision_names[0])
    if network.leaving:
        report.answerers = _answerers(names, seen, judged)
    if len(asked) > 1:
        report.anytime = _anytime(network, together, asking, names)
        try:
            report.budgeted = _budgeted(network, seen, evaluator, data.calibration, asking)
        except DynamizeError as error:  # few images, or confidences that are no numbers
            report.notes.append(f"no curve of budgeted batches: {error}")
    if isinstance(data.test, ImageSet):
        pictures = _Pictures(data.test, seen.labels)
        answers = [one / answer_temperature(network, k) for k, one in enumerate(together.logits)]
        if network.leaving:
            report.gallery = [_leaving_at(k, name, answers[k], judged, pictures) for k, name in enumerate(names)]
        if network.changing:
            report.gallery.append(_cheapest_and_dearest(answers, judged, pictures))
    return report


def answerer_names(network: DynamicNetwork) -> list[str]:
    """What those that answer are called: the networks of a cascade by their names, exits by number."""
    leaving = network.decision_names[0]
    return exit_names(leaving, MAIN) if network.members else exit_names(leaving)


def _rival(row: Rival, static_ms: float | None, backend: str) -> Network:
    """A mark; its time follows from its speed-up, as what the machine did meanwhile is the same in both then."""
    speedup = row.speedup.get(backend, {}).get("1")
    return Network(
        name=row.transform.removeprefix(RIVAL),
        macs=row.macs,
        accuracy=row.accuracy,
        accuracy_ci=row.accuracy_ci,
        latency_ms=static_ms / speedup if static_ms and speedup else None,
    )


def _answerers(names: Sequence[str], seen: Seen, judged: Judgement) -> list[Answerer]:
    """Who answered which share of the test images, and what each would have answered alone."""
    alone = torch.stack([logits.argmax(1) for logits in seen.logits])
    alike = (alone[:, None] == alone[None]).double().mean(2).tolist()
    right = judged.answers == judged.labels
    found = []
    for k, (name, share) in enumerate(zip(names, judged.shares(len(names)), strict=True)):
        here = right[judged.exits == k]
        found.append(
            Answerer(
                name=name,
                share=share,
                right=float(here.double().mean()) if len(here) else None,
                alone=accuracy(seen.logits[k], seen.labels),
                alike=alike[k],
            )
        )
    return found


def _anytime(network: DynamicNetwork, seen: Seen, asking: Asking, names: Sequence[str]) -> list[Network]:
    """What it costs and gives if all images leave at one exit of those that are asked, with gates as they stand."""
    costs = exit_costs(network)
    saved = costs.up_to_exits(asking.savings(costs.savings(seen.taken)))
    whole = asking.costs(network, costs.cumulative())
    return [
        Network(
            name=names[k],
            macs=float(whole[k] - np.mean(saved[k])),
            accuracy=accuracy(seen.logits[k], seen.labels),
        )
        for k in asking.kept(network.decision_names[0])
    ]


def _budgeted(
    network: DynamicNetwork, seen: Seen, evaluator: Evaluator, calibration: Images, asking: Asking
) -> list[Network]:
    """MSDNet's sweep: thresholds set on calibration images, judged on the test images that were ``seen``."""
    judged = macs_table(network, seen, evaluator.reference.answers, evaluator.static_macs)
    held_out = asking.seen(network, everything(network, calibration, evaluator.device))
    scores = confidences(held_out)[asking.kept(network.decision_names[0])]
    return [
        Network(name=f"budget {point.cost / evaluator.static_macs:.2f}", macs=point.cost, accuracy=point.accuracy)
        for point in budgeted_batch(scores, judged, count=_BUDGETS)
    ]


def _usage(network: DynamicNetwork, judged: Judgement) -> Usage:
    decisions = [
        DecisionUse(
            name=one.name,
            kind=one.kind,
            effect=one.effect,
            options=[
                OptionUse(label=label, macs=macs, share=share)
                for label, macs, share in zip(one.options, one.macs, judged.use(one), strict=True)
            ],
            always=one.always,
        )
        for one in network.decisions()
    ]
    ways = torch.stack([*judged.taken.values()], 1)
    return Usage(decisions=decisions, images=len(ways), routings=len(ways.unique(dim=0)))


def _leaving_at(number: int, name: str, logits_NC: Tensor, judged: Judgement, pictures: "_Pictures") -> Gallery:
    here = (judged.exits == number).nonzero().flatten()
    order = here[logits_NC[here].softmax(1).amax(1).argsort(descending=True)]
    wrong = order[judged.answers[order] != judged.labels[order]]
    chosen = (order[:_SHOWN], order[_SHOWN:][-_SHOWN:], wrong[:_SHOWN])
    first, last, surely_wrong = (pictures.show(index, logits_NC) for index in chosen)
    return Gallery(exit=number, name=name, first=first, last=last, wrong=surely_wrong)


def _cheapest_and_dearest(logits: list[Tensor], judged: Judgement, pictures: "_Pictures") -> Gallery:
    answered = torch.stack(logits)[judged.exits, torch.arange(len(judged.exits))]
    order = judged.macs.argsort(stable=True)
    cheapest, dearest = order[:_SHOWN], order[_SHOWN:][-_SHOWN:].flip(0)
    first, last = (pictures.show(index, answered, judged.macs) for index in (cheapest, dearest))
    return Gallery(exit=None, name="all images", first=first, last=last)


class _Pictures:
    """The images of the test split as they are shown, with labels (n,)."""

    def __init__(self, images: ImageSet, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def show(self, index: Tensor, logits_NC: Tensor, macs_N: Tensor | None = None) -> list[GalleryImage]:
        """The images at ``index`` with the answers among ``logits_NC``, and what they cost if it is given."""
        if not len(index):
            return []
        normalize = self.images.normalize
        images = gather(self.images, index, torch.device("cpu"))
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (normalize.mean, normalize.std))
        pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        confidence, answers = logits_NC[index].softmax(1).max(1)
        return [
            GalleryImage(
                png_base64=_png(one),
                label=int(self.labels[i]),
                answer=int(answer),
                confidence=float(sure),
                macs=None if macs_N is None else float(macs_N[i]),
            )
            for one, i, answer, sure in zip(pixels, index, answers, confidence, strict=True)
        ]


def _png(pixels_HWC: np.ndarray) -> str:
    image = Image.fromarray(pixels_HWC.squeeze(2) if pixels_HWC.shape[2] == 1 else pixels_HWC)
    image.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
