"""The OpenVINO backends: the ONNX of each segment, computed in float32 or bfloat16 on the CPU.

Integers that quantisation wrote into a segment are computed as integers on both.
"""

import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from dynamize.errors import DynamizeError
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.routing import Stage
from dynamize.runtime.onnx import Engine, Session, as_array, engine_stages

Precision = Literal["f32", "bf16"]
_CAPABILITY = "BF16"
_WARM, _TIMED = 3, 15  # calls


def openvino_stages(network: DynamicNetwork, device: torch.device, precision: Precision = "f32") -> list[Stage]:
    """Every stage of ``network`` compiled by OpenVINO on the CPU: one model, or one for each way through its gates.

    The stages are not for several threads at a time.

    Raises:
        DynamizeError: OpenVINO is not installed or refuses a segment, the device is not the CPU, or the CPU cannot
            compute in ``precision``.
    """
    name = backend_name(precision)
    if device.type != "cpu":
        raise DynamizeError(f"backend {name} runs on the CPU here, not on {device}: use --backend eager")
    if precision == "bf16" and not computes_bfloat16():
        raise DynamizeError(f"backend {name}: this CPU does not compute in bfloat16. Use --backend openvino")
    load = partial(_session, precision=precision, threads=torch.get_num_threads())
    return engine_stages(network, Engine(load, blocks=False))


def backend_name(precision: Precision) -> str:
    """What people call the backend."""
    return "openvino" if precision == "f32" else f"openvino-{precision}"


def computes_bfloat16() -> bool:
    """Whether this CPU has instructions for it; OpenVINO would quietly take float32 instead."""
    return _CAPABILITY in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@cache
def _core() -> Any:
    return _openvino().Core()


def _openvino() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise DynamizeError(
            "the openvino backends need OpenVINO, which is not installed: pip install 'dynamize[openvino]', or use "
            "--backend onnxruntime"
        ) from error


def _session(model: bytes, _: Mapping[str, int], *, precision: Precision, threads: int) -> Session:
    """A model for any batch, and one for single images, made when the first comes."""
    makers = [partial(_compiled, model, precision, count, single=True) for count in sorted({1, threads})]
    return _Tuned(_compiled(model, precision, threads), makers)


class _Tuned:
    """Single images go through a model of their own: what has one shape only spends no time on shapes (a ResNet-56 in
    bytes: 0.60 against 0.78 ms). In a small segment several threads mostly wait for each other, layer by layer, so the
    fastest of a few numbers of threads is taken."""

    def __init__(self, many: Session, makers: Sequence[Callable[[], Session]]) -> None:
        self.many, self.makers = many, makers
        self.single: Session | None = None

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        if len(inputs[0]) != 1:
            return self.many(inputs)
        if self.single is None:
            made = [make() for make in self.makers]
            self.single = min(made, key=lambda session: _seconds(session, inputs)) if made[1:] else made[0]
        return self.single(inputs)


def _seconds(session: Session, inputs: list[Tensor]) -> float:
    """Median time of a call."""
    taken = []
    for _ in range(_WARM + _TIMED):
        before = time.perf_counter()
        session(inputs)
        taken.append(time.perf_counter() - before)
    return statistics.median(taken[_WARM:])


def _compiled(model: bytes, precision: Precision, threads: int, single: bool = False) -> Session:
    """A compiled model, for one image if ``single``, with its one request; its outputs are copied, for the next call
    overwrites them."""
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same cores
    }
    try:
        read = _core().read_model(model)
        if single:
            read.reshape({port: [1, *list(port.get_partial_shape())[1:]] for port in read.inputs})
        compiled = _core().compile_model(read, "CPU", options)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise DynamizeError(f"OpenVINO refuses a segment: {reason}. Use --backend eager.") from error
    request, tensor = compiled.create_infer_request(), _openvino().Tensor
    outputs = range(len(compiled.outputs))

    def run(inputs: list[Tensor]) -> list[Tensor]:
        arrays = [as_array(values) for values in inputs]  # kept until the request has read them
        for i, values in enumerate(arrays):
            request.set_input_tensor(i, tensor(values, shared_memory=True))
        request.infer(share_outputs=True)
        return [torch.from_numpy(request.get_output_tensor(i).data.copy()) for i in outputs]

    return run
