"""A network on a backend: each segment compiled by itself, the decisions between them in Python."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from dynamize.errors import DynamizeError, closest
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.routing import Routed, Stage, run_stages
from dynamize.runtime.eager import eager_stages
from dynamize.runtime.onnx import one_torch_thread, onnx_stages

Compiler = Callable[[DynamicNetwork, torch.device], Sequence[Stage]]
BACKENDS: dict[str, Compiler] = {"eager": eager_stages, "onnxruntime": onnx_stages}


class CompiledNetwork:
    """A frozen copy of a network's weights on a backend; thresholds and gate offset are read from the network at each
    call.

    ``compiled(images)`` takes (N, C, H, W) and returns (N, classes) as the network in eval mode does.
    """

    def __init__(self, network: DynamicNetwork, backend: str, stages: Sequence[Stage], device: torch.device) -> None:
        self.network, self.backend, self.stages, self.device = network, backend, stages, device

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        return self.run(images_NCHW).logits

    def run(self, images_NCHW: Tensor, forced_NU: Tensor | None = None) -> Routed:
        """Logits (N, classes), the exit that each image left at (N,) and its path through each gated unit (N, U).

        ``forced_NU`` are paths to take whatever the gates say; only while all exits are off.
        """
        if self.network.units:
            frozen = self.stages[0].network
            frozen.gate_offset = self.network.gate_offset
            frozen.force_paths(forced_NU)
        return self.run_at(self.network.thresholds, images_NCHW)

    def run_at(self, thresholds: Sequence[float | None], images_NCHW: Tensor) -> Routed:
        """The same with other thresholds than the network's, gates as they were in the last call."""
        with torch.inference_mode(), one_torch_thread() if self.backend == "onnxruntime" else nullcontext():
            return run_stages(self.stages, thresholds, images_NCHW)


def compile_network(network: DynamicNetwork, backend: str, device: torch.device | str = "cpu") -> CompiledNetwork:
    """Compile every segment of ``network`` for ``backend``.

    Args:
        network: a converted network, or a static one from :func:`dynamize.conversion.wrap`.
        backend: ``eager`` (batch norms folded, channels last) or ``onnxruntime``.

    Raises:
        DynamizeError: unknown backend, or a segment that the backend cannot take.
    """
    if backend not in BACKENDS:
        raise DynamizeError(
            f"'{backend}' is no backend. {closest(backend, list(BACKENDS))}Known: {', '.join(BACKENDS)}."
        )
    device = torch.device(device)
    training = network.training
    try:
        stages = BACKENDS[backend](network.eval(), device)
    finally:
        network.train(training)
    return CompiledNetwork(network, backend, stages, device)


def default_backend(device: torch.device) -> str:
    """The fastest backend here that was measured to be: ONNX Runtime on a CPU, eager elsewhere."""
    return "onnxruntime" if device.type == "cpu" else "eager"
