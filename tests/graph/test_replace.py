"""Layers are exchanged by identity wherever a network holds them, and a wrong one is refused."""

import pytest
import torch
from torch import nn

from dynamize.errors import DynamizeError
from dynamize.graph.extract import extract
from dynamize.graph.replace import check_same, difference, every_module, replace_modules
from dynamize.graph.trace import trace


class Holder(nn.Module):
    """One layer under two names, in a list, and in a tuple that is not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b, self.several = self.a, nn.ModuleList([self.a, nn.Identity()])
        self._hidden = (nn.Sequential(self.a), None, 3)


def test_every_place_that_holds_the_layer() -> None:
    holder, other = Holder(), nn.Linear(2, 3)
    replace_modules(holder.eval(), {holder.a: other})
    assert holder.a is holder.b is holder.several[0] is holder._hidden[0][0] is other
    assert not other.training
    assert sum(module is other for module in every_module(holder)) == 1


def test_a_new_layer_may_hold_the_old_one() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    first = network[0]
    replace_modules(network, {first: nn.Sequential(first, nn.Tanh())})
    assert network[0][0] is first


def test_a_region_cut_out_of_a_graph_runs_the_new_layer() -> None:
    plain = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)), (3, 8, 8))
    region = extract(plain, None, "_1")
    holder = nn.ModuleList([plain, region])
    new = nn.Conv2d(3, 4, 3)
    replace_modules(holder, {plain.get_submodule("0"): new})
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(region(images), new(images).relu())
    assert torch.equal(plain(images), plain.get_submodule("3")(new(images).relu().flatten(1)))


def test_difference_is_relative_to_the_spread() -> None:
    assert difference(torch.tensor([1.0, 9.0]), torch.tensor([2.0, 10.0])) == pytest.approx(1 / 8)
    assert difference(torch.tensor([1000.0, 1001.5]), torch.tensor([1000.0, 1001.0])) == pytest.approx(0.5)
    assert difference(torch.tensor([3.0]), torch.tensor([2.0])) == pytest.approx(0.5)
    assert difference(torch.zeros(2), torch.zeros(2)) == 0


def test_a_layer_that_answers_otherwise_is_refused() -> None:
    conv = nn.Conv2d(3, 4, 3)
    twin = nn.Conv2d(3, 4, 3)
    twin.load_state_dict(conv.state_dict())
    check_same("conv", twin, conv, (2, 3, 6, 6))
    with torch.no_grad():
        twin.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(
        DynamizeError, match=r"`conv` cannot be replaced: the new layer differs from it by \d\.\de-0[34]"
    ):
        check_same("conv", twin, conv, (2, 3, 6, 6))
    with pytest.raises(DynamizeError, match="differs from it by inf"):
        check_same("conv", nn.Conv2d(3, 4, 1), conv, (2, 3, 6, 6))
    with torch.no_grad():
        twin.weight.fill_(float("nan"))
    with pytest.raises(DynamizeError, match="differs from it by nan"):
        check_same("conv", twin, conv, (2, 3, 6, 6))
