"""Which layers are trained while the rest stays as it is."""

import pytest
import torch
from torch import nn

from dynamize.conversion import convert, wrap
from dynamize.models import create
from dynamize.training.parts import kept, last_layers
from dynamize.transforms import Exits


class Odd(nn.Module):
    """Ends in a convolution, and has no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 5, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(images).relu()).mean((2, 3))


def test_the_last_ones_that_are_called() -> None:
    network = wrap(create("digits_resnet"), (1, 8, 8))
    assert last_layers(network) == [network.plain.linear, network.plain.get_submodule("layer3.2.bn2")]
    odd = wrap(Odd().eval(), (1, 8, 8))
    assert last_layers(odd) == [odd.plain.last]
    assert last_layers(wrap(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).eval(), (1, 8, 8)))


@pytest.mark.parametrize("trained", ["all", "heads", "last"])
def test_exits_learn_in_any_case(trained: str) -> None:
    network = convert(create("digits_resnet").eval(), [Exits(at=["layer2"])], (1, 8, 8))
    held, spared = kept(network, trained)
    still = {id(one) for module in held for one in module.parameters()}
    still -= {id(one) for module in spared for one in module.parameters()}
    moves = {name for name, one in network.named_parameters() if id(one) not in still}
    own = {name for name in moves if name.startswith("nets.main.")}
    assert moves - own == {name for name, _ in network.named_parameters() if name.startswith("pieces.")}
    assert len(own) == {"all": sum(1 for _ in network.nets.parameters()), "heads": 0, "last": 4}[trained]
