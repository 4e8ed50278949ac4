"""Residual blocks in ONNX Runtime that add to their input where it lies.

ONNX Runtime fuses the add that ends a block into its last convolution, which then accumulates into the memory of the
shortcut. An input of a session is not its to overwrite, so it is copied first, by one thread: 3 to 15 % of a block of a
ResNet-50. With input and output bound to one place there is nothing to copy.
"""

import threading
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORTH = 2**18  # bytes of features whose copy takes longer than binding memory does
_KEPT = 64  # bindings: a batch of large maps is as many flows of one image
_Bound = tuple[ort.IOBinding, list[NDArray[np.float32]]]  # and where its means come
_SUM = 3  # position of the values that a fused convolution adds to


def can_write_over(model: bytes, name: str, output: str) -> bool:
    """Whether nothing in an optimised model reads the input ``name`` later than what writes ``output``, and that one
    reads it only value by value, where it then writes."""
    nodes = onnx.load_from_string(model).graph.node
    writer = next(position for position, node in enumerate(nodes) if output in node.output)
    reads = [place for place, read in enumerate(nodes[writer].input) if read == name]
    later = any(name in node.input for node in nodes[writer + 1 :])
    return nodes[writer].op_type == "Conv" and reads == [_SUM] and not later


class InPlace:
    """Runs a session whose first output takes the memory of its input, unless that is small.

    What it binds is kept for the next features in the same place: binding takes longer than anything else between two
    blocks of a single image.

    Args:
        session: its model :func:`can_write_over`; its input has the shape of its first output, and if there is a
            second, that is (N, C, 1, 1), and comes as (N, C).
        plain: runs it as any other session.
    """

    def __init__(self, session: ort.InferenceSession, plain: Callable[[list[Tensor]], list[Tensor]]) -> None:
        self.session, self.plain = session, plain
        (self._input,) = (one.name for one in session.get_inputs())
        self._output, *self._means = (one.name for one in session.get_outputs())
        self._kept = _Bindings()

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        if inputs[0].nbytes < _WORTH:
            return self.plain(inputs)
        features = inputs[0].contiguous()
        kept, key = self._kept.bound, (features.data_ptr(), len(features))
        if key not in kept:
            if len(kept) >= _KEPT:
                kept.clear()
            kept[key] = self._bind(features)
        binding, means = kept[key]
        self.session.run_with_iobinding(binding)
        return [features, *(torch.from_numpy(one.copy()) for one in means)]

    def _bind(self, features: Tensor) -> _Bound:
        binding = self.session.io_binding()
        binding.bind_input(self._input, "cpu", 0, np.float32, features.shape, features.data_ptr())
        binding.bind_output(self._output, "cpu", 0, np.float32, features.shape, features.data_ptr())
        means = [np.empty(features.shape[:2], np.float32) for _ in self._means]
        for name, values in zip(self._means, means, strict=True):
            binding.bind_output(name, "cpu", 0, np.float32, (*values.shape, 1, 1), values.ctypes.data)
        return binding, means


class _Bindings(threading.local):
    """Those of a thread, by where the features lie and how many images they are of: others write elsewhere."""

    def __init__(self) -> None:
        self.bound: dict[tuple[int, int], _Bound] = {}
