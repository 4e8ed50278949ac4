"""`prune`: whole channels taken out of the network, for all images."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from dynamize.compression.bisection import bracket, least
from dynamize.compression.comparison import Stopwatch, answers, points, whole_macs
from dynamize.compression.coupling import channel_groups
from dynamize.compression.importance import Criterion, add_gradients, importance
from dynamize.compression.layers import resize, sizes
from dynamize.compression.removal import ChannelGroup, faithful, remove
from dynamize.compression.sensitivity import RATIOS, Sensitivity, scan
from dynamize.compression.widths import (
    Widths,
    between,
    by_harm,
    least_worth,
    narrowed,
    partly,
    removed_share,
    spared,
    uniform,
)
from dynamize.data import Images, Splits, set_epoch
from dynamize.errors import DynamizeError, InfeasibleError
from dynamize.files import write_json_lines, write_text
from dynamize.folders import METRICS
from dynamize.nn.network import DynamicNetwork
from dynamize.rewrite.exchange import count_again, sliced_layers
from dynamize.rewrite.written import write_out
from dynamize.runtime.engine import engine_class
from dynamize.training.statistics import estimate_statistics
from dynamize.transform import Applied, Context, Kind, Transform
from dynamize.transforms.distill import Distill

_DEFAULT_RATIO = 0.5
_NEARLY = 0.05  # of the channels
_TAYLOR_IMAGES = 1024
_BATCH = 128
_MUCH = 0.01  # of the calibration images: what a step may cost before recovery is advised
_ROUNDS, _TIMED_ROUNDS = 16, 6  # of bisection; times are too noisy for more

Below1 = Annotated[float, Field(gt=0, lt=1)]


class Prune(Transform):
    """Leave out the channels that matter least, in all layers that share them (DepGraph, Fang et al. 2023).

    One of ``ratio``, ``macs_ratio`` and ``latency_ratio``; none means ``macs_ratio: 0.5``. Accuracy suffers: let it
    recover with ``recovery_epochs``, or by a `distill` step behind.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> steps = [dz.Prune(macs_ratio=0.5), dz.Distill(epochs=1)]
        >>> dyn = dz.convert(net, steps, (1, 8, 8), context)  # a dz.Context
        >>> sum(p.numel() for p in dyn.parameters()) < sum(p.numel() for p in net.parameters())
        True
    """

    pass_name: Literal["prune"] = Field("prune", alias="pass")
    ratio: Below1 | None = Field(None, description="share of the channels that goes")
    macs_ratio: Below1 | None = Field(
        None, description="largest MACs, heads included, as a share of those before this step"
    )
    latency_ratio: Below1 | None = Field(
        None, description="largest time at batch 1 on the run's backend, as a share of that before this step"
    )
    criterion: Criterion = Field(
        "magnitude", description="what a channel is worth: norm of its weights, batch norm's scale, or effect on the "
        "loss to first order, from train images"
    )  # fmt: skip
    round_to: Literal["auto"] | PositiveInt = Field(
        "auto",
        description="widths are multiples of this; auto: what the run's backend likes, 16 or 8, or the half of "
        "that, or of that again, where the network is too narrow to meet the target so",
    )
    keep: list[str] = Field([], description="layers, or modules with all their layers, that keep all channels")
    sensitivity: bool = Field(
        False, description="narrow each layer alone and let those that lose little accuracy give up more channels"
    )
    sensitivity_images: PositiveInt = Field(1024, description="calibration images that the scan looks at")
    steps: PositiveInt = Field(1, description="rounds in which channels go, with recovery after each")
    recovery_epochs: NonNegativeInt = Field(0, description="epochs of distillation after each round")
    recovery_lr: PositiveFloat = Field(0.02, description="peak of each round's one-cycle schedule")
    statistics_images: NonNegativeInt = Field(
        2048, description="train images that batch norms are estimated on anew after each round; 0: not"
    )
    widths: dict[str, list[int]] | None = Field(
        None,
        description="what the step decided, for building it again: [outputs, inputs] or [channels] of each layer. "
        "Given, each layer keeps its first channels, so weights have to be loaded afterwards",
    )

    exact: ClassVar[bool] = False
    kind: ClassVar[Kind] = Kind.RESHAPES_LAYERS | Kind.FITS_CALIBRATION
    not_after: ClassVar[Kind] = Kind.SPLITS_CHANNELS

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [name for name in ("ratio", "macs_ratio", "latency_ratio") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are targets each; give one of them")
        if self.steps > 1 and not self.recovery_epochs:
            raise ValueError(f"steps: {self.steps} need recovery between them; give recovery_epochs")
        return self

    @property
    def learns(self) -> bool:
        return bool(self.recovery_epochs)

    def passes(self, data: Splits) -> float:
        return self.steps * (4 * self.recovery_epochs * len(data.train) + self.statistics_images)

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        _refuse_gates(network, self.recovery_epochs)
        written = write_out(network)
        if self.widths is not None:
            resize(network, self.widths)
            count_again(network)
            return Applied(network, self, [])
        network.to(context.device)
        before, macs = sizes(network), whole_macs(network)
        answered = None if context.data is None else answers(network, context.data.calibration, context.device)
        possible, lost = channel_groups(network, self.keep)
        plan = self._decide(network, possible, context)
        groups, final, multiple, notes = plan.groups, plan.widths, plan.multiple, [*plan.notes]
        notes += self._rounds(network, groups, final, context, multiple)
        count_again(network)
        after = sizes(network)
        changed = {path: size for path, size in after.items() if size != before[path]}
        share = removed_share(groups, final)
        notes.insert(0, f"{share:.0%} of the channels in {len(groups)} groups of layers are gone, and "
                        f"{1 - whole_macs(network) / macs:.0%} of the MACs")  # fmt: skip
        if self._falls_short(share):
            notes.append(
                f"ratio: {self.ratio:g} was not reached: that is as narrow as the layers get in steps of {multiple} "
                f"channels{'; a smaller round_to goes further' if multiple > 1 else ''}"
            )
        if answered is not None and context.data is not None:
            now = answers(network, context.data.calibration, context.device)
            notes.append(answered.note(now))
            if answered.lost(now) > _MUCH and not self.recovery_epochs:
                notes.append("nothing was trained since: give recovery_epochs, or let a `distill` step follow")
        notes += written
        if lost:
            notes.append(f"left whole, as their channels cannot be followed: {', '.join(lost)}")
        resolved = self.model_copy(update={"round_to": multiple, "widths": changed})
        return Applied(network, resolved, notes)

    def _decide(self, network: DynamicNetwork, possible: list[ChannelGroup], context: Context) -> "_Plan":
        """How many channels of each group stay in the end."""
        kept = context.work / "widths.json" if context.work is not None else None
        if kept is not None and context.resume and kept.exists():
            found = json.loads(kept.read_text(encoding="utf-8"))
            return _Plan(_wider(possible, found["multiple"]), found["multiple"], tuple(found["widths"]))
        liked, *smaller = self._multiples(context)
        plan = self._first_that_meets(network, possible, context, [liked, *smaller])
        if plan.multiple < liked:
            plan.notes.append(
                f"widths are multiples of {plan.multiple}: in steps of {liked}, which {context.backend} likes, the "
                "network is too narrow for the target"
            )
        if kept is not None:
            write_text(kept, json.dumps({"multiple": plan.multiple, "widths": plan.widths}))
        return plan

    def _multiples(self, context: Context) -> list[int]:
        """Those that are tried, in turn."""
        if self.round_to != "auto":
            return [self.round_to]
        liked = engine_class(context.backend).liked_multiple
        return [liked >> halvings for halvings in range(liked.bit_length())]

    def _first_that_meets(
        self, network: DynamicNetwork, possible: list[ChannelGroup], context: Context, multiples: list[int]
    ) -> "_Plan":
        *coarser, finest = multiples
        for multiple in coarser:
            groups = _wider(possible, multiple)
            try:
                plan = self._plan(network, groups, context, multiple) if groups else None
            except InfeasibleError:
                continue
            if plan is not None and not self._falls_short(removed_share(groups, plan.widths)):
                return plan
        groups = _wider(possible, finest)
        if not groups:
            raise DynamizeError(
                f"prune: no channels can go: none of the groups that could be narrowed has more than {finest} "
                f"channels. Use {'a smaller round_to, or ' if finest > 1 else ''}a shorter keep."
            )
        return self._plan(network, groups, context, finest)

    def _falls_short(self, share: float) -> bool:
        """Whether too few channels go for the ratio that is asked for."""
        return self.ratio is not None and share < self.ratio - _NEARLY

    def _plan(self, network: DynamicNetwork, groups: list[ChannelGroup], context: Context, multiple: int) -> "_Plan":
        found, notes = None, []
        if self.sensitivity:
            found = self._scan(network, groups, context)
            notes = [_sensitivity_note(found)]

        def at(knob: float) -> Widths:
            if found is None:
                return uniform(groups, knob, multiple)
            return spared(groups, found, knob**3, multiple)  # most is decided between drops of 0 and 0.1

        widths, more = self._solve(network, groups, context, at)
        return _Plan(groups, multiple, widths, notes + more)

    def _solve(
        self,
        network: DynamicNetwork,
        groups: list[ChannelGroup],
        context: Context,
        at: Callable[[float], Widths],
    ) -> tuple[Widths, list[str]]:
        """The widths at the least knob that meets the target. Where groups of one size give up channels together, no
        more of them do than the target takes."""

        def meeting(figure: str, target: float, measure: Callable[[Widths], float], rounds: int) -> Widths:
            wide, narrow = bracket("prune", figure, target, at, measure, rounds)
            order = by_harm(groups, self._worth(network, groups, context), wide, narrow)
            return least("prune", figure, target, lambda knob: partly(wide, narrow, order, knob), measure, rounds)

        if self.latency_ratio is not None:
            watch = Stopwatch(network, context.backend, context.device)
            times: dict[Widths, float] = {}

            def time(widths: Widths) -> float:
                return times.setdefault(widths, watch.ratio(narrowed(network, groups, widths)))

            widths = meeting("latency_ratio", self.latency_ratio, time, _TIMED_ROUNDS)
            return widths, [f"on {context.backend} at batch 1 it takes {times[widths]:.2f} of the time before"]
        if self.ratio is not None:
            if not self.sensitivity:
                return at(self.ratio), []
            left = 1 - self.ratio
            return meeting("channels left", left, lambda w: 1 - removed_share(groups, w), _ROUNDS), []
        macs, target = whole_macs(network), self.macs_ratio or _DEFAULT_RATIO

        def share(widths: Widths) -> float:
            return whole_macs(narrowed(network, groups, widths)) / macs

        return meeting("macs_ratio", target, share, _ROUNDS), []

    def _scan(self, network: DynamicNetwork, groups: list[ChannelGroup], context: Context) -> Sensitivity:
        data = context.needs_data(self)
        batches = list(_drawn(data.calibration, self.sensitivity_images, context))
        return scan(network, groups, self._worth(network, groups, context), batches, context.progress)

    def _worth(self, network: DynamicNetwork, groups: list[ChannelGroup], context: Context) -> dict[str, Tensor]:
        if self.criterion == "taylor":
            data = context.needs_data(self)
            add_gradients(network, _drawn(data.train, _TAYLOR_IMAGES, context))
        worth = {group.name: importance(network, group, self.criterion) for group in groups}
        network.zero_grad(set_to_none=True)
        return worth

    def _rounds(
        self, network: DynamicNetwork, groups: list[ChannelGroup], final: Widths, context: Context, multiple: int
    ) -> list[str]:
        """Take the channels out, in rounds, and let the network recover after each. Returns notes."""
        whole, notes = groups, []
        for done in range(1, self.steps + 1):
            if done > 1:
                now = {group.name: group for group in channel_groups(network, self.keep)[0]}
                groups = [now[group.name] for group in whole]
            widths = between(whole, final, done / self.steps, multiple)
            removed = least_worth(groups, self._worth(network, groups, context), widths)
            if not faithful(network, groups, removed):
                raise DynamizeError(
                    "prune: without these channels the network does not answer like one that does not read them, so "
                    f"they cannot be taken out safely. Name the layers to leave whole in keep; cut were "
                    f"{', '.join(group.name for group in groups)}."
                )
            remove(network, groups, removed)
            count_again(network)
            if context.data is not None and self.statistics_images:
                notes += self._estimate(network, context.data, context)
            if self.recovery_epochs:
                notes += [f"round {done}: {note}" for note in self._recover(network, context, done)]
        return notes

    def _estimate(self, network: DynamicNetwork, data: Splits, context: Context) -> list[str]:
        """Batch norms anew, where calibration images are answered not much worse with them."""
        held = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        before = answers(network, data.calibration, context.device)
        images = self.statistics_images
        estimated = estimate_statistics(network, data.train, context.device, count=images, seed=context.seed)
        after = answers(network, data.calibration, context.device)
        if before.accuracy is None or before.lost(after) <= _MUCH:
            return []
        network.load_state_dict(held)
        return [
            f"batch norms keep their statistics: anew from {estimated.images} train images they would have cost "
            f"{points(before.lost(after))} more"
        ]

    def _recover(self, network: DynamicNetwork, context: Context, done: int) -> list[str]:
        """Distil, with checkpoints of this round's shapes in a folder of their own."""
        work = None if context.work is None else context.work / f"round-{done}"
        training = Distill(epochs=self.recovery_epochs, lr=self.recovery_lr)
        notes = training.apply(network, replace(context, work=work)).notes
        if context.work is not None:
            _join_metrics(context.work, done)
        return notes


