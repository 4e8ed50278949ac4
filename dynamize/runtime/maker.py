"""Compiled parts that can be relied on: each is tried, and torch computes what a backend refuses or gets wrong."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynamize.graph.tracer import blank
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Call, Part, eager_call
from dynamize.nn.quantized import is_quantized
from dynamize.runtime.engine import ANYWHERE, Border, Engine, RefusedPart
from dynamize.runtime.trial import Features, fault, listed

_CALLED = {"path": "the path", "gate": "the gate", "head": "the head"}


class Maker:
    """Compiles the parts of one network.

    Args:
        network: as it is compiled.
        engine: what compiles.

    Attributes:
        in_torch: parts that torch computes in the place of the engine, in words, and why.
        path_in_torch: whether a path is among it.
    """

    def __init__(self, network: DynamicNetwork, engine: Engine) -> None:
        self.network, self.engine = network, engine
        self.features = Features(network, alike=max(engine.tried) > 1)
        self.in_torch: dict[str, str] = {}
        self.path_in_torch = False

    @property
    def notes(self) -> list[str]:
        """What torch computes in the place of the engine, and why."""
        name = self.engine.name
        return [f"backend {name}: {part} runs in {ANYWHERE} PyTorch: {why}" for part, why in self.in_torch.items()]

    def part(self, part: Part, takes: Border, gives: Border) -> Call:
        """A part on the engine, or in torch."""
        if part.role == "gate" and self.engine.late_gates:
            return self._when_needed(part, takes)
        with torch.inference_mode():
            context = self.network.contexts[part.owner] if part.role == "head" else part.beside or None
            return self._tried(part, takes, gives, self._inputs(part, context))

    def both(self, path: Part, head: Part, takes: Border, gives: Border) -> Call | None:
        """A path and the head behind it as one; None where the engine has no such, or none that is right."""
        compute, answer, context = eager_call(path, False), head.module, self.network.contexts[head.owner]

        def plain(features: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
            features, _ = compute(features)
            return (features, *answer(features, context))

        with torch.inference_mode():
            try:
                made: Call | None = self.engine.both(path.module, head.module, takes, gives, context)
            except RefusedPart:
                return None
            if made is None:
                return None
            inputs = self._inputs(path, context)
            wanted = self._wanted(path, plain, inputs)
            in_bytes = is_quantized(path.module) or is_quantized(head.module)
            return None if fault(self.engine, made, inputs, wanted, takes, gives, in_bytes) else made

    def _inputs(self, part: Part, context: int | None) -> list[Tensor | None]:
        """Features; for a head the context, which may be None; for a path what it takes beside them, if anything."""
        features = self.features.at(part.before)
        if part.size is not None:
            rows, columns = part.size
            features = features[..., :rows, :columns].contiguous()
        if context is None:
            return [features]
        random = torch.randn(len(features), context, generator=torch.Generator().manual_seed(2))
        return [features, random.to(blank(self.network, 1)) if context else None]

    def _wanted(self, part: Part, plain: Callable[..., Any], inputs: Sequence[Tensor | None]) -> list[Tensor]:
        found = listed(plain(*[None if one is None else one.clone() for one in inputs]))
        if part.role == "path" and part.before != part.after:
            self.features.found(part.after, found[0])
        return found

    def _when_needed(self, part: Part, takes: Border) -> Call:
        """Compiled and tried on what first comes there."""
        made: list[Call] = []

        def run(features: Tensor) -> Any:
            if not made:
                plain = self.engine.plain(features) if takes.blocked else features
                made.append(self._tried(part, takes, None, [plain]))
            return made[0](features)

        return run

    def _tried(self, part: Part, takes: Border, gives: Border | None, inputs: Sequence[Tensor | None]) -> Call:
        means = gives is not None and gives.means
        plain = eager_call(part, means)
        shown = gives if part.role == "path" else None
        try:
            made = self._compile(part, takes, gives)
            if made is part.module:
                return made
            wanted = self._wanted(part, plain, inputs)
            reason = fault(self.engine, made, inputs, wanted, takes, shown, is_quantized(part.module))
        except RefusedPart as error:
            reason = str(error)
        if reason is None:
            return made
        self.in_torch[f"{_CALLED[part.role]} of '{part.owner}'"] = reason
        self.path_in_torch = self.path_in_torch or part.role == "path"
        return self._by_torch(plain, takes, shown)

    def _compile(self, part: Part, takes: Border, gives: Border | None) -> Call:
        if part.role == "gate":
            return self.engine.gate(part.module, takes)
        if part.role == "head":
            return self.engine.head(part.module, takes, self.network.contexts[part.owner])
        assert gives is not None
        return self.engine.path(part.module, takes, gives, part.beside)

    def _by_torch(self, plain: Callable[..., Any], takes: Border, gives: Border | None) -> Call:
        engine = self.engine

        def run(features: Tensor, *more: Any) -> Any:
            found = plain(engine.plain(features) if takes.blocked else features, *more)
            return (engine.own(found[0]), *found[1:]) if gives is not None and gives.blocked else found

        return run
