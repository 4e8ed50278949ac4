"""What leaving at each exit costs."""

import pytest
import torch
from networks import SmallResNet, ThreeLayer, set_thresholds, small_resnet, with_exits

from dynamize.conversion import convert, wrap
from dynamize.graph.cuts import cut_points
from dynamize.graph.macs import annotated_macs, count_macs
from dynamize.graph.trace import trace
from dynamize.measure.costs import Costs, Once, exit_costs
from dynamize.nn.piece import Decision, Setting
from dynamize.transforms import Exits


def test_costs_of_the_three_layer_net_with_a_linear_exit_by_hand() -> None:
    dynamic = convert(ThreeLayer().eval(), [Exits(at=["relu"], head="linear")], ThreeLayer.shape)
    costs = exit_costs(dynamic)
    before, decision, behind = costs.steps
    assert (before, behind) == (6912, 4608 + 40)
    assert [decision] == costs.leaving
    assert (decision.always, decision.macs) == (4 * 5, (0.0, 0.0))
    assert costs.cumulative().tolist() == [6912 + 20, 11560 + 20]
    assert costs.cumulative(Setting({"exit.1": 0.0})).tolist() == [6912 + 20, 11560 + 20]
    assert costs.cumulative(Setting()).tolist() == [6912, 11560]
    assert costs.cumulative(Setting({"exit.1": None})).tolist() == [6912, 11560]


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("off", [[], [0], [1], [0, 1]])
def test_costs_are_what_a_single_image_executes(chain: bool, off: list[int]) -> None:
    dynamic = with_exits(chain=chain)
    image = torch.zeros(1, *SmallResNet.shape)
    set_thresholds(dynamic, [None if k in off else 0.0 for k in range(2)])
    costs = exit_costs(dynamic).cumulative(dynamic.setting)
    for k in range(3):
        if k in off:
            continue
        set_thresholds(dynamic, [None if j in off else float("-inf") if j == k else float("inf") for j in range(2)])
        assert count_macs(dynamic, image) == costs[k]


def test_costs_of_static_pieces_are_those_between_cut_points() -> None:
    traced = trace(small_resnet(), SmallResNet.shape)
    upto = {cut.name: cut.macs for cut in cut_points(traced)}
    dynamic = with_exits()
    first, second = (upto[name] for name in dynamic.history[0]["at"])
    total = annotated_macs(traced)
    static = [step for step in exit_costs(dynamic).steps if not isinstance(step, Decision)]
    assert static == [first, second - first, total - second]


def test_counting_changes_neither_mode_nor_statistics() -> None:
    dynamic = with_exits().train()
    before = {name: value.clone() for name, value in dynamic.state_dict().items()}
    exit_costs(dynamic)
    assert dynamic.training
    assert all(torch.equal(value, before[name]) for name, value in dynamic.state_dict().items())


def test_a_static_network_costs_its_macs_and_double_precision_the_same() -> None:
    assert exit_costs(wrap(ThreeLayer(), ThreeLayer.shape)).cumulative().tolist() == [11560]
    assert exit_costs(wrap(ThreeLayer().double(), ThreeLayer.shape)).cumulative().tolist() == [11560]


def test_what_was_put_off_is_paid_once_by_who_asks_for_it() -> None:
    def leaves(name: str) -> Decision:
        return Decision(name, "member", ("leaves", "goes on"), (0.0, 0.0), 0.0, "leaves")

    late = Once(7.0, 0)
    legs = ((10.0, leaves("a")), (late, 100.0, leaves("b")), (late, 100.0, leaves("c")), (1000.0,))
    costs = Costs(legs, frozenset("abc"))
    every, none = Setting({"a": 1.0, "b": 1.0, "c": 1.0}), Setting()
    assert costs.cumulative(every).tolist() == [10, 117, 217, 1217]
    assert costs.cumulative(Setting({"a": 1.0, "b": None, "c": 1.0}))[2:].tolist() == [117, 1117]
    assert costs.cumulative(Setting({"b": 1.0}))[1] == 100
    assert costs.cumulative(none)[-1] == 1000
    taken = {"a": [0, 1, 1, 1, -1, -1], "b": [-1, 0, 1, -1, 0, -1], "c": [-1, -1, 1, 0, -1, -1]}
    found = costs.executed({name: torch.tensor(options) for name, options in taken.items()}, 6)
    assert found.tolist() == [10, 117, 1217, 117, 100, 1000]
