"""Where a network looked that looks at parts of an image, and what it would have answered after each look."""

from dataclasses import replace

import torch
from torch import Tensor

from dynamize.calibration.temperature import answer_temperature
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import LEAVES, MAIN, Setting
from dynamize.report import Glimpse


def looks_at_parts(network: DynamicNetwork) -> bool:
    """Whether any of its networks sees crops."""
    return any(piece.cuts for piece in network.row)


@torch.no_grad()
def glimpses(network: DynamicNetwork, images_NCHW: Tensor, setting: Setting) -> list[list[Glimpse]]:
    """What each network that an image comes to at a setting sees of it, and the answer so far."""
    routed = network.run(images_NCHW, setting)
    found: list[list[Glimpse]] = [[] for _ in images_NCHW]
    for number, piece in enumerate(network.leaving):
        reached = routed.taken[piece.name] >= 0
        if not piece.links or not bool(reached.any()):
            continue
        leaving = torch.full((len(images_NCHW),), LEAVES)
        stopped = network.run(images_NCHW, replace(setting, forced={**setting.forced, piece.name: leaving}))
        warm = stopped.logits / answer_temperature(network, number, setting)
        _add(found, piece.member, reached, routed.crops.get(piece.member), warm, images_NCHW)
    ends = routed.exits == len(network.leaving)
    warm = routed.logits / answer_temperature(network, len(network.leaving), setting)
    _add(found, MAIN, ends, None, warm, images_NCHW)
    return found


def _add(
    found: list[list[Glimpse]], name: str, here: Tensor, boxes: Tensor | None, logits: Tensor, images_NCHW: Tensor
) -> None:
    """One look, for the images that come there."""
    sure = logits.float().softmax(1).max(1)
    for i in here.nonzero().flatten().tolist():
        box = None if boxes is None else _shares(boxes[i].tolist(), images_NCHW.shape[2], images_NCHW.shape[3])
        answer, confidence = int(sure.indices[i]), float(sure.values[i])
        found[i].append(Glimpse(name=name, box=box, answer=answer, confidence=confidence))


def _shares(box: list[int], height: int, width: int) -> tuple[float, float, float, float]:
    """Left, top, width and height of a box in pixels, where the image lies in the middle of a square."""
    left, top, right, bottom = box
    side = max(height, width)
    x, y = left + (side - width) / 2, top + (side - height) / 2
    return x / side, y / side, (right - left) / side, (bottom - top) / side
