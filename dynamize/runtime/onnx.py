"""The backends that run ONNX: one session a segment. ONNX Runtime's sessions are all on one thread pool."""

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as _ort
from torch import Tensor, nn
from torch.nn import functional

from dynamize.errors import DynamizeError
from dynamize.graph.trace import blank
from dynamize.nn.dispatch import Chooser, Piece, Run, run_pieces
from dynamize.nn.gated import GatedSegment, Unit, eager_choice, make_pieces
from dynamize.nn.gates import ConvGate, Gate, LinearGate, State, pool_map
from dynamize.nn.network import DynamicNetwork, NetworkStage
from dynamize.nn.quantized import is_quantized
from dynamize.nn.routing import Stage, StageOutput
from dynamize.runtime.inplace import InPlace, can_write_over
from dynamize.runtime.integers import exchange_bytes
from dynamize.runtime.layout import blocks, exchange_blocked
from dynamize.runtime.session import session_options

_OPSET = 18
_BLOCK = 16  # channels; ONNX Runtime's blocked layout holds 8 or 16 together
_INPUTS = ["features", "context"]


Session = Callable[[list[Tensor]], list[Tensor]]
"""A compiled model: inputs in order -> outputs in order, which later calls leave alone."""


@dataclass(frozen=True)
class Engine:
    """What compiles ONNX.

    Attributes:
        load: makes a session of a model; a mapping names the inputs and outputs that it exchanges in ONNX Runtime's
            blocked layout, with their channels (:func:`exchange_blocked`).
        load_way: the same for a session that may write over the features it is given.
        blocks: whether it can exchange any in blocks.
    """

    load: Callable[[bytes, Mapping[str, int]], Session]
    load_way: Callable[[bytes, Mapping[str, int]], Session]
    blocks: bool


def onnx_stages(network: DynamicNetwork, device: torch.device) -> list[Stage]:
    """Every stage of ``network`` as ONNX Runtime sessions on the CPU: one, or one for each way through its gates."""
    if device.type != "cpu":
        raise DynamizeError(f"backend onnxruntime runs on the CPU here, not on {device}: use --backend eager")
    return engine_stages(network, Engine(_session, partial(_session, overwrite=True), not is_quantized(network)))


def engine_stages(network: DynamicNetwork, engine: Engine) -> list[Stage]:
    """Every stage of a copy of ``network`` as sessions of one engine on the CPU."""
    network = copy.deepcopy(network).cpu().eval()
    exchange_bytes(network)
    stages: list[OnnxStage | GatedOnnxStage] = []
    blocked = False  # whether features come in ONNX Runtime's blocked layout: images do not
    for stage, inputs in stages_with_inputs(network):
        gated = isinstance(network.segments[stage.index], GatedSegment)
        stages.append((GatedOnnxStage if gated else OnnxStage)(stage, inputs, blocked, engine))
        blocked = stages[-1].hands_on_blocks
    return list(stages)


def stages_with_inputs(network: DynamicNetwork) -> Iterator[tuple[NetworkStage, list[Tensor]]]:
    """Every stage of a network on the CPU, with an example of what it takes: features and, if chained, context."""
    inputs = [blank(network, 2, *network.input_shape)]
    for stage in network.stages():
        yield stage, inputs
        with torch.no_grad():
            output = stage(inputs[0], inputs[1] if len(inputs) > 1 else None, True)
        inputs = [one for one in (output.features, output.context) if one is not None]


def export_stage(stage: NetworkStage, inputs: list[Tensor], blocks: bool = True) -> tuple[bytes, list[str]]:
    """A stage with its exit as ONNX, and the names of its outputs; ``blocks`` as for :func:`export_onnx`."""
    network = stage.network
    if stage.index == network.exit_count - 1:
        outputs = ["logits"]
    else:
        outputs = ["next_features", "logits", "score", *(["next_context"] if network.chained else [])]
    return export_onnx(_Deciding(stage), inputs, outputs, blocks), outputs


