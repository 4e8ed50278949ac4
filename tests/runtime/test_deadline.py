"""Deadlines on a simulated machine, whose clock is the multiply-accumulates that were executed."""

from collections.abc import Callable, Iterator

import pytest
import torch
from gated_networks import gated_resnet, split_exits
from image_networks import ON_IMAGES, on_images
from networks import SmallResNet, close, small_resnet, split_at, with_exits
from torch import Tensor

from dynamize.conversion import wrap
from dynamize.errors import DynamizeError
from dynamize.graph.macs import counting_macs
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.runtime.compiled import compile_network
from dynamize.runtime.deadline import Deadlines, Stretch, deadline_notes

CPU = torch.device("cpu")


class Machine:
    """Runs a network; each multiply-accumulate takes a nanosecond times ``slowness``."""

    def __init__(self, network: DynamicNetwork, counted: Callable[[], float]) -> None:
        self.network, self.slowness = network, 1.0
        self._counted, self._at, self._macs = counted, 0.0, 0.0
        self.deadlines = Deadlines(self.run, network.row, CPU, self.clock)

    def clock(self) -> float:
        macs = self._counted()
        self._at += (macs - self._macs) * 1e-9 * self.slowness
        self._macs = macs
        return self._at

    def run(self, images: Tensor, setting: Setting) -> object:
        self.clock()
        with torch.no_grad():
            return self.network.run(images, setting)

    def whole_ms(self, images: Tensor, setting: Setting | None = None) -> float:
        started = self.clock()
        on = dict.fromkeys(self.network.decision_names[0], float("inf"))
        self.run(images, Setting(on) if setting is None else setting)
        return 1e3 * (self.clock() - started)


@pytest.fixture
def machine() -> Iterator[Callable[[DynamicNetwork], Machine]]:
    with counting_macs() as counted:
        yield lambda network: Machine(network, counted)


def images(count: int) -> Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


@pytest.fixture
def dynamic() -> DynamicNetwork:
    network = with_exits().eval()
    split_at(network, images(32), [0.3, 0.5])
    return network


def test_time_enough_changes_nothing(machine, dynamic: DynamicNetwork) -> None:
    here = machine(dynamic)
    found, wanted = here.deadlines.answer(images(32), dynamic.setting, 1e6), here.run(images(32), dynamic.setting)
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.routed.exits, wanted.exits)
    assert not found.cut.any()
    assert (found.place, found.late_ms) == (None, 0)
    assert deadline_notes([found], 1e6) == []


def test_who_is_on_the_way_gets_the_last_answer_in_time(machine, dynamic: DynamicNetwork) -> None:
    here, batch = machine(dynamic), images(32)
    free, all_exits = here.run(batch, dynamic.setting), dynamic.all_exits(batch)
    whole, places = here.whole_ms(batch), set()
    for share in (0.3, 0.45, 0.6, 0.75, 0.9):
        found = here.deadlines.answer(batch, dynamic.setting, share * whole)
        places.add(found.place)
        assert found.late_ms == 0 or found.first
        for i, left in enumerate(found.routed.exits.tolist()):
            assert close(found.logits[i], all_exits[left][i])
            assert left == free.exits[i] or (bool(found.cut[i]) and left < free.exits[i])
    assert {"exit.1", "exit.2"} <= places


def test_too_short_for_the_first_answer_says_how_late(machine, dynamic: DynamicNetwork) -> None:
    found = machine(dynamic).deadlines.answer(images(8), dynamic.setting, 1e-6)
    assert found.routed.exits.tolist() == [0] * 8
    assert found.first
    assert found.late_ms == pytest.approx(found.took_ms - 1e-6)
    assert "1 of 1 batches missed the deadline of 1e-06 ms" in deadline_notes([found], 1e-6)[-1]


def test_places_that_are_off_answer_where_the_whole_way_is_too_long(machine, dynamic: DynamicNetwork) -> None:
    here, batch = machine(dynamic), images(8)
    whole = here.whole_ms(batch, Setting())
    assert here.deadlines.answer(batch, Setting(), 2 * whole).routed.taken["exit.1"].tolist() == [-1] * 8
    assert here.deadlines.answer(batch, Setting(), 0.6 * whole).cut.all()


def test_a_slower_machine_is_noticed(machine, dynamic: DynamicNetwork) -> None:
    here, batch = machine(dynamic), images(8)
    never = Setting({"exit.1": float("inf"), "exit.2": float("inf")})
    deadline = 2 * here.whole_ms(batch)

    def late() -> list[bool]:
        return [here.deadlines.answer(batch, never, deadline).late_ms > 0 for _ in range(20)]

    assert not any(late())
    here.slowness = 3.0
    assert any(late())
    assert not any(late())


@pytest.mark.parametrize("kind", [kind for kind in ON_IMAGES if "exit" in kind])
def test_an_exit_that_comes_first_and_units_behind_it(machine, kind: str) -> None:
    network = on_images(kind).eval()
    here, batch = machine(network), torch.randn(6, *network.input_shape)
    found = here.deadlines.answer(batch, Setting({"exit.1": float("inf")}), 1e-9)
    assert found.cut.all()
    assert found.place == "exit.1"


def test_gates_and_exits_together(machine) -> None:
    network, batch = gated_resnet({}).eval(), images(16)
    split_exits(network, images(64))
    here = machine(network)
    free = here.run(batch, network.setting)
    found = here.deadlines.answer(batch, network.setting, 1e-9)
    assert torch.equal(found.cut, free.exits > 0)


def test_a_static_network_and_no_images(machine) -> None:
    from networks import SmallResNet

    here = machine(wrap(small_resnet(), SmallResNet.shape).eval())
    found = here.deadlines.answer(images(4), Setting(), 1e-9)
    assert found.late_ms > 0
    assert not found.first
    assert here.deadlines.answer(images(4)[:0], Setting(), 5).logits.shape == (0, 7)


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), "5", True, None, [5]])
def test_no_deadline_is_refused(dynamic: DynamicNetwork, deadline: object) -> None:
    with pytest.raises(DynamizeError, match="milliseconds above 0"):
        compile_network(dynamic, "eager").within(images(2), deadline)


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_compiled(dynamic: DynamicNetwork, backend: str) -> None:
    compiled = compile_network(dynamic, backend)
    free = compiled.run(images(32))
    assert torch.equal(compiled(images(32), deadline_ms=1e6), free.logits)
    found = compiled.within(images(32), 1e-6)
    assert found.routed.exits.tolist() == [0] * 32
    assert torch.equal(found.cut, free.exits > 0)
    assert torch.equal(compiled(images(32)), free.logits)


def test_what_was_slow_once_is_not_thought_slow_for_ever() -> None:
    stretch = Stretch()
    stretch.rehearse(4, 1.0)
    stretch.note(4, 9.0)
    slow = stretch.expected(4)
    for _ in range(2000):
        stretch.pass_over()
    assert stretch.expected(4) < 1.05 < slow
    assert stretch.expected(8) == pytest.approx(2 * stretch.expected(4))
