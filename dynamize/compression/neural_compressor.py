"""Ranges as neural-compressor chooses them: its static post-training quantisation, part by part.

Of what convolutions and linear layers read it observes a moving average of the batches' least and largest values;
these steps are taken over. What it leaves in float, sums among it, has steps from our own ranges. Its weights are ours
too: signed bytes, symmetric, for each output channel.
"""

import logging
import operator
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from dynamize.compression.quantization import routed, run_watched
from dynamize.compression.rounding import Key, RoundedPart, rounded_parts
from dynamize.compression.steps import Steps
from dynamize.errors import DynamizeError
from dynamize.nn.network import DynamicNetwork

_MOST = 4096  # images in a batch


def chosen_steps(network: DynamicNetwork, batches: Sequence[Tensor]) -> dict[Key, Steps]:
    """Steps of the tensors that layers read, for a prepared network; each part sees the images that reach it.

    Raises:
        DynamizeError: neural-compressor fails on a part.
    """
    engine = _engine()
    whole = list(enumerate(rounded_parts(network, [])))
    given: dict[int, list[Tensor]] = {index: [] for index, _ in whole}

    def see(part: RoundedPart, index: int, node: fx.Node, value: Tensor) -> None:
        if node.op == "placeholder" and len(value):
            given[index].append(value.detach().clone())

    run_watched(whole, batches, see, routed(network))
    found: dict[Key, Steps] = {}
    for index, part in whole:
        if part.places.layers and sum(map(len, given[index])) > 1:
            keys = part.tensor_keys(index)
            steps = _steps_by_layer(engine, part, given.pop(index))
            for layer in part.places.layers:
                if str(layer.target) in steps:
                    found.setdefault(keys[layer.all_input_nodes[0]], steps[str(layer.target)])
    return found


def _steps_by_layer(engine: Any, part: RoundedPart, inputs: list[Tensor]) -> dict[str, Steps]:
    """Steps of what each layer of a part reads, by the layer's path."""
    export, quantization = engine
    example = torch.cat(inputs)[:2].contiguous()
    batch = torch.export.Dim("batch", min=1, max=_MOST)
    with _quietly():
        try:
            exported = export(_Traced(part.graph), (example,), {"features": {0: batch}})
            watching = quantization.prepare(exported, quant_config=quantization.StaticQuantConfig())
            with torch.no_grad():
                for one in inputs:
                    watching(one)
            converted = quantization.convert(watching)
        except Exception as error:
            raise DynamizeError(
                f"quantize: neural-compressor fails on the part of the network with {next(iter(part.places.layers))}: "
                f"{str(error).splitlines()[0]}. Use ranges: mse."
            ) from error
    return dict(_read_steps(converted))


def _read_steps(converted: fx.GraphModule) -> Iterator[tuple[str, Steps]]:
    """Each layer whose input is rounded, and the steps."""
    for node in converted.graph.nodes:
        if node.op != "call_function" or not str(node.target).startswith(("aten.conv2d", "aten.linear")):
            continue
        values, weight = (_before(one) for one in node.args[:2])
        while weight.op != "get_attr" and weight.all_input_nodes:
            weight = weight.all_input_nodes[0]
        if "quantize_per_tensor" in str(values.target):
            scale, zero_point, *_ = values.args[1:]
            path = str(weight.target).removeprefix("part.").rpartition(".")[0]
            yield path, Steps(_number(converted, scale), int(_number(converted, zero_point)))


def _before(node: fx.Node) -> fx.Node:
    """What gave a dequantised tensor its steps, or the node itself."""
    while "dequantize" in str(node.target) or node.target is operator.getitem:
        node = node.all_input_nodes[0]
    return node


def _number(module: fx.GraphModule, value: Any) -> float:
    if isinstance(value, fx.Node):
        held: Any = module
        for name in str(value.target).split("."):
            held = getattr(held, name)
        value = held
    return float(value)


class _Traced(nn.Module):
    """A graph whose argument has one name everywhere."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.part = graph

    def forward(self, features: Tensor) -> Tensor:
        found: Tensor = self.part(features)
        return found


def _engine() -> Any:
    level = os.environ.get("LOGLEVEL")
    os.environ["LOGLEVEL"] = "ERROR"  # read once, when it is imported
    try:
        with _quietly():
            from neural_compressor.torch import quantization
            from neural_compressor.torch.export import export
    finally:
        if level is None:
            del os.environ["LOGLEVEL"]
        else:
            os.environ["LOGLEVEL"] = level
    return export, quantization


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what neural-compressor and torch's exporter say on the way."""
    logger = logging.getLogger("neural_compressor")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(max(level, logging.ERROR))