class OnnxStage:
    """One stage as a session; a second session without the head is made when an exit is switched off."""

    def __init__(self, stage: NetworkStage, inputs: list[Tensor], blocked: bool, engine: Engine) -> None:
        self.network = network = stage.network
        self._engine = engine
        self._segment, self._inputs = network.segments[stage.index], inputs
        self._last = stage.index == network.exit_count - 1
        self._chained = network.chained
        with torch.no_grad():
            features = self._segment(inputs[0])
        self.hands_on_blocks = not self._last and engine.blocks and blocks(features.shape)
        self._blocked = _blocked_ends(inputs[0] if blocked else None, features if self.hands_on_blocks else None)
        self._deciding = engine.load(export_stage(stage, inputs, engine.blocks)[0], self._blocked)
        self._passing: Session | None = None

    def __call__(self, features: Tensor, context: Tensor | None, decide: bool) -> StageOutput:
        if not decide and not self._chained:
            if self._passing is None:
                exported = export_onnx(self._segment, self._inputs[:1], ["next_features"], self._engine.blocks)
                self._passing = self._engine.load(exported, self._blocked)
            return StageOutput(self._passing([features])[0], None, None, None)
        found = self._deciding([features] if context is None else [features, context])
        if self._last:
            return StageOutput(None, None, found[0], None)
        context = found[3] if self._chained else None
        logits, score = (found[1], found[2]) if decide else (None, None)
        return StageOutput(found[0], context, logits, score)

    def pieces(self) -> list[Piece]:
        """None: there are no gates."""
        return []


class GatedOnnxStage:
    """One stage with gates: a session for each way through each piece and one for the exit; the small products of the
    gates stay in torch."""

    def __init__(self, stage: NetworkStage, inputs: list[Tensor], blocked: bool, engine: Engine) -> None:
        self.network = network = stage.network
        self._engine = engine
        self._stage, self._chained = stage, network.chained
        self._segment = cast(GatedSegment, network.segments[stage.index])
        for unit in self._segment.units:
            unit.gate.fold()
        self._ends, features, self.hands_on_blocks = _ends_of_pieces(self._segment, inputs[0], blocked, engine.blocks)
        self._pieces = make_pieces(list(self._segment.pieces), self._way, self._description, _choice)
        self._exit: Session | None = None
        if stage.index < network.exit_count - 1:
            outputs = ["logits", "score", *(["next_context"] if self._chained else [])]
            exported = export_onnx(_Exit(stage), [features, *inputs[1:]], outputs, engine.blocks)
            self._exit = engine.load(exported, _blocked_ends(features if self.hands_on_blocks else None))

    def __call__(self, features: Tensor, context: Tensor | None, decide: bool) -> StageOutput:
        features, choices = run_pieces(self._pieces, self._segment.offset, features, self._segment.forced)
        if self._exit is None:
            return self._stage.exit(features, context, decide)._replace(choices=choices)
        if not decide and not self._chained:
            return StageOutput(features, None, None, None, choices)
        found = self._exit([features] if context is None else [features, context])
        context = found[2] if self._chained else None
        logits, score = (found[0], found[1]) if decide else (None, None)
        return StageOutput(features, context, logits, score, choices)

    def pieces(self) -> list[Piece]:
        """Each way as a session."""
        return self._pieces

    def _way(self, module: nn.Module, pooled: bool) -> Run:
        outputs = ["next_features", "means"] if pooled else ["next_features"]
        features, ends = self._ends[id(module)]
        if pooled and "next_features" in ends:
            ends = ends | {"means": ends["next_features"]}  # a map of one pixel is the same in either layout
        exported = export_onnx(_Way(module, pooled), [features], outputs, self._engine.blocks)
        session = self._engine.load_way(exported, ends)

        def run(features: Tensor) -> tuple[Tensor, Tensor | None]:
            found = session([features])
            return found[0], found[1].flatten(1) if pooled else None

        return run

    def _description(self, gate: Gate) -> Callable[[Tensor], Tensor]:
        """Made when it is first needed: mostly the way before has handed on what a gate reads."""

        @cache
        def session() -> Session:
            features, ends = self._ends[id(gate)]
            exported = export_onnx(_Description(gate), [features], ["description"], self._engine.blocks)
            return self._engine.load(exported, ends)

        return lambda features: session()([features])[0]


def _choice(unit: Unit) -> Chooser:
    """A gate's decisions: in numpy, which between two sessions costs half of what torch does, unless it has a state."""
    if not isinstance(unit.gate, LinearGate | ConvGate):
        return eager_choice(unit)
    weight, bias = (value.detach().numpy().T.copy() for value in (unit.gate.linear.weight, unit.gate.linear.bias))
    costs = unit.path_costs.numpy()
    shifted = cache(lambda offset: bias + np.float32(offset) * costs)

    def choose_paths(described: Tensor, state: State, offset: float) -> tuple[list[int], State]:
        return (described.numpy() @ weight + shifted(offset)).argmax(1).tolist(), state

    return choose_paths


