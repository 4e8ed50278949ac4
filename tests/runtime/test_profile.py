"""What is timed, and that timing leaves the network as it was."""

import numpy as np
import pytest
import torch
from gated_networks import gated_resnet
from networks import set_offset, set_thresholds
from torch import Tensor

from dynamize.measure.latency import Contender, Times
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.runtime import profile
from dynamize.runtime.profile import exit_latency, option_latency

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
@pytest.mark.fast("eager")
def test_timing_leaves_the_gates_where_they_stand(backend: str) -> None:
    network = gated_resnet({})
    set_offset(network, 0.5)
    set_thresholds(network, [0.3, 0.4])
    before = network.setting
    for ungated in (False, True):
        option_latency(network, backend, CPU, seconds=0.0, ungated=ungated)
    exit_latency(network, network, backend, CPU, seconds=0.0)
    assert network.setting is before
    assert before == Setting({"exit.1": 0.3, "exit.2": 0.4}, 0.5)
    assert len(network.changing) == 5


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("ungated", [False, True])
@pytest.mark.fast("False-True", "True-False")
def test_gates_are_timed_against_the_network_without(
    chain: bool, ungated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = gated_resnet({"chain": chain})
    set_thresholds(network, [0.0, 0.0])  # everyone would leave at the first exit

    def interleave(contenders: dict[str, Contender], inputs: list[Tensor], *_: object) -> Times:
        for run in contenders.values():
            run(inputs[0])
        answers = [contenders[name](inputs[0]).logits for name in ("static", "open")]
        assert torch.allclose(*answers, rtol=0, atol=1e-4 * float(answers[0].abs().max())) == (ungated or not chain)
        ms = {"static": 2.0, "open": 3.0} | {name: 0.25 for name in contenders if "/" in name}
        return Times({name: np.full((3, 1), 1e-3 * one) for name, one in ms.items()}, 0.0)

    compiled: list[DynamicNetwork] = []
    compile_network = profile.compile_network
    monkeypatch.setattr(profile, "interleave", interleave)
    monkeypatch.setattr(
        profile, "compile_network", lambda one, *rest: (compiled.append(one), compile_network(one, *rest))[1]
    )
    times = option_latency(network, "eager", CPU, ungated=ungated)
    assert (times.static, times.opened) == (pytest.approx(2.0), pytest.approx(3.0))
    assert list(times.options) == [unit.name for unit in network.changing]
    assert [len(one) for one in times.options.values()] == [2] * 5
    assert [one[0] for one in times.options.values()] == [0.0, 0.25, 0.0, 0.25, 0.0]  # projections of two blocks
    gated, static = compiled
    assert (len(gated.changing), len(static.changing)) == (5, 0)
    assert len(static.leaving) == (2 if ungated else 0)
    if not ungated:
        return
    image = torch.randn(1, *network.input_shape)
    opened = Setting(offset=1e6)
    with torch.no_grad():
        assert torch.equal(gated.run(image, opened).logits, static.run(image, opened).logits)