@dataclass(frozen=True)
class _Plan:
    """What is left of each group that gets narrower, in whole multiples."""

    groups: list[ChannelGroup]
    multiple: int
    widths: Widths
    notes: list[str] = field(default_factory=list)


def _wider(possible: list[ChannelGroup], multiple: int) -> list[ChannelGroup]:
    """The groups of which some channels can go and a multiple stays."""
    return [group for group in possible if group.channels > group.step(multiple)]


def _refuse_gates(network: DynamicNetwork, recovery_epochs: int) -> None:
    if sliced_layers(network):
        raise DynamizeError(
            "prune: the network has channel gates, whose groups of channels are sorted already: put `prune` before "
            "`channel_gates`"
        )
    if network.changing and recovery_epochs:
        raise DynamizeError(
            "prune: recovery_epochs, but the network has gates, which would be trained with it: put `prune` before "
            "`skip_gates`, or let a `distill` step with its gate_budget follow instead"
        )


def _drawn(images: Images, count: int, context: Context) -> Iterator[tuple[Tensor, Tensor]]:
    """Images under the test-time transform and labels, ``count`` of them drawn with the run's seed."""
    loader = images.training_loader(min(_BATCH, count), context.seed)
    set_epoch(loader, 0)
    left = count
    for pixels, labels in loader:
        yield images.prepare(pixels.to(context.device))[:left], labels.to(context.device)[:left]
        left -= len(labels)
        if left <= 0:
            return


def _join_metrics(work: Path, rounds: int) -> None:
    """Write the metrics of all rounds so far where those of a step are looked for."""
    files = [work / f"round-{done}" / METRICS for done in range(1, rounds + 1)]
    lines = [line for file in files if file.exists() for line in file.read_text(encoding="utf-8").splitlines()]
    write_json_lines(work / METRICS, [json.loads(line) for line in lines])


def _sensitivity_note(found: Sensitivity) -> str:
    half = RATIOS.index(0.5)
    ranked = sorted(found.drops, key=lambda name: -found.drops[name][half])
    parts = [f"{name} {100 * found.drops[name][half]:.1f}" for name in [*ranked[:3], *ranked[3:][-2:]]]
    return f"points of accuracy that single layers lose with half of their channels: {', '.join(parts)}"
