"""What the report shows beside the ledger: the curve, the exits, and the images that leave first and last."""

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dynamize.data import ImageSet, Splits
from dynamize.evaluation import Evaluator, gather
from dynamize.measure.accuracy import exit_logits
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.report import Gallery, GalleryImage, Ledger, Network, ReportData

_SHOWN = 12
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
        operating_points=[p.model_dump() for p in network.operating_points or []],
        static=static,
        latency_label=f"ms per image, batch 1, {ledger.backend}",
        selected=network.operating_point.name if network.operating_point else None,
        class_names=list(data.classes),
    )
    if network.exit_count == 1:
        return report
    logits, labels = exit_logits(network, evaluator.images, evaluator.device)
    costs = exit_costs(network).cumulative()
    report.anytime = [
        Network(name=_name(k, len(logits)), macs=float(cost), accuracy=float((one.argmax(1) == labels).double().mean()))
        for k, (one, cost) in enumerate(zip(logits, costs, strict=True))
    ]
    if isinstance(data.test, ImageSet):
        report.gallery = _gallery(network, logits, labels, evaluator, data)
    return report


def _gallery(
    network: DynamicNetwork, logits: list[Tensor], labels: Tensor, evaluator: Evaluator, data: Splits
) -> list[Gallery]:
    exits = evaluator.judge(network).exits
    galleries = []
    for k, one in enumerate(logits):
        here = (exits == k).nonzero().flatten()
        confidence = one.softmax(1).amax(1)
        order = here[confidence[here].argsort(descending=True)]
        pictures = [
            _pictures(index, one, labels, confidence, data) for index in (order[:_SHOWN], order[_SHOWN:][-_SHOWN:])
        ]
        galleries.append(Gallery(exit=k, name=_name(k, len(logits)), first=pictures[0], last=pictures[1]))
    return galleries


def _pictures(index: Tensor, logits: Tensor, labels: Tensor, confidence: Tensor, data: Splits) -> list[GalleryImage]:
    if not len(index):
        return []
    assert isinstance(data.test, ImageSet)
    normalize = data.test.normalize
    images = gather(data.test, index, torch.device("cpu"))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (normalize.mean, normalize.std))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [
        GalleryImage(
            png_base64=_png(one), label=int(labels[i]), answer=int(logits[i].argmax()), confidence=float(confidence[i])
        )
        for one, i in zip(pixels, index, strict=True)
    ]


def _png(pixels_HWC: np.ndarray) -> str:
    image = Image.fromarray(pixels_HWC.squeeze(2) if pixels_HWC.shape[2] == 1 else pixels_HWC)
    image.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _name(index: int, count: int) -> str:
    return "last exit" if index == count - 1 else f"exit {index + 1}"
