"""ONNX Runtime's blocked layout, kept from one session to the next.

ONNX Runtime computes convolutions on features whose channels lie in blocks of 8 or 16 (NCHWc). Left alone, each session
brings its input into that layout and its output out of it: two passes over memory, which cost a block of a ResNet a
fifth of its time. Sessions that hand features only to each other can do without. An image's values stay together in
either layout, so rows can be gathered and scattered all the same.
"""

import tempfile
from collections.abc import Mapping, MutableSequence, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from dynamize.runtime.session import session_options
from dynamize.runtime.threads import Threads

_DOMAIN = "com.microsoft.nchwc"
BLOCK = 16  # channels; 8 on some machines
_PROBED = np.array([1, BLOCK, 4, 4])


def blocks(shape: Sequence[int], threads: Threads) -> bool:
    """Whether features of this shape, (C, H, W), fill whole blocks of channels and this machine computes in them."""
    return len(shape) == 3 and shape[0] % BLOCK == 0 and _machine_has_blocks(threads)


def in_blocks(features: Tensor, threads: Threads) -> Tensor:
    """A view (N, blocks, H, W, channels of a block) of features (N, C, H, W) in blocks."""
    images, channels, *size = features.shape
    block = _block(threads)
    return features.contiguous().view(images, channels // block, *size, block)


def from_blocks(features: Tensor, threads: Threads) -> Tensor:
    """Features (N, C, H, W) in blocks as they are elsewhere."""
    return in_blocks(features, threads).movedim(-1, 2).reshape(features.shape)


def to_blocks(features: Tensor, threads: Threads) -> Tensor:
    """Features (N, C, H, W), whole blocks of channels, as sessions hand them on."""
    images, channels, *size = features.shape
    block = _block(threads)
    apart = features.reshape(images, channels // block, block, *size)
    return apart.movedim(2, -1).contiguous().view(features.shape)


def exchange_blocked(model: bytes, channels: Mapping[str, int], threads: Threads) -> bytes:
    """The model as ONNX Runtime optimises it for this machine, with some inputs and outputs in the blocked layout.

    Args:
        model: ONNX.
        channels: of each input or output (N, C, H, W) that is exchanged in blocks: name -> C, whole blocks.

    Returns:
        ONNX for a session that does not optimise again.
    """
    optimised = _optimise(model, threads)
    graph = optimised.graph
    given = {value.name for value in graph.input}
    nodes = list(graph.node)
    for name, count in channels.items():
        nodes = _blocked_input(nodes, name, count) if name in given else _blocked_output(nodes, name, count, given)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    found: bytes = optimised.SerializeToString()
    return found


def _blocked_input(nodes: list[NodeProto], name: str, channels: int) -> list[NodeProto]:
    """Nodes that take ``name`` in blocks: who brought it into blocks is left out, who wants it plain gets it so."""
    entrances = [node for node in nodes if node.op_type == "ReorderInput" and node.input[0] == name]
    kept = [node for node in nodes if node not in entrances]
    plain = f"{name}_plain"
    for node in kept:
        _replace(node.input, name, plain)
    for entrance in entrances:
        for node in kept:
            _replace(node.input, entrance.output[0], name)
    if any(plain in node.input for node in kept):
        kept.insert(0, _reorder("ReorderOutput", name, plain, channels=channels))
    return _without_copies(kept, name)


def _blocked_output(nodes: list[NodeProto], name: str, channels: int, given: set[str]) -> list[NodeProto]:
    """Nodes that give ``name`` in blocks: without the last step out of them, or with one into them."""
    producer = next(node for node in nodes if name in node.output)
    plain = f"{name}_plain"
    for node in nodes:
        _replace(node.input, name, plain)
    _replace(producer.output, name, plain)
    if producer.op_type != "ReorderOutput" or producer.input[0] in given:
        return [*nodes, _reorder("ReorderInput", plain, name)]
    source = producer.input[0]
    for node in nodes:
        _replace(node.input, source, name)
        _replace(node.output, source, name)
    return nodes if any(plain in node.input for node in nodes) else [node for node in nodes if node is not producer]


def _without_copies(nodes: list[NodeProto], name: str) -> list[NodeProto]:
    """Without the pools of one pixel that only brought ``name`` into blocks (see :mod:`dynamize.runtime.onnx`)."""
    copies = [node for node in nodes if node.op_type == "MaxPool" and node.input[0] == name and _is_one_pixel(node)]
    kept = [node for node in nodes if node not in copies]
    for copy in copies:
        for node in kept:
            _replace(node.input, copy.output[0], name)
    return kept


def _is_one_pixel(pool: NodeProto) -> bool:
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in pool.attribute}
    ones = all(set(values.get(name, [1])) == {1} for name in ("kernel_shape", "strides", "dilations"))
    return ones and not any(values.get("pads", []))


def _replace(names: MutableSequence[str], old: str, new: str) -> None:
    for i, name in enumerate(names):
        if name == old:
            names[i] = new


def _reorder(kind: str, source: str, target: str, **attributes: int) -> NodeProto:
    node = helper.make_node(kind, [source], [target], domain=_DOMAIN, channels_last=0)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return node


def _optimise(model: bytes, threads: Threads) -> ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options = session_options(threads)
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return onnx.load(path)


@cache
def _machine_has_blocks(threads: Threads) -> bool:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [BLOCK, BLOCK, 1, 1], [1.0] * BLOCK * BLOCK)
    probe = _probe(helper.make_node("Conv", ["x", "w"], ["y"]), weight)
    return any(node.domain == _DOMAIN for node in _optimise(probe, threads).graph.node)


@cache
def _block(threads: Threads) -> int:
    """Channels that lie together on this machine."""
    options = session_options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(_probe(_reorder("ReorderInput", "x", "y")), options, ["CPUExecutionProvider"])
    values = np.arange(_PROBED.prod(), dtype=np.float32).reshape(_PROBED)
    (found,) = session.run(None, {"x": values})
    return int(np.flatnonzero(found.ravel() == 1)[0])  # the second pixel of the first channel lies behind a block


def _probe(node: NodeProto, *weights: TensorProto) -> bytes:
    """A model of one operator, x -> y."""
    features, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, _PROBED.tolist()) for name in ("x", "y"))
    graph = helper.make_graph([node], "probe", [features], [out], list(weights))
    domains = [helper.make_opsetid("", 18), helper.make_opsetid(_DOMAIN, 1)]
    found: bytes = helper.make_model(graph, opset_imports=domains, ir_version=9).SerializeToString()
    return found
