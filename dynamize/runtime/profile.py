"""How long leaving at each exit takes on a backend."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamize.measure.latency import Contender, interleave
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.routing import run_stages
from dynamize.runtime.compiled import CompiledNetwork, compile_network

_NEVER, _ALWAYS = float("inf"), float("-inf")


def exit_latency(
    network: DynamicNetwork,
    static: DynamicNetwork,
    backend: str,
    device: torch.device,
    batch: int = 1,
    seconds: float = 4.0,
) -> tuple[NDArray[np.float64], float]:
    """Milliseconds per image of leaving at each exit (K,), decisions included, and of the static network.

    Random images are forced through; all contenders take turns in one process.
    """
    compiled, plain = compile_network(network, backend, device), compile_network(static, backend, device)
    contenders: dict[str, Contender] = {f"exit {k}": _leaving_at(compiled, k) for k in range(network.exit_count)}
    contenders["static"] = plain
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(batch, *network.input_shape, generator=generator).to(device) for _ in range(4)]
    times = interleave(contenders, inputs, device, seconds)
    found = [times.median_ms(name) / batch for name in contenders]
    return np.array(found[:-1]), found[-1]


def _leaving_at(compiled: CompiledNetwork, index: int) -> Contender:
    early = len(compiled.stages) - 1
    thresholds = [_ALWAYS if k == index else _NEVER for k in range(early)]

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return run_stages(compiled.stages, thresholds, images)[0]

    return run
