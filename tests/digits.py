"""A network and images small enough to be trained inside a test."""

import torch
from networks import conv_block
from torch import Tensor, nn

from dynamize.conversion import convert
from dynamize.data import DataSpec, Splits, load_data
from dynamize.nn.network import DynamicNetwork
from dynamize.transforms import Exits

SHAPE = (1, 8, 8)


class DigitNet(nn.Module):
    """Three blocks, with dropout so that a lost random state shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_block(1, 8), conv_block(8, 12, 2), conv_block(12, 16, 2)
        self.dropout, self.linear = nn.Dropout(0.2), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(self.c(self.b(self.a(x))).mean((2, 3))))


def digit_network(seed: int = 0) -> DynamicNetwork:
    torch.manual_seed(seed)
    return convert(DigitNet().eval(), [Exits(at=["a", "b"], share=1.0, size=[8, 8])], SHAPE)


def digit_splits(train: int | None = 320) -> Splits:
    return load_data(DataSpec(source="digits", augment="crop", train_limit=train, test_limit=100), SHAPE, 10)
