"""The eager backend: PyTorch modules with batch norms folded, in channels-last memory."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dynamize.graph.fold import folded
from dynamize.nn.channels_last import lay_out
from dynamize.nn.gates import pool
from dynamize.nn.network import DynamicNetwork
from dynamize.runtime.engine import Border, Engine


class Eager(Engine):
    """PyTorch itself, on any device."""

    name = "eager"
    tried = (1,)

    def prepare(self, network: DynamicNetwork) -> DynamicNetwork:
        for part in network.parts():
            if part.role == "head" and part.graph is not None and part.put is not None:
                part.put(folded(part.graph))
        return lay_out(network.to(self.device))

    def path(self, module: nn.Module, takes: Border, gives: Border, beside: int = 0) -> Callable[..., Any]:
        fast = lay_out(folded(module).to(self.device))

        def run(features: Tensor, *beside: Tensor) -> tuple[Tensor, Tensor | None]:
            features = fast(features, *beside)
            return features, pool(features) if gives.means else None

        return run

    def gate(self, gate: nn.Module, takes: Border) -> Callable[..., Any]:
        return gate

    def head(self, head: nn.Module, takes: Border, context: int) -> Callable[..., Any]:
        return head
