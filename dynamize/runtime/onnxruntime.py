"""The ONNX Runtime backend."""

from collections.abc import Mapping

import onnxruntime as ort
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as _ort
from torch import Tensor

from dynamize.nn.network import DynamicNetwork
from dynamize.nn.quantized import is_quantized
from dynamize.runtime.engine import RefusedPart
from dynamize.runtime.inplace import InPlace, can_write_over
from dynamize.runtime.layout import BLOCK, blocks, exchange_blocked, from_blocks, in_blocks, to_blocks
from dynamize.runtime.onnx import FEATURES, INPUTS, NEXT, OnnxEngine, Session, as_array
from dynamize.runtime.session import session_options


class OnnxRuntime(OnnxEngine):
    """ONNX Runtime on the CPU, with features in its blocked layout from one session to the next."""

    name = "onnxruntime"
    liked_multiple = BLOCK

    def prepare(self, network: DynamicNetwork) -> DynamicNetwork:
        self.prepares_blocks = not is_quantized(network)
        return super().prepare(network)

    def blocks(self, shape: tuple[int, ...]) -> bool:
        return self.prepares_blocks and blocks(shape, self.threads)

    def plain(self, features: Tensor) -> Tensor:
        return from_blocks(features, self.threads)

    def own(self, features: Tensor) -> Tensor:
        return to_blocks(features, self.threads)

    def grid(self, features: Tensor) -> Tensor:
        return in_blocks(features, self.threads)

    def load(self, model: bytes, channels: Mapping[str, int], overwrite: bool) -> Session:
        options = session_options(self.threads)
        try:
            if channels:
                model = exchange_blocked(model, channels, self.threads)
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except (_ort.Fail, _ort.NotImplemented, _ort.InvalidGraph) as error:
            raise RefusedPart(f"ONNX Runtime refuses it: {error}") from error

        names = [output.name for output in session.get_outputs()]

        def run(inputs: list[Tensor]) -> list[Tensor]:
            arrays = map(as_array, inputs)
            return [torch.from_numpy(value) for value in session.run(names, dict(zip(INPUTS, arrays, strict=False)))]

        writes_over = overwrite and bool(channels) and can_write_over(model, FEATURES, NEXT)
        return InPlace(session, run) if writes_over else run
