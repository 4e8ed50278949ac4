"""What is timed, and that timing leaves the network as it was."""

import numpy as np
import pytest
import torch
from gated_networks import gated_resnet
from torch import Tensor

from dynamize.measure.latency import Contender, Times
from dynamize.nn.network import DynamicNetwork
from dynamize.runtime import profile
from dynamize.runtime.profile import gate_latency, path_latency

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_timing_leaves_the_gates_where_they_stand(backend: str) -> None:
    network = gated_resnet({})
    network.gate_offset = 0.5
    network.thresholds = [0.3, 0.4]
    path_latency(network, backend, CPU, seconds=0.0)
    gate_latency(network, backend, CPU, seconds=0.0)
    assert network.gate_offset == 0.5
    assert network.thresholds == [0.3, 0.4]
    assert len(network.units) == 5


@pytest.mark.parametrize("chain", [False, True])
def test_a_gate_costs_what_the_network_takes_longer_than_without(chain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network = gated_resnet({"chain": chain})
    network.thresholds = [0.0, 0.0]  # everyone would leave at the first exit

    def interleave(contenders: dict[str, Contender], inputs: list[Tensor], *_: object) -> Times:
        for run in contenders.values():
            run(inputs[0])
        ms = {"static": 2.0, "open": 3.0} | {name: 0.25 for name in contenders if "/" in name}
        return Times({name: np.full((3, 1), 1e-3 * one) for name, one in ms.items()}, 0.0)

    compiled: list[DynamicNetwork] = []
    compile_network = profile.compile_network
    monkeypatch.setattr(profile, "interleave", interleave)
    monkeypatch.setattr(
        profile, "compile_network", lambda one, *rest: (compiled.append(one), compile_network(one, *rest))[1]
    )
    paths, gate = gate_latency(network, "eager", CPU)
    assert gate == pytest.approx(1.0 / 5)
    assert [len(one) for one in paths] == [2] * 5
    assert [one[0] for one in paths] == [0.0, 0.25, 0.0, 0.25, 0.0]  # projections of layer2.0 and layer3.0
    gated, ungated = compiled
    assert (len(gated.units), len(ungated.units)) == (5, 0)
    assert len(ungated.heads) == 2
    image = torch.randn(1, *network.input_shape)
    for one in compiled:
        one.set_operating_point(None)
        one.gate_offset = 1e6
    with torch.no_grad():
        assert torch.equal(gated(image), ungated(image))
