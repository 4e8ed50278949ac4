"""Networks whose first pieces work on the images themselves, which nothing may write to."""

import torch
from networks import SmallResNet, randomise_norms
from torch import Tensor, nn

from dynamize.conversion import convert
from dynamize.graph.extract import extract
from dynamize.graph.nodes import placeholder
from dynamize.nn.exits import Exit
from dynamize.nn.gates import LinearGate
from dynamize.nn.heads import ExitHead, linear_classifier
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.nn.units import SkipUnit


class InPlace(nn.Module):
    """Its first layer writes over what it is given."""

    shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.net = nn.ReLU(inplace=True), SmallResNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.first(x))


class ImageBlocks(nn.Module):
    """Residual blocks on the image itself, so that a unit or an exit comes first in the row."""

    shape = (3, 16, 16)

    def __init__(self, crop: bool = False) -> None:
        super().__init__()
        self.crop = crop
        self.a, self.b = (nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)) for _ in range(2))
        self.end, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        if self.crop:
            x = x[:, :, 1:-1]  # a view of the images
        x = x + self.a(x)
        x = x + self.b(x)
        return self.linear(self.end(x).mean((2, 3)))


def on_images(kind: str) -> DynamicNetwork:
    """Networks whose first pieces work on the images themselves, in eval mode."""
    torch.manual_seed(0)
    if "relu" in kind:
        network = convert(randomise_norms(InPlace()).eval(), [], InPlace.shape)
        place, block = "first", None
    else:
        network = convert(ImageBlocks(crop="crop" in kind).eval(), [], ImageBlocks.shape)
        first = placeholder(network.plain.graph).name
        place, block = ("getitem" if "crop" in kind else first), "add"
    if "exit" in kind:
        network.insert({place: Exit("exit.1", ExitHead(nn.Identity(), linear_classifier(3, 7)))})
    if block is not None:
        body = extract(network.plain, place, block)
        network.insert({(place, block): SkipUnit("block", LinearGate(3, 2), body)})
    return network


ON_IMAGES = ["relu", "exit after relu", "unit", "unit crop", "exit unit", "exit unit crop"]


def settings_of(network: DynamicNetwork, batch: Tensor) -> list[Setting]:
    """All off; some images leave at each exit while units part the others."""
    forced = {unit.name: torch.tensor([0, 1, 1, 0] * (len(batch) // 4)) for unit in network.changing}
    leaving = {piece.name: torch.tensor([1, 1, 1, 0] * (len(batch) // 4)) for piece in network.leaving}
    return [Setting(), Setting(forced=forced), Setting(forced={**forced, **leaving})]
