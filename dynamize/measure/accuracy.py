"""What a network answers: at every exit, or where each image leaves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynamize.arguments import class_numbers
from dynamize.data import Images, Splits
from dynamize.nn.channels_last import images_for
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.nn.routing import Routing

_BATCH = 256


@dataclass(frozen=True)
class Seen:
    """All images run to the end, on the CPU.

    Attributes:
        logits: of every exit, the network's own last, K of (n, classes).
        scores: of every exit but the last, K - 1 of (n,).
        labels: (n,).
        taken: by decision that changes what comes after, the option of each image (n,).
    """

    logits: list[Tensor]
    scores: list[Tensor]
    labels: Tensor
    taken: dict[str, Tensor]


def everything(network: DynamicNetwork, images: Images, device: torch.device, setting: Setting | None = None) -> Seen:
    """Run all images to the end; gates decide at ``setting``, by default the network's own.

    ``setting.forced`` is indexed by image of the whole split.

    Raises:
        DynamizeError: there are no images, or some without a label or of no class of the network.
    """
    network.to(device).eval()
    setting = network.setting if setting is None else setting
    leaving, changing = network.decision_names
    logits: list[list[Tensor]] = [[] for _ in range(len(leaving) + 1)]
    scores: list[list[Tensor]] = [[] for _ in leaving]
    labels: list[Tensor] = []
    taken: dict[str, list[Tensor]] = {name: [] for name in changing}
    start = 0
    with torch.no_grad():
        for batch, truth in images.batches(_BATCH, device):
            forced = {name: options[start : start + len(batch)] for name, options in setting.forced.items()}
            here = Setting(setting.thresholds, setting.offset, forced)
            routed = network.run(images_for(network, batch), here, everyone=True)
            for k, (_, one, score) in enumerate(routed.seen):
                assert score is not None  # heads score in eval mode
                logits[k].append(one.float().cpu())
                scores[k].append(score.float().cpu())
            logits[-1].append(routed.logits.float().cpu())
            labels.append(class_numbers(truth.cpu(), routed.logits.shape[1], f"the {images.name} images"))
            options = routed.taken
            for name, each in taken.items():
                each.append(options[name])
            start += len(batch)
    return Seen(
        [torch.cat(one) for one in logits],
        [torch.cat(one) for one in scores],
        torch.cat(labels),
        {name: torch.cat(each) for name, each in taken.items()},
    )


def exit_accuracies(network: DynamicNetwork, images: Images, device: torch.device) -> list[float]:
    """Top-1 accuracy of each exit over a whole split."""
    seen = everything(network, images, device)
    return [accuracy(one, seen.labels) for one in seen.logits]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1."""
    return float((logits.argmax(1) == labels).double().mean())


def judgeable(data: Splits, teacher: nn.Module, device: torch.device) -> Splits:
    """The splits, with the teacher's answers where calibration and test images have no labels."""
    return data.relabelled(lambda images: _answers(teacher, images, device))


def _answers(network: nn.Module, images: Images, device: torch.device) -> Tensor:
    network.to(device).eval()
    with torch.no_grad():
        return torch.cat(
            [network(images_for(network, one)).argmax(1).cpu() for one, _ in images.batches(_BATCH, device)]
        )


def top_answers(network: nn.Module, images: Images, device: torch.device) -> tuple[Tensor, Tensor]:
    """Top-1 answers of any classifier in eval mode, (n,), and labels (n,)."""
    network.to(device).eval()
    found, labels = [], []
    with torch.no_grad():
        for batch, truth in images.batches(_BATCH, device):
            logits = network(images_for(network, batch))
            found.append(logits.argmax(1).cpu())
            labels.append(class_numbers(truth.cpu(), logits.shape[1], f"the {images.name} images"))
    return torch.cat(found), torch.cat(labels)


class Answered(NamedTuple):
    """What a network answers where each image leaves: answers (n,), labels (n,), how sure it is of each (n,), and the
    options that the images took."""

    answers: Tensor
    labels: Tensor
    sure: Tensor
    routing: Routing


def routed_answers(
    network: DynamicNetwork,
    images: Images,
    device: torch.device,
    setting: Setting | None = None,
    temperatures: Sequence[float] = (),
) -> Answered:
    """Run a split at a setting, by default the network's own.

    Args:
        temperatures: by place where images leave, of the logits there; 1 where none is given.
    """
    network.to(device).eval()
    leaving, changing = network.decision_names
    routing = Routing(leaving, changing)
    warm = torch.tensor([*temperatures, *[1.0] * (len(leaving) + 1 - len(temperatures))])
    found, labels, sure = [], [], []
    with torch.no_grad():
        for batch, truth in images.batches(_BATCH, device):
            routed = network.run(images_for(network, batch), setting)
            logits = routed.logits.float().cpu()
            routing.add(routed)
            found.append(logits.argmax(1))
            sure.append((logits / warm[routed.exits][:, None]).softmax(1).amax(1))
            labels.append(class_numbers(truth.cpu(), logits.shape[1], f"the {images.name} images"))
    return Answered(torch.cat(found), torch.cat(labels), torch.cat(sure), routing)
