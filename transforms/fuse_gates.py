"""`fuse_gates`: gates that do not pay become static again."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from accelerate.utils import broadcast_object_list
from pydantic import Field, NonNegativeInt

from dynamize.data import Splits
from dynamize.errors import DynamizeError, closest
from dynamize.measure.accuracy import everything, exit_accuracies
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Decision
from dynamize.rewrite.fixing import fix_options
from dynamize.runtime.profile import option_latency
from dynamize.transform import Applied, Context, Kind, Share, Transform, gates_are_fused


class FuseGates(Transform):
    """Replace gates that decide alike for nearly all images, or cost more time than they save, by one of their paths.

    Decisions are those on the calibration images, times those of the run's backend at batch 1. A unit of which nearly
    all images take the same path takes it for all; one whose gate does not pay takes the original path.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> steps = [dz.SkipGates(group=1), dz.FuseGates(time=False)]
        >>> dyn = dz.convert(net, steps, (1, 8, 8), context)  # a dz.Context
        >>> set(dyn.history[1]["paths"].values())  # untrained gates let all images through
        {1}
    """

    pass_name: Literal["fuse_gates"] = Field("fuse_gates", alias="pass")
    paths: Literal["auto"] | dict[str, NonNegativeInt] = Field(
        "auto",
        description="the path for all images, 0 being the cheapest, by the module path or node name of what a gated "
        "block ends with; or auto",
    )
    share: Share = Field(
        0.98, description="share of the calibration images on one path from which on all take it, for `paths: auto`"
    )
    tolerance: Annotated[float, Field(ge=0, le=100)] = Field(
        0.1, description="largest fall of calibration accuracy, in points, that cheaper paths for all may cost together"
    )
    time: bool = Field(True, description="whether gates that cost more time than they save are fused too")

    exact: ClassVar[bool] = False
    kind: ClassVar[Kind] = Kind.SETTLES_GATES | Kind.FITS_CALIBRATION
    needs: ClassVar[Kind] = Kind.ADDS_GATES

    def passes(self, data: Splits) -> float:
        return 2 * len(data.calibration)

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        if not network.changing and (gates_are_fused(network) or self.paths == {}):
            nothing = ["nothing to do: an earlier `fuse_gates` left no gates"]
            return Applied(network, self.model_copy(update={"paths": {}}), nothing)
        if not network.changing:
            raise DynamizeError("fuse_gates: the network has no gates: put `skip_gates` or `channel_gates` before")
        notes: list[str] = []
        if self.paths == "auto":
            paths, notes = self._decide(network, context)
        else:
            paths = _given(network, self.paths)
        ends = {unit.name: unit.place[1] for unit in network.changing}
        fix_options(network, paths)
        resolved = self.model_copy(update={"paths": {ends[name]: path for name, path in paths.items()}})
        if not network.decisions():
            notes.append("no gate is left, so the network is static")
        return Applied(network, resolved, notes)

    def _decide(self, network: DynamicNetwork, context: Context) -> tuple[dict[str, int], list[str]]:
        """The path of each unit that becomes static, and why."""
        context.needs_data(self)
        uses = _uses(network, context)
        free = [use for use in uses if use.alone]
        paths = {use.name: use.original for use in free if self._original(use)}
        reasons = {use.name: use.reason(use.original) for use in free if use.name in paths}
        base = _accuracies(network, paths, context)
        originals, stays = dict(paths), list[str]()
        for use in sorted(free, key=lambda one: -one.shares[one.common]):
            if use.name in paths or use.shares[use.common] < self.share or not use.settles:
                continue
            accuracies = _accuracies(network, {**paths, use.name: use.common}, context)
            fall = 100 * max(a - b for a, b in zip(base, accuracies, strict=True))
            if fall <= self.tolerance + 1e-9:
                paths[use.name], reasons[use.name] = use.common, use.reason(use.common)
            elif self.time and not use.pays:
                paths[use.name], reasons[use.name] = use.original, use.reason(use.original)
                originals[use.name] = use.original
                base = _accuracies(network, originals, context)
            else:
                stays.append(f"{use.name} stays: {use.option(use.common)} for all would cost {fall:.2f} points")
        (paths,) = broadcast_object_list([paths])  # times differ between processes
        before, after = _accuracies(network, {}, context), _accuracies(network, paths, context)
        notes = [
            f"{len(paths)} of {len(uses)} gates fused; calibration accuracy {_listed(before)} before, "
            f"{_listed(after)} after",
            *(reasons[use.name] for use in uses if use.name in paths and use.name in reasons),
            *stays,
        ]
        if len(free) < len(uses):
            notes.append(f"{len(uses) - len(free)} recurrent gates stay, since each hands its state to the next")
        return paths, notes

    def _original(self, use: "_Use") -> bool:
        """Whether a unit is its original path without asking for the accuracy of another one."""
        if use.shares[use.common] >= self.share:
            return use.common == use.original
        return self.time and not use.pays


@dataclass(frozen=True)
class _Use:
    """What a decision does with the calibration images: the share of them by option (P,), and microseconds an image."""

    decision: Decision
    alone: bool
    settles: bool
    shares: Sequence[float]
    gate_us: float
    saved_us: float

    @property
    def name(self) -> str:
        return self.decision.name

    @property
    def original(self) -> int:
        return len(self.shares) - 1

    @property
    def common(self) -> int:
        """The path that most images take."""
        return max(range(len(self.shares)), key=lambda path: self.shares[path])

    @property
    def pays(self) -> bool:
        return self.saved_us > self.gate_us

    def option(self, path: int) -> str:
        """What a path is called."""
        return self.decision.options[path]

    def reason(self, path: int) -> str:
        return (
            f"{self.name} is always {self.option(path)}: {self.shares[path]:.0%} of the images take this path, the "
            f"gate takes {self.gate_us:.0f} us and saves {self.saved_us:.0f} us"
        )


def _uses(network: DynamicNetwork, context: Context) -> list[_Use]:
    assert context.data is not None
    seen = everything(network, context.data.calibration, context.device)
    times = option_latency(network, context.backend, context.device, ungated=True)
    gate_ms = max(0.0, times.opened - times.static) / len(network.changing)  # with all that it entails
    found: list[_Use] = []
    for unit in network.changing:
        taken, costs = seen.taken[unit.name], times.options[unit.name]
        shares = (torch.bincount(taken, minlength=len(costs)).double() / len(taken)).tolist()
        saved = sum(share * (costs[-1] - one) for share, one in zip(shares, costs, strict=True))
        settles = unit.settles(max(range(len(shares)), key=shares.__getitem__))
        found.append(_Use(unit.decision, unit.gate.alone, settles, shares, 1e3 * gate_ms, 1e3 * saved))
    return found


def _accuracies(network: DynamicNetwork, paths: Mapping[str, int], context: Context) -> list[float]:
    """Of each exit on the calibration images, with these units fixed."""
    assert context.data is not None
    if paths:
        network = copy.deepcopy(network)
        fix_options(network, paths)
    return exit_accuracies(network, context.data.calibration, context.device)


def _given(network: DynamicNetwork, paths: Mapping[str, int]) -> dict[str, int]:
    """Decisions for what a user names, checked."""
    named = {unit.place[1]: unit for unit in network.changing} | {unit.name: unit for unit in network.changing}
    found: dict[str, int] = {}
    for name, path in paths.items():
        if name not in named:
            known = [unit.name for unit in network.changing]
            raise DynamizeError(
                f"fuse_gates: '{name}' is no gated block. {closest(name, known)}Known: {', '.join(known)}."
            )
        unit = named[name]
        most = len(unit.decision.options) - 1
        if path > most:
            raise DynamizeError(
                f"fuse_gates: '{name}' has no path {path}: give 0 (the cheapest) to {most} (the original one)"
            )
        if not unit.settles(path):
            raise DynamizeError(
                f"fuse_gates: path {path} of '{name}' is {unit.decision.options[path]}, others for each image: give 0 "
                f"or {most}"
            )
        if not unit.gate.alone:
            raise DynamizeError(
                f"fuse_gates: '{name}' has a recurrent gate, which hands its state to the next one: leave it out, or "
                "use `gate: linear` in the step that put it there"
            )
        found[unit.name] = path
    return found


def _listed(accuracies: Sequence[float]) -> str:
    return ", ".join(f"{accuracy:.2%}" for accuracy in accuracies)
