"""Every compiled part is compared with torch before anything relies on it: exporters drop arguments without a word."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynamize.graph.tracer import blank
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Call
from dynamize.runtime.engine import Border, Engine

_COARSE = 0.1  # share of the spread that values in bytes may differ by: one that is rounded otherwise moves others
_ROUNDING = 1e-5  # of the largest value
_SPREAD = 2.0  # how much wider random features are spread than those that they are drawn after


class Features:
    """What reaches the parts of a network, to try them on: that of an image without a meaning, and random ones like it.

    Args:
        network: as it is compiled, in eval mode.
        alike: whether random ones come too.
    """

    def __init__(self, network: DynamicNetwork, alike: bool) -> None:
        self.network, self.alike = network, alike
        self._ways = [part for part in network.parts() if part.role == "path" and part.before != part.after]
        self._reached: dict[int, Tensor] = {}
        self._noise = torch.zeros(0)

    def at(self, border: int) -> Tensor:
        """(2, C, H, W), the second random with the channels' means and twice their deviations; or the first alone."""
        reached = self._reach(border)
        return torch.cat([reached, self._random(reached)]) if self.alike and reached.is_floating_point() else reached

    def found(self, border: int, features: Tensor) -> None:
        """Note what was computed of :meth:`at` an earlier border."""
        self._reached[border] = features[:1]

    def forget(self) -> None:
        """Free the memory; they are found again."""
        self._reached.clear()

    def _reach(self, border: int) -> Tensor:
        if border not in self._reached:
            self._reached[border] = self._beyond(border)
        return self._reached[border]

    def _beyond(self, border: int) -> Tensor:
        """By the dearest way there; random where no part leads to it."""
        ways = [part for part in self._ways if part.after == border]
        if border in self.network.openings:
            return _image(blank(self.network, 1, *self.network.shapes[border]))
        if not ways:
            return self._random(self.at(0).new_ones(1, *self.network.shapes[border]))
        found: Tensor = ways[-1].module(self._reach(ways[-1].before).clone())
        return found

    def _random(self, features: Tensor) -> Tensor:
        if len(self._noise) < features.numel():
            self._noise = torch.randn(features.numel(), generator=torch.Generator().manual_seed(1))
        noise = self._noise[: features.numel()].view(features.shape).to(features)
        others = [dim for dim in range(features.dim()) if dim != 1]
        variance, mean = torch.var_mean(features, others, correction=0, keepdim=True)
        whole = variance.mean() + mean.var(correction=0)  # for channels that nothing here has moved
        return mean + _SPREAD * (variance + 0.01 * whole).sqrt() * noise


def _image(like: Tensor) -> Tensor:
    """Large smooth shapes, and noise; noise alone for features without positions."""
    generator = torch.Generator().manual_seed(0)
    if like.dim() < 3:
        return torch.randn(like.shape, generator=generator).to(like)
    coarse = torch.randn(1, like.shape[1], *[-(-size // 8) for size in like.shape[2:]], generator=generator)
    smooth = functional.interpolate(coarse, like.shape[2:], mode="bilinear" if coarse.dim() == 4 else "nearest")
    return (smooth + 0.5 * torch.randn(like.shape, generator=generator)).to(like)


def fault(
    engine: Engine,
    made: Call,
    inputs: Sequence[Tensor | None],
    wanted: Sequence[Tensor],
    takes: Border,
    gives: Border | None,
    in_bytes: bool,
) -> str | None:
    """How a compiled part differs from what torch computes, in words; None where it does not.

    Args:
        made: the compiled part.
        inputs: features (n, C, H, W), not in the engine's own layout, and whatever else it takes.
        wanted: what torch makes of them.
        gives: of the features that come first among what it gives; None where it gives none.
        in_bytes: whether it rounds to bytes.
    """
    limit, scales = limit_of(engine, in_bytes), [_Scale.of(one) for one in wanted]
    for count in engine.tried:
        rows = torch.arange(count) % len(wanted[0])
        given = [None if one is None else one[rows] for one in inputs]
        assert given[0] is not None
        if takes.blocked:
            given[0] = engine.own(given[0])
        try:
            found = listed(made(*given))
        except Exception as error:
            return f"it cannot run there: {(str(error) or type(error).__name__).splitlines()[0]}"
        if gives is not None and gives.blocked:
            found[0] = engine.plain(found[0])
        for one, other, scale in zip(found, wanted, scales, strict=True):
            difference = _difference(one, other[rows], scale, limit)
            if not difference <= limit:
                return f"its answers differ from torch's by {difference:.2g} of their spread, more than {limit:g}"
    return None


def limit_of(engine: Engine, in_bytes: bool) -> float:
    """What a part may differ by, as a share of the spread of its values."""
    return max(engine.limit, _COARSE if in_bytes else 0.0)


def agree(found: Sequence[Tensor], wanted: Sequence[Tensor], limit: float) -> bool:
    """Whether values differ by no more than a share of their spread."""
    pairs = zip(found, wanted, strict=True)
    return all(_difference(one, other, _Scale.of(other), limit) <= limit for one, other in pairs)


def listed(found: Any) -> list[Tensor]:
    """The tensors that a part gives."""
    return [found] if isinstance(found, Tensor) else [one for one in found if one is not None]


@dataclass(frozen=True)
class _Scale:
    """What differences are compared with: the spread of values and the largest one, of those that are finite."""

    spread: float
    largest: float
    finite: bool

    @staticmethod
    def of(values: Tensor) -> "_Scale":
        values = values.float()
        largest = float(values.abs().max()) if values.numel() else 0.0
        finite = math.isfinite(largest)
        if not finite:
            values = values[values.isfinite()]
            largest = float(values.abs().max()) if values.numel() else 0.0
        spread = float(values.std(correction=0)) if values.numel() else 0.0
        return _Scale(spread + torch.finfo(torch.float32).tiny, largest, finite)


def _difference(found: Tensor, wanted: Tensor, scale: _Scale, limit: float) -> float:
    """The largest one as a share of the spread; where values are coarse, the root of the mean square.

    A score for each image spreads too little to tell anything of coarse values.
    """
    coarse = limit >= _COARSE
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return math.inf
    if not wanted.numel() or (coarse and wanted.dim() == 1):
        return 0.0
    apart = found.float() - wanted.float()
    if not scale.finite:
        apart = apart[wanted.isfinite()]
    if not apart.numel():
        return 0.0
    size = float(apart.square_().mean().sqrt() if coarse else apart.abs_().max())
    return max(0.0, size - _ROUNDING * scale.largest) / scale.spread if math.isfinite(size) else math.inf