def _ends_of_pieces(
    segment: GatedSegment, features: Tensor, blocked: bool, may_block: bool
) -> tuple[dict[int, tuple[Tensor, dict[str, int]]], Tensor, bool]:
    """What each static piece, way and gate of a segment takes and which of its ends are in the blocked layout, by id of
    the module; then the segment's features and whether they are in it."""
    ends: dict[int, tuple[Tensor, dict[str, int]]] = {}
    for piece in segment.pieces:
        before, features_before = blocked, features
        ways = piece.paths() if isinstance(piece, Unit) else [piece]
        with torch.no_grad():
            features = piece(features)
        blocked = (
            before if None in ways else may_block and blocks(features.shape)
        )  # who passes unchanged keeps the layout
        taken = features_before if before else None
        found = _blocked_ends(taken, features if blocked else None)
        ends.update({id(way): (features_before, found) for way in ways if way is not None})
        if isinstance(piece, Unit):
            ends[id(piece.gate)] = features_before, _blocked_ends(taken)
    return ends, features, blocked


def _blocked_ends(taken: Tensor | None, given: Tensor | None = None) -> dict[str, int]:
    """Channels by name of the features (N, C, H, W) that a session takes and gives in the blocked layout."""
    ends = {_INPUTS[0]: taken, "next_features": given}
    return {name: features.shape[1] for name, features in ends.items() if features is not None}


class _Deciding(nn.Module):
    """A stage as a plain module: features, logits, score and, if chained, context; logits only for the last."""

    def __init__(self, stage: NetworkStage) -> None:
        super().__init__()
        self.network, self.index = stage.network, stage.index

    def forward(self, features: Tensor, context: Tensor | None = None) -> Any:
        output = NetworkStage(self.network, self.index)(features, context, True)
        if output.features is None:
            return output.logits
        found = (output.features, output.logits, output.score)
        return found if output.context is None else (*found, output.context)


class _Exit(nn.Module):
    """The exit of a stage without its segment: logits, score and, if chained, context."""

    def __init__(self, stage: NetworkStage) -> None:
        super().__init__()
        self.network, self.index = stage.network, stage.index

    def forward(self, features: Tensor, context: Tensor | None = None) -> Any:
        output = NetworkStage(self.network, self.index).exit(features, context, True)
        found = (output.logits, output.score)
        return found if output.context is None else (*found, output.context)


class _Way(nn.Module):
    """A way through a piece, with the channel means of what it gives, (N, C, 1, 1), if a gate reads them."""

    def __init__(self, module: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.module, self.pooled = module, pooled

    def forward(self, features: Tensor) -> Any:
        features = self.module(features)
        return (features, pool_map(features)) if self.pooled else features


class _Description(nn.Module):
    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, features: Tensor) -> Tensor:
        return self.gate.describe(features)


def _session(model: bytes, channels: Mapping[str, int], overwrite: bool = False) -> Session:
    """ONNX Runtime's; ``channels`` names the inputs and outputs in the blocked layout (:func:`exchange_blocked`).

    With ``overwrite`` it may write its features over those it is given (:class:`InPlace`).
    """
    options = session_options()
    try:
        if channels:
            model = exchange_blocked(model, channels)
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except (_ort.Fail, _ort.NotImplemented, _ort.InvalidGraph) as error:
        raise DynamizeError(f"ONNX Runtime refuses a segment: {error}. Use --backend eager.") from error

    def run(inputs: list[Tensor]) -> list[Tensor]:
        arrays = map(as_array, inputs)
        return [torch.from_numpy(value) for value in session.run(None, dict(zip(_INPUTS, arrays, strict=False)))]

    writes_over = overwrite and bool(channels) and can_write_over(model, _INPUTS[0], "next_features")
    return InPlace(session, run) if writes_over else run


def as_array(values: Tensor) -> NDArray[Any]:
    """Contiguous, without a copy where it can be."""
    return np.ascontiguousarray(values.detach().numpy())


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """For the small products between sessions: a parallel region of torch, however small, leaves its threads spinning
    against those of the sessions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def export_onnx(module: nn.Module, inputs: list[Tensor], outputs: list[str], blocks: bool = True) -> bytes:
    """A module in eval mode as ONNX, with the batch dimension free and its outputs named.

    Uses the tracing exporter: what is exported is a straight line already, and it is twenty times faster. ``blocks``
    prepares for ONNX Runtime's blocked layout.
    """
    buffer = io.BytesIO()
    names = _INPUTS[: len(inputs)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                _Plain(module, blocks).eval(),
                tuple(inputs),
                buffer,  # type: ignore[arg-type]  # the tracing exporter takes a stream
                input_names=names,
                output_names=outputs,
                dynamic_axes={name: {0: "batch"} for name in [*names, *outputs]},
                opset_version=_OPSET,
                dynamo=False,
            )
        except Exception as error:
            raise DynamizeError(
                f"a segment cannot be exported to ONNX: {str(error).splitlines()[0]}. Use --backend eager."
            ) from error
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
        if self.blocks and features.dim() == 4 and features.shape[1] % _BLOCK == 0:
            features = functional.max_pool2d(features, 1)
        return self.module(features, *context)
