"""Networks that the tests convert, and what a dynamic network has to answer, worked out densely."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchvision
from built import built_once
from torch import Tensor, nn
from torch.nn import functional as F

from dynamize.conversion import convert
from dynamize.nn.network import DynamicNetwork
from dynamize.transforms import Exits


class ThreeLayer(nn.Module):
    """Two convolutions and a linear layer on (3, 8, 8).

    MACs by hand: conv1 8*8 pixels * 4 channels * 3 * 3*3 = 6912, conv2 (stride 2) 4*4 * 8 * 4 * 3*3 = 4608,
    linear 8 * 5 = 40; together 11560.
    """

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.linear(x.mean((2, 3)))


def conv_block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_block(inputs, outputs, stride), nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class SmallResNet(nn.Module):
    """Stem, six residual blocks in three stages, classifier; (3, 16, 16) -> 7 classes."""

    shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(3, 8)
        self.layer1 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.layer2 = nn.Sequential(Residual(8, 16, 2), Residual(16, 16))
        self.layer3 = nn.Sequential(Residual(16, 24, 2), Residual(24, 24))
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.linear(self.dropout(x.mean((2, 3))))


class LongSkipNet(nn.Module):
    """The image is needed again before the classifier, so there is no cut point."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.linear = conv_block(3, 8), conv_block(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.b(self.a(x)).mean((2, 3)) + x.mean((1, 2, 3))[:, None])


def randomise_norms(network: nn.Module, seed: int = 0) -> nn.Module:
    """Batch-norm statistics and weights as after training: with the initial ones a lost norm goes unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.copy_(0.2 * torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
            if module.affine:
                module.weight.copy_(0.7 + 0.6 * torch.rand(module.num_features, generator=generator))
                module.bias.copy_(0.2 * torch.randn(module.num_features, generator=generator))
    return network


def small_resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise_norms(SmallResNet(), seed).eval()


def torchvision_network(name: str, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(torchvision.models.get_model(name, weights=None, num_classes=classes)).eval()


def excite_heads(network: DynamicNetwork) -> None:
    """As training would: heads that are sure of some images, fusions that add something."""
    exits = network.leaving
    ends = [piece.linear for piece in network.row if piece.answers and piece.decision is None]
    with torch.no_grad():
        for layer in nn.ModuleList(exits).modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(20)
        for fusion in [*ends, *(piece.head.fusion for piece in exits)]:
            if fusion is not None:
                fusion.weight.normal_(0, 0.1)


def thresholds(network: DynamicNetwork) -> list[float | None]:
    """Of the exits in order, at the network's setting."""
    return [network.setting.thresholds.get(piece.name) for piece in network.leaving]


def set_thresholds(network: DynamicNetwork, values: Sequence[float | None]) -> None:
    """One for each exit, in order."""
    named = {piece.name: value for piece, value in zip(network.leaving, values, strict=True)}
    network.setting = replace(network.setting, thresholds=named)


def set_offset(network: DynamicNetwork, offset: float) -> None:
    """Of all gates."""
    network.setting = replace(network.setting, offset=offset)


def temperatures(network: DynamicNetwork) -> Tensor:
    """Of the exits in order, (K - 1,)."""
    return torch.stack([piece.temperature for piece in network.leaving])


def set_temperatures(network: DynamicNetwork, values: Sequence[float]) -> None:
    """One for each exit, in order."""
    for piece, value in zip(network.leaving, values, strict=True):
        piece.temperature.fill_(value)


def exit_scores(network: DynamicNetwork, logits: Tensor, index: int) -> Tensor:
    """Confidence of one early exit."""
    return network.leaving[index].score(logits, logits)


def force(network: DynamicNetwork, choices_NU: Tensor | None) -> dict[str, Tensor]:
    """Options of all gated units, (N, U), as a setting takes them."""
    if choices_NU is None:
        return {}
    return {unit.name: choices_NU[:, u] for u, unit in enumerate(network.changing)}


@built_once
def with_exits(seed: int = 0, **fields: Any) -> DynamicNetwork:
    """The small ResNet with exits that disagree with each other; ``fields`` are those of `Exits`."""
    places = fields.get("at", ["layer1", "layer2"])
    fields = {"at": places, "head": "conv", "share": 1.0, "size": [16] * len(places)} | fields
    dynamic = convert(small_resnet(seed), [Exits.model_validate(fields)], SmallResNet.shape)
    excite_heads(dynamic)
    set_temperatures(dynamic, torch.empty(len(dynamic.leaving)).uniform_(0.5, 2.0).tolist())
    return dynamic


@dataclass
class Dense:
    """What every exit says, and who leaves where under the network's thresholds."""

    logits_KNC: Tensor
    scores_KN: Tensor
    exits_N: Tensor

    @property
    def answers_NC(self) -> Tensor:
        return self.logits_KNC[self.exits_N, torch.arange(len(self.exits_N))]


def dense(network: DynamicNetwork, images: Tensor) -> Dense:
    """All exits for all images, then the first whose score reaches its threshold, image by image."""
    with torch.no_grad():
        logits = torch.stack(network.all_exits(images))
        early = len(network.leaving)
        scores = torch.stack([exit_scores(network, logits[k], k) for k in range(early)])
    exits = []
    for n in range(len(images)):
        leaves = [k for k, t in enumerate(thresholds(network)) if t is not None and float(scores[k, n]) >= t]
        exits.append(leaves[0] if leaves else early)
    return Dense(logits, scores, torch.tensor(exits, dtype=torch.int64))


def split_at(network: DynamicNetwork, images: Tensor, shares: list[float]) -> None:
    """Thresholds under which about ``shares[k]`` of the waiting images leave at exit k, none of them borderline."""
    found: list[float | None] = [None] * len(network.leaving)
    set_thresholds(network, found)
    scores = dense(network, images).scores_KN
    waiting = torch.ones(len(images), dtype=torch.bool)
    for k, share in enumerate(shares):
        if not waiting.any():
            found[k] = 0.0
            continue
        ranked = scores[k][waiting].sort(descending=True).values.tolist()
        count = max(round(share * len(ranked)), 1)
        ranked.append(ranked[-1] - 1)
        found[k] = (ranked[count - 1] + ranked[count]) / 2
        waiting &= scores[k] < found[k]
    set_thresholds(network, found)


def close(found: Tensor, wanted: Tensor, relative: float = 1e-5) -> bool:
    """Equal within ``relative`` of the largest magnitude."""
    scale = float(wanted.detach().abs().max()) if wanted.numel() else 1.0
    return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=0, atol=relative * scale)
