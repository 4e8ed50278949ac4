"""Parts as ONNX, and what the backends that run ONNX have in common."""

import io
import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dynamize.errors import DynamizeError
from dynamize.graph.tracer import blank
from dynamize.nn.gates import pool_map
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.quantized import is_quantized
from dynamize.runtime.byte_borders import exchange_bytes
from dynamize.runtime.engine import Border, Engine, RefusedPart
from dynamize.runtime.exportable import Exportable
from dynamize.runtime.layout import BLOCK

FEATURES, CONTEXT, NEXT, NEXT_CONTEXT, MEANS = "features", "context", "next_features", "next_context", "next_means"
INPUTS = [FEATURES, CONTEXT]
_ANSWER = ["logits", "score", NEXT_CONTEXT]  # of a head, as many as it gives
_OPSET = 18

Session = Callable[[list[Tensor]], list[Tensor]]
"""A compiled model: inputs in order -> outputs in order, which later calls leave alone."""


class OnnxEngine(Engine):
    """Sessions on the CPU: one for each part, and one for a path with the head behind it."""

    devices = ("cpu",)
    one_torch_thread = True
    late_gates = True
    prepares_blocks = False  # whether exports are prepared for ONNX Runtime's blocked layout

    @abstractmethod
    def load(self, model: bytes, channels: Mapping[str, int], overwrite: bool) -> Session:
        """A session of a model.

        Args:
            channels: of the inputs and outputs that are exchanged in the engine's own layout, by name.
            overwrite: whether it may write over the features it is given.
        """

    def prepare(self, network: DynamicNetwork) -> DynamicNetwork:
        dtype = blank(network, 1).dtype
        if dtype != torch.float32:
            raise DynamizeError(
                f"backend {self.name} computes networks in float32, and this one is in "
                f"{str(dtype).rpartition('.')[2]}: give it network.float(), or use --backend eager"
            )
        self.byte_borders = exchange_bytes(network.cpu())
        return network

    def path(self, module: nn.Module, takes: Border, gives: Border, beside: int = 0) -> Callable[..., Any]:
        ends = _ends(takes, gives)
        outputs = [NEXT, MEANS] if gives.means else [NEXT]
        if gives.means and NEXT in ends:
            ends |= {MEANS: ends[NEXT]}  # a map of one pixel is the same in either layout
        exported = self._export(_Way(module, gives.means), takes, beside, outputs)
        session = self.load(exported, ends, takes.may_overwrite and not beside)
        if not gives.means:
            return lambda *inputs: (session([*inputs])[0], None)

        def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            found, means = session([*inputs])
            return found, means if means.dim() == 2 else means.flatten(1)

        return run

    def gate(self, gate: nn.Module, takes: Border) -> Callable[..., Any]:
        session = self.load(self._export(gate, takes, 0, ["description"]), _ends(takes), False)
        return lambda features: session([features])[0]

    def head(self, head: nn.Module, takes: Border, context: int) -> Callable[..., Any]:
        session = self.load(self._export(head, takes, context, _ANSWER), _ends(takes), False)
        return lambda features, context: session([features] if context is None else [features, context])

    def both(self, path: nn.Module, head: nn.Module, takes: Border, gives: Border, context: int) -> Any:
        exported = self._export(PathAndHead(path, head), takes, context, [NEXT, *_ANSWER])
        session = self.load(exported, _ends(takes, gives), False)
        return lambda features, context: session([features] if context is None else [features, context])

    def _export(self, module: nn.Module, takes: Border, context: int, outputs: list[str]) -> bytes:
        return export_onnx(module, takes, context, outputs, self.prepares_blocks)


def _ends(takes: Border, gives: Border | None = None) -> dict[str, int]:
    """Channels by name of the features (N, C, H, W) that a session takes and gives in the engine's own layout."""
    ends = {FEATURES: takes, NEXT: gives}
    return {name: border.shape[0] for name, border in ends.items() if border is not None and border.blocked}


class _Way(nn.Module):
    """A path, with the channel means of what it gives, (N, C, 1, 1), if a gate reads them."""

    def __init__(self, module: nn.Module, means: bool) -> None:
        super().__init__()
        self.module, self.means = module, means

    def forward(self, features: Tensor, *beside: Tensor) -> Any:
        features = self.module(features, *beside)
        return (features, pool_map(features)) if self.means else features


class PathAndHead(nn.Module):
    """A path and the head behind it: the features of the path, and what the head gives."""

    def __init__(self, path: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.path, self.head = path, head

    def forward(self, features: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        features = self.path(features)
        return features, *self.head(features, context)


def export_onnx(
    module: nn.Module, takes: Border, context: int = 0, outputs: Sequence[str] = (NEXT,), blocks: bool = False
) -> bytes:
    """A module in eval mode as ONNX, with the batch dimension free.

    Uses the tracing exporter: what is exported is a straight line already, and it is twenty times faster.

    Args:
        takes: what its features are.
        context: width of its second input, (N, D); 0 for none.
        outputs: their names; those of fewer are the first ones.
        blocks: prepare for ONNX Runtime's blocked layout.

    Raises:
        RefusedPart: the exporter does not know an operator.
    """
    features = blank(module, 2, *takes.shape)
    inputs = [features.to(takes.dtype or features.dtype)]
    inputs += [blank(module, 2, context)] if context else []
    module = _Plain(module, blocks).eval()
    names = INPUTS[: len(inputs)]
    return as_onnx(module, inputs, names, outputs)


def as_onnx(module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str], outputs: Sequence[str]) -> bytes:
    """A module as ONNX, with the first dimension of all inputs and outputs free.

    Args:
        names: of the inputs.
        outputs: names; those of fewer are the first ones.

    Raises:
        RefusedPart: the exporter does not know an operator.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            found = module(*[one.clone() for one in inputs])
            outputs = outputs[: 1 if isinstance(found, Tensor) else len(found)]
            with Exportable(is_quantized(module)):
                torch.onnx.export(
                    module,
                    tuple(inputs),
                    buffer,  # type: ignore[arg-type]  # the tracing exporter takes a stream
                    input_names=list(names),
                    output_names=list(outputs),
                    dynamic_axes={name: {0: "batch"} for name in [*names, *outputs]},
                    opset_version=_OPSET,
                    dynamo=False,
                )
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(". ")
            raise RefusedPart(f"it cannot be exported to ONNX: {reason}") from error
    return buffer.getvalue()


class _Plain(nn.Module):
    """Hides a GraphModule, whose ``graph`` the exporter takes for its own. The rest is for ONNX Runtime.

    Features come in as ONNX Runtime's sessions hand them on, unblocked. If a shortcut takes them as they are, its add
    and all that follows are computed outside the blocked layout, unfused. A pool of one pixel, which changes nothing,
    is an operator that brings them into the layout once for all who use them.
    """

    def __init__(self, module: nn.Module, blocks: bool) -> None:
        super().__init__()
        self.module, self.blocks = module, blocks and not is_quantized(module)

    def forward(self, features: Tensor, *context: Tensor) -> Any:
        torch._C._jit_set_onnx_log_enabled(False)  # on by mistake: graphs that cannot be exported are printed on stdout
        if self.blocks and features.dim() == 4 and features.shape[1] % BLOCK == 0:
            features = functional.max_pool2d(features, 1)
        return self.module(features, *context)


def as_array(values: Tensor) -> NDArray[Any]:
    """Contiguous, without a copy where it can be."""
    return np.ascontiguousarray((values.detach() if values.requires_grad else values).numpy())
