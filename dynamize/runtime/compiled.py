"""A network on a backend: each segment compiled by itself, the decisions between them in Python."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from dynamize.errors import DynamizeError, closest
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.routing import Routed, Stage, run_stages
from dynamize.runtime.eager import eager_stages
from dynamize.runtime.onnx import one_torch_thread, onnx_stages
from dynamize.runtime.openvino import openvino_stages

Compiler = Callable[[DynamicNetwork, torch.device], Sequence[Stage]]
BACKENDS: dict[str, Compiler] = {
    "eager": eager_stages,
    "onnxruntime": onnx_stages,
    "openvino": openvino_stages,
    "openvino-bf16": partial(openvino_stages, precision="bf16"),
}


class CompiledNetwork:
    """A frozen copy of a network's weights on a backend; thresholds and gate offset are read from the network at each
    call.

    ``compiled(images)`` takes (N, C, H, W) and returns (N, classes) as the network in eval mode does.
    """

    def __init__(self, network: DynamicNetwork, backend: str, stages: Sequence[Stage], device: torch.device) -> None:
        self.network, self.backend, self.stages, self.device = network, backend, stages, device
        self._gated, self._forced = bool(network.units), False

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        return self.run(images_NCHW).logits

    def run(self, images_NCHW: Tensor, forced_NU: Tensor | None = None) -> Routed:
        """Logits (N, classes), the exit that each image left at (N,) and its path through each gated unit (N, U).

        ``forced_NU`` are paths to take whatever the gates say; only while all exits are off.
        """
        if self._gated:
            frozen = self.stages[0].network
            if frozen.gate_offset != self.network.gate_offset:
                frozen.gate_offset = self.network.gate_offset
            if self._forced or forced_NU is not None:
                frozen.force_paths(forced_NU)
                self._forced = forced_NU is not None
        return self.run_at(self.network.thresholds, images_NCHW)

    def run_at(self, thresholds: Sequence[float | None], images_NCHW: Tensor) -> Routed:
        """The same with other thresholds than the network's, gates as they were in the last call."""
        with torch.inference_mode(), nullcontext() if self.backend == "eager" else one_torch_thread():
            return run_stages(self.stages, thresholds, images_NCHW)


def compile_network(network: DynamicNetwork, backend: str, device: torch.device | str = "cpu") -> CompiledNetwork:
    """Compile every segment of ``network`` for ``backend``.

    Args:
        network: a converted network, or a static one from :func:`dynamize.conversion.wrap`.
        backend: ``eager`` (batch norms folded, channels last), ``onnxruntime``, ``openvino`` (float32) or
            ``openvino-bf16``.

    Raises:
        DynamizeError: unknown backend, or a segment that the backend cannot take.

    Example:
        >>> import torch
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.Exits()], (1, 8, 8))
        >>> fast, images = dz.compile_network(dyn, "eager"), torch.randn(2, 1, 8, 8)
        >>> torch.allclose(fast(images), dyn(images), atol=1e-4)
        True
    """
    compiler = find_backend(backend)
    device = torch.device(device)
    training = network.training
    try:
        stages = compiler(network.eval(), device)
    finally:
        network.train(training)
    return CompiledNetwork(network, backend, stages, device)


def find_backend(name: str) -> Compiler:
    """What compiles for this backend; a DynamizeError lists those there are."""
    if name not in BACKENDS:
        raise DynamizeError(f"'{name}' is no backend. {closest(name, list(BACKENDS))}Known: {', '.join(BACKENDS)}.")
    return BACKENDS[name]


def default_backend(device: torch.device) -> str:
    """The fastest backend here that was measured to be: ONNX Runtime on a CPU, eager elsewhere."""
    return "onnxruntime" if device.type == "cpu" else "eager"
