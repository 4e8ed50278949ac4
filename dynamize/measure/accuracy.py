"""What a network answers: at every exit, or where each image leaves."""

import torch
from torch import Tensor, nn

from dynamize.data import Images
from dynamize.nn.channels_last import images_for
from dynamize.nn.gated import GatedSegment
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.routing import Routing, record_routing

_BATCH = 256


def exit_logits(network: DynamicNetwork, images: Images, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Logits of every exit, K tensors (n, classes) on the CPU, and labels (n,)."""
    return everything(network, images, device)[:2]


def everything(network: DynamicNetwork, images: Images, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor]:
    """Run all images to the end: logits of every exit, K tensors (n, classes), labels (n,), and paths through gated
    units (n, U), all on the CPU."""
    network.to(device).eval()
    found: list[list[Tensor]] = [[] for _ in range(network.exit_count)]
    labels: list[Tensor] = []
    choices: list[Tensor] = []
    gated = [segment for segment in network.segments if isinstance(segment, GatedSegment)]
    with torch.no_grad():
        for batch, truth in images.batches(_BATCH, device):
            for kept, one in zip(found, network.all_exits(images_for(network, batch)), strict=True):
                kept.append(one.float().cpu())
            labels.append(truth.cpu())
            taken = [segment.choices.cpu() for segment in gated if segment.choices is not None]
            choices.append(torch.cat(taken, 1) if taken else torch.empty(len(truth), 0, dtype=torch.int64))
    return [torch.cat(one) for one in found], torch.cat(labels), torch.cat(choices)


def exit_accuracies(network: DynamicNetwork, images: Images, device: torch.device) -> list[float]:
    """Top-1 accuracy of each exit over a whole split."""
    logits, labels = exit_logits(network, images, device)
    return [float((one.argmax(1) == labels).double().mean()) for one in logits]


def answers(network: nn.Module, images: Images, device: torch.device) -> tuple[Tensor, Tensor]:
    """Top-1 answers of any classifier in eval mode, (n,), and labels (n,)."""
    network.to(device).eval()
    found, labels = [], []
    with torch.no_grad():
        for batch, truth in images.batches(_BATCH, device):
            found.append(network(images_for(network, batch)).argmax(1).cpu())
            labels.append(truth.cpu())
    return torch.cat(found), torch.cat(labels)


def routed_answers(network: DynamicNetwork, images: Images, device: torch.device) -> tuple[Tensor, Tensor, Routing]:
    """Answers (n,), labels (n,) and which exits and paths the images took."""
    with record_routing(network) as routing:
        found, labels = answers(network, images, device)
    return found, labels, routing
