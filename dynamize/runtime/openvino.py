"""The OpenVINO backends: the ONNX of each segment, computed in float32 or bfloat16 on the CPU.

Integers that quantisation wrote into a segment are computed as integers on both.
"""

import importlib
from collections.abc import Mapping
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
    """A compiled model with its one request; its outputs are copied, for the next call overwrites them."""
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same cores
    }
    try:
        compiled = _core().compile_model(_core().read_model(model), "CPU", options)
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
