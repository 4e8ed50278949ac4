"""How long leaving at each exit, each path of a gated unit and a gate take on a backend."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dynamize.measure.latency import Contender, interleave
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Call, Setting
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
    leaving, _ = network.decision_names
    contenders: dict[str, Contender] = {
        f"exit {k}": _at(compiled, Setting({one: _ALWAYS if one == name else _NEVER for one in leaving}, ALL_OPEN))
        for k, name in enumerate([*leaving, None])
    }
    contenders["static"] = plain
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(batch, *network.input_shape, generator=generator).to(device) for _ in range(4)]
    times = interleave(contenders, inputs, device, seconds)
    found = [times.median_ms(name) / batch for name in contenders]
    return np.array(found[:-1]), found[-1]


def _at(compiled: CompiledNetwork, setting: Setting) -> Contender:
    return lambda images: compiled.run(images, setting)


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
    contenders |= {name: _at(compiled, Setting(offset=sign * ALL_OPEN)) for name, sign in (("open", 1), ("closed", -1))}
    image = torch.randn(1, *network.input_shape, generator=torch.Generator().manual_seed(0)).to(device)
    times = interleave(contenders, [image], device, seconds)
    static, opened, closed = (times.median_ms(name) for name in ("static", "open", "closed"))
    return GatePrice(max(0.0, opened - static) / len(gated.changing), max(1e-6, opened - closed))


@dataclass(frozen=True)
class OptionTimes:
    """Milliseconds per image at batch 1, all exits off.

    Attributes:
        options: by decision that changes what comes after, of each of its options.
        opened: of the network with the dearest option everywhere.
        static: of what it is compared with.
    """

    options: dict[str, list[float]]
    opened: float
    static: float


def option_latency(
    network: DynamicNetwork, backend: str, device: torch.device, seconds: float = 4.0, ungated: bool = False
) -> OptionTimes:
    """Times of the ways through each gated unit, each by itself, in turns, on what reaches it from a random image.

    Args:
        ungated: compare with the same network and its exits without gates, not with the original network.
    """
    if ungated:
        static = copy.deepcopy(network)
        static.remove(static.decision_names[1])
    else:
        static = DynamicNetwork(network.plain, input_shape=network.input_shape)
    compiled, plain = compile_network(network, backend, device), compile_network(static.eval(), backend, device)
    image = torch.randn(1, *network.input_shape, generator=torch.Generator().manual_seed(0)).to(device)
    opened = Setting(offset=ALL_OPEN)
    contenders: dict[str, Contender] = {"static": _at(plain, opened), "open": _at(compiled, opened)}
    ways = compiled.ways(image)
    for name, (calls, features) in ways.items():
        contenders |= {f"{name}/{p}": _on(call, features) for p, call in enumerate(calls) if call is not None}
    times = interleave(contenders, [image], device, seconds)
    options = {
        name: [0.0 if call is None else times.median_ms(f"{name}/{p}") for p, call in enumerate(calls)]
        for name, (calls, _) in ways.items()
    }
    return OptionTimes(options, times.median_ms("open"), times.median_ms("static"))


def _on(way: Call, features: Tensor) -> Contender:
    """Always on the same features, though it may write over them: whatever they hold takes the same time."""

    def run(_: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = way(features)[0]
            return found

    return run
