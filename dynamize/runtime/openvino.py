"""The OpenVINO backends: the ONNX of each segment, computed in float32 or bfloat16 on the CPU.

Integers that quantisation wrote into a segment are computed as integers on both.
"""

import importlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dynamize.errors import DynamizeError
from dynamize.runtime.engine import RefusedPart, torch_threads
from dynamize.runtime.onnx import OnnxEngine, Session, as_array
from dynamize.runtime.trial import agree, limit_of

Precision = Literal["f32", "bf16"]
_CAPABILITY = "BF16"
_WARM, _TIMED = 3, 15  # calls
_OFTEN = 64  # batches of a size: compiling its model takes about as long as these lose
_MOST_SHAPES = 20
_FEW = 16  # images, that take less than the 2 ms below
_SMALL_MODEL, _SMALL_FEATURES = 2**23, 2**22  # bytes


class OpenVino(OnnxEngine):
    """OpenVINO on the CPU in float32. Its sessions are not for several threads at a time.

    Raises:
        DynamizeError: OpenVINO is not installed or refuses a part, or the CPU cannot compute in the precision.
    """

    name = "openvino"
    precision: ClassVar[Precision] = "f32"
    tried = (3, 2)  # a model for one image is compared when it is made

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        _openvino()

    def load(self, model: bytes, channels: Mapping[str, int], overwrite: bool) -> Session:
        make = partial(_compiled, model, self.precision)
        limit = limit_of(self, in_bytes=b"DequantizeLinear" in model)
        return _Shaped(make, torch_threads(), small=len(model) <= _SMALL_MODEL, limit=limit)


class OpenVinoBfloat16(OpenVino):
    """OpenVINO in bfloat16."""

    name = "openvino-bf16"
    precision = "bf16"
    limit = 0.1

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        if not computes_bfloat16():
            raise DynamizeError(
                f"backend {self.name}: this CPU does not compute in bfloat16. Use --backend {OpenVino.name}"
            )


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


class _Shaped:
    """Models of one shape each, and one for any: what has one shape spends no time on shapes.

    Single images always have a model of their own (a ResNet-56 in bytes: 0.93 against 1.38 ms). The model for any size
    takes 2 ms longer for a batch of another size than the one before (the same network: 8 images in 3.9 ms instead of
    1.9), and behind an exit they are of all sizes. So, while models are small, sizes that come often have one too, and
    batches are filled up to them, small ones to a power of two at first. One that answers otherwise than the model for
    any is not used.
    """

    def __init__(self, make: Callable[[int, int | None], Session], threads: int, small: bool, limit: float) -> None:
        self._make, self._threads, self._small, self._limit = make, threads, small, limit
        self._any = make(threads, None)
        self._fixed: dict[int, Session] = {}
        self._asked: Counter[int] = Counter()

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        sizes = _filled_up(len(inputs[0]))
        for size in sizes:
            if size not in self._fixed and self._worth_a_model(size, inputs):
                made = self._of_one_shape(size, inputs)
                alike = agree(made(inputs), self._any(inputs), self._limit)
                self._fixed[size] = made if alike else self._any
        session = next((self._fixed[size] for size in sizes if size in self._fixed), self._any)
        return session(inputs)

    def _worth_a_model(self, size: int, inputs: list[Tensor]) -> bool:
        self._asked[size] += 1
        if size == 1:
            return True
        often = self._asked[size] >= _OFTEN and len(self._fixed) < _MOST_SHAPES
        return often and self._small and 0 < inputs[0].nbytes <= _SMALL_FEATURES

    def _of_one_shape(self, size: int, inputs: list[Tensor]) -> Session:
        """In a small segment several threads mostly wait for each other at a single image, layer by layer, so the
        fastest of a few numbers of threads is taken."""
        if size > 1:
            return self._make(self._threads, size)
        made = [self._make(threads, 1) for threads in sorted({1, self._threads})]
        return min(made, key=lambda session: _seconds(session, inputs)) if made[1:] else made[0]


def _filled_up(images: int) -> list[int]:
    """Sizes of which there may be a model for so many images, the best first: up to 8 each, then four to a doubling;
    for a few images also the next power of two."""
    doublings = (images - 1).bit_length()
    step = 2 ** max(0, doublings - 3)
    best = -(-images // step) * step
    return sorted({best, 2**doublings}) if images <= _FEW else [best]


def _seconds(session: Session, inputs: list[Tensor]) -> float:
    """Median time of a call."""
    taken = []
    for _ in range(_WARM + _TIMED):
        before = time.perf_counter()
        session(inputs)
        taken.append(time.perf_counter() - before)
    return statistics.median(taken[_WARM:])


def _compiled(model: bytes, precision: Precision, threads: int, size: int | None) -> Session:
    """A compiled model, for batches of at most ``size`` images or of any, with its one request; its outputs are copied,
    for the next call overwrites them."""
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same cores
    }
    try:
        read = _core().read_model(model)
        if size is not None:
            read.reshape({port: [size, *list(port.get_partial_shape())[1:]] for port in read.inputs})
        compiled = _core().compile_model(read, "CPU", options)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RefusedPart(f"OpenVINO refuses it: {reason}") from error
    request = compiled.create_infer_request()
    return _any_size(request, len(compiled.outputs)) if size is None else _of_size(request)


def _any_size(request: Any, outputs: int) -> Session:
    """Reads inputs where they are."""
    tensor = _openvino().Tensor

    def run(inputs: list[Tensor]) -> list[Tensor]:
        arrays = [as_array(values) for values in inputs]  # kept until the request has read them
        for i, values in enumerate(arrays):
            request.set_input_tensor(i, tensor(values, shared_memory=True))
        request.infer(share_outputs=True)
        return [torch.from_numpy(request.get_output_tensor(i).data.copy()) for i in range(outputs)]

    return run


def _of_size(request: Any) -> Session:
    """For as many images as the model takes or fewer; the other rows hold what was there before."""
    taken, given = ([tensor.data for tensor in tensors] for tensors in (request.input_tensors, request.output_tensors))

    def run(inputs: list[Tensor]) -> list[Tensor]:
        images = len(inputs[0])
        for array, values in zip(taken, inputs, strict=True):
            array[:images] = values.detach().numpy()
        request.infer(share_outputs=True)
        return [torch.from_numpy(array[:images].copy()) for array in given]

    return run
