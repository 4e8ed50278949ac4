"""What a compressed network costs against the one before: MACs and time, with all gates open and all exits on."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from dynamize.measure.costs import exit_costs
from dynamize.measure.latency import Contender, interleave
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.runtime.compiled import compile_network


def whole_macs(network: DynamicNetwork) -> float:
    """MACs per image of everything: all segments, heads and gates."""
    return float(exit_costs(network).cumulative()[-1])


class Stopwatch:
    """Compares changed copies of a network with itself on a backend, at batch 1."""

    def __init__(self, network: DynamicNetwork, backend: str, device: torch.device, seconds: float = 2.0) -> None:
        self.backend, self.device, self.seconds = backend, device, seconds
        self.image = torch.randn(1, *network.input_shape, generator=torch.Generator().manual_seed(0)).to(device)
        self.before = self._compiled(network)

    def ratio(self, changed: DynamicNetwork) -> float:
        """Time of ``changed`` as a share of the time of the network before."""
        contenders = {"before": self.before, "after": self._compiled(changed)}
        times = interleave(contenders, [self.image], self.device, self.seconds)
        return times.median_ms("after") / times.median_ms("before")

    def _compiled(self, network: DynamicNetwork) -> Contender:
        compiled, opened = compile_network(network, self.backend, self.device), Setting(offset=ALL_OPEN)
        return lambda images: compiled.run(images, opened)


def layer_ratio(
    layer: nn.Module, other: nn.Module, shape: Sequence[int], backend: str, device: torch.device, seconds: float = 0.3
) -> float:
    """Time of ``other`` as a share of that of ``layer``, each by itself on a backend.

    Args:
        shape: of the input for one image, batch included.
    """
    alone = [DynamicNetwork(nn.Sequential(copy.deepcopy(one)), input_shape=shape[1:]) for one in (layer, other)]
    before, after = (compile_network(one.eval(), backend, device) for one in alone)
    features = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(device)
    times = interleave({"before": before, "after": after}, [features], device, seconds)
    return times.median_ms("after") / times.median_ms("before")
