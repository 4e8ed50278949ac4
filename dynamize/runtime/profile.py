"""How long leaving at each exit, each path of a gated unit and a gate take on a backend."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dynamize.measure.latency import Contender, interleave
from dynamize.nn.dispatch import Run
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.segments import build_segments
from dynamize.runtime.compiled import CompiledNetwork, compile_network

_NEVER, _ALWAYS = float("inf"), float("-inf")


def exit_latency(
    network: DynamicNetwork,
    static: DynamicNetwork,
    backend: str,
    device: torch.device,
    batch: int = 1,
    seconds: float = 4.0,
) -> tuple[NDArray[np.float64], float]:
    """Milliseconds per image of leaving at each exit (K,), decisions included, and of the static network.

    Random images are forced through, gates open; all contenders take turns in one process.
    """
    compiled, plain = compile_network(network, backend, device), compile_network(static, backend, device)
    contenders: dict[str, Contender] = {f"exit {k}": _leaving_at(compiled, k) for k in range(network.exit_count)}
    compiled.stages[0].network.gate_offset = ALL_OPEN
    contenders["static"] = plain
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(batch, *network.input_shape, generator=generator).to(device) for _ in range(4)]
    times = interleave(contenders, inputs, device, seconds)
    found = [times.median_ms(name) / batch for name in contenders]
    return np.array(found[:-1]), found[-1]


def _leaving_at(compiled: CompiledNetwork, index: int) -> Contender:
    early = len(compiled.stages) - 1
    thresholds = [_ALWAYS if k == index else _NEVER for k in range(early)]

    def run(images: Tensor) -> Tensor:
        return compiled.run_at(thresholds, images).logits

    return run


@dataclass(frozen=True)
class GatePrice:
    """Milliseconds at batch 1: of one gate with all it entails, and of all blocks that gates may skip."""

    gate_ms: float
    blocks_ms: float


def gate_price(
    network: DynamicNetwork,
    insert: Callable[[DynamicNetwork], None],
    backend: str,
    device: torch.device,
    seconds: float = 3.0,
) -> GatePrice:
    """What gates cost and could save on a backend.

    Args:
        network: without gates.
        insert: puts a gate before each block, into a copy.
    """
    gated = copy.deepcopy(network)
    insert(gated)
    plain, compiled = (compile_network(one, backend, device) for one in (network, gated))
    contenders: dict[str, Contender] = {"static": plain}
    contenders |= {"open": _with_gates(compiled, ALL_OPEN), "closed": _with_gates(compiled, -ALL_OPEN)}
    image = torch.randn(1, *network.input_shape, generator=torch.Generator().manual_seed(0)).to(device)
    times = interleave(contenders, [image], device, seconds)
    static, opened, closed = (times.median_ms(name) for name in ("static", "open", "closed"))
    return GatePrice(max(0.0, opened - static) / len(gated.units), max(1e-6, opened - closed))


def _with_gates(compiled: CompiledNetwork, offset: float) -> Contender:
    """All exits off; the network that was compiled stays as it is."""

    def run(images: Tensor) -> Tensor:
        compiled.stages[0].network.gate_offset = offset
        return compiled.run_at([None] * (len(compiled.stages) - 1), images).logits

    return run


def path_latency(
    network: DynamicNetwork, backend: str, device: torch.device, seconds: float = 4.0
) -> tuple[list[list[float]], float, float]:
    """Milliseconds per image at batch 1: of the paths of each gated unit, of the whole network with all gates open, and
    of the original network.

    Each path is timed by itself, in turns with the others, on what reaches it from a random image.
    """
    static = DynamicNetwork([network.plain], input_shape=network.input_shape)
    return _path_times(network, static, backend, device, seconds)


def gate_latency(
    network: DynamicNetwork, backend: str, device: torch.device, seconds: float = 4.0
) -> tuple[list[list[float]], float]:
    """Milliseconds per image at batch 1: of the paths of each gated unit, and of one gate with all it entails.

    The latter is what the network with all gates open takes longer than without them, shared equally.
    """
    ungated = copy.deepcopy(network)
    ungated.segments = nn.ModuleList(build_segments(ungated.plain, ungated.cuts, {}))
    paths, opened, without = _path_times(network, ungated.eval(), backend, device, seconds)
    return paths, max(0.0, opened - without) / len(network.units)


def _path_times(
    network: DynamicNetwork, static: DynamicNetwork, backend: str, device: torch.device, seconds: float
) -> tuple[list[list[float]], float, float]:
    """Milliseconds of each path of each unit, of ``network`` with all gates open, and of ``static``; all exits off."""
    compiled, plain = compile_network(network, backend, device), compile_network(static, backend, device)
    image = torch.randn(1, *network.input_shape, generator=torch.Generator().manual_seed(0)).to(device)
    contenders: dict[str, Contender] = {"static": _with_gates(plain, 0.0), "open": _with_gates(compiled, ALL_OPEN)}
    units = _unit_ways(compiled, image)
    for u, (ways, features) in enumerate(units):
        contenders |= {f"{u}/{p}": _on(way, features) for p, way in enumerate(ways) if way is not None}
    times = interleave(contenders, [image], device, seconds)
    paths = [
        [times.median_ms(f"{u}/{p}") if way is not None else 0.0 for p, way in enumerate(ways)]
        for u, (ways, _) in enumerate(units)
    ]
    return paths, times.median_ms("open"), times.median_ms("static")


def _unit_ways(compiled: CompiledNetwork, image: Tensor) -> list[tuple[list[Run | None], Tensor]]:
    """The ways through each gated unit, and the features that reach it while all gates are open."""
    found: list[tuple[list[Run | None], Tensor]] = []
    features, context = image, None
    compiled.stages[0].network.gate_offset = ALL_OPEN
    with torch.inference_mode():
        for stage in compiled.stages:
            reached = features
            for piece in stage.pieces():
                if piece.choose is not None:
                    found.append((piece.ways, reached.clone()))
                original = piece.ways[-1]
                assert original is not None
                reached, _ = original(reached)
            output = stage(features.clone(), context, False)
            if output.features is not None:
                features, context = output.features, output.context
    return found


def _on(way: Run, features: Tensor) -> Contender:
    """Always on the same features, though it may write over them: whatever they hold takes the same time."""

    def run(_: Tensor) -> Tensor:
        with torch.inference_mode():
            return way(features)[0]

    return run
