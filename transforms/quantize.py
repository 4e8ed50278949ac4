"""`quantize`: 8-bit weights and features, each part of the network with the ranges of the images that reach it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from dynamize.compression.comparison import points
from dynamize.compression.fidelity import layer_fidelity, part_errors
from dynamize.compression.neural_compressor import chosen_steps
from dynamize.compression.quantization import assemble, observe, placeholder_steps, sample, steps_of
from dynamize.compression.rounding import Key, layer_names, left_in_float, prepare
from dynamize.compression.steps import RangeName, Steps
from dynamize.data import Images, Splits
from dynamize.errors import DynamizeError, closest
from dynamize.files import write_text
from dynamize.measure.accuracy import Seen, accuracy, everything
from dynamize.nn.network import DynamicNetwork
from dynamize.rewrite.exchange import sliced_layers
from dynamize.transform import Applied, Context, Kind, Transform, last_step

LAYERS = "layers.json"
_LISTED = 5
_COMPARED = 2  # batches on which single layers are compared
_AGREEMENT = 0.98  # of the top answers of each exit with its own in float
_PART_ERROR = 0.5  # of a part, as a share of the spread of what it gives in float

Find = Callable[[Key], Steps]


class Quantize(Transform):
    """Weights and features in bytes (static post-training quantisation, Jacob et al. 2018, sec. 2 and 3).

    Convolutions, linear layers, sums, products, concatenations and pools compute in bytes on any backend; weights have
    a scale for each output channel, features one for each tensor. Ranges come from calibration images at the network's
    thresholds and gates: put it after `calibrate`, which is then solved again by itself.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.Quantize(images=64)], (1, 8, 8), context)  # a dz.Context
        >>> dyn.history[0]["float_layers"]  # none had to fall back
        []
    """

    pass_name: Literal["quantize"] = Field("quantize", alias="pass")
    ranges: RangeName | Literal["neural-compressor"] = Field(
        "mse",
        description="what chooses the range of a tensor: mse: least squared error; percentile: nearly all values; "
        "minmax: all values; neural-compressor: its own observers",
    )
    images: PositiveInt = Field(512, description="calibration images that ranges are taken from")
    percentile: Annotated[float, Field(gt=50, le=100)] = Field(
        99.99, description="for ranges: percentile: how many percent of a tensor's values lie below, and above"
    )
    max_drop: Annotated[float, Field(ge=0, le=100)] | None = Field(
        0.5,
        description="points of calibration accuracy that any exit may lose; beyond, where less than 98 % of its "
        "answers stay or where a part differs from itself in float by half of its spread, the least exact layers "
        "fall back to float, all of them if need be. null: none falls back",
    )
    keep_float: list[str] = Field([], description="layers, or modules with all their layers, that stay in float")
    float_layers: list[str] | None = Field(
        None,
        description="what the step decided, for building it again: layers in float. Given, weights have to be loaded "
        "afterwards",
    )

    whole: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    once: ClassVar[bool] = True
    kind: ClassVar[Kind] = Kind.TURNS_INTO_BYTES | Kind.SOLVES_AGAIN | Kind.FITS_CALIBRATION

    def passes(self, data: Splits) -> float:
        return 2 * self.images + 4 * len(data.calibration)

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        if sliced_layers(network):
            raise DynamizeError(
                "quantize: the network has channel gates, whose narrower paths slice weights while the network runs, "
                "which bytes with fixed ranges cannot follow: leave `channel_gates` out, make them static with "
                "`fuse_gates` before, or use `skip_gates`"
            )
        if self.float_layers is not None:
            return Applied(assemble(prepare(network), placeholder_steps, self.float_layers), self)
        data = context.needs_data(self)
        network.to(context.device)
        prepared = prepare(network)
        names = layer_names(prepared)
        _check_names(prepared, names, self.keep_float)
        batches = sample(data.calibration, self.images, context.device)
        find, rare = self._find(prepared, batches)
        fidelity = layer_fidelity(prepared, find, batches[:_COMPARED], self.keep_float)
        chosen = self._choose(prepared, find, list(fidelity), data.calibration, batches, context)
        quantized, kept = chosen.network, chosen.kept
        notes = [_summary(network, quantized, names, kept, self.ranges, sum(map(len, batches)))]
        notes += _left_note(left_in_float(prepared))
        if rare:
            notes.append(f"{rare} parts that fewer than 16 of these images reach have their ranges from all of them")
        notes += [chosen.accuracy_note(), *chosen.fallback_note(self), chosen.parts_note(), _fidelity_note(fidelity)]
        if context.work is not None:
            context.work.mkdir(parents=True, exist_ok=True)
            write_text(context.work / LAYERS, json.dumps({"decibels": fidelity, "float": kept}, indent=1))
        notes += _calibrated_again(quantized, network, data, context)
        return Applied(quantized, self.model_copy(update={"float_layers": kept}), notes)

    def _find(self, prepared: DynamicNetwork, batches: Sequence[Tensor]) -> tuple[Find, int]:
        """The steps of each tensor, and how many parts are rarely reached."""
        ranges: RangeName = "minmax" if self.ranges == "neural-compressor" else self.ranges
        theirs = chosen_steps(prepared, batches) if self.ranges == "neural-compressor" else {}
        observed = observe(prepared, batches, histograms=ranges != "minmax")
        ours = steps_of(observed.observers, ranges, self.percentile)
        return lambda key: theirs[key] if key in theirs else ours(key), observed.rare

    def _choose(
        self,
        prepared: DynamicNetwork,
        find: Find,
        worst: list[str],
        images: Images,
        batches: Sequence[Tensor],
        context: Context,
    ) -> "_Choice":
        """As many of the worst layers in float as it takes, twice as many at each trial, at last all."""
        before = everything(prepared, images, context.device)

        def choice(kept: list[str], first: "_Choice | None") -> _Choice:
            network = assemble(prepared, find, kept)
            error = max(part_errors(prepared, network, batches[:_COMPARED]))
            return _Choice(network, kept, before, everything(network, images, context.device), error, first)

        first = found = choice(self.keep_float, None)
        count = 1
        while not found.holds(self.max_drop) and len(found.kept) < len(self.keep_float) + len(worst):
            found = choice([*self.keep_float, *worst[:count]], first)
            count *= 2
        return found


@dataclass(frozen=True)
class _Choice:
    """A network in bytes and what its exits answer on calibration images, before and after.

    Attributes:
        kept: layers in float.
        error: of any part, as a share of the spread of what it gives in float.
        first: the trial without fallback; None if this is it.
    """

    network: DynamicNetwork
    kept: list[str]
    before: Seen
    after: Seen
    error: float
    first: "_Choice | None"

    @property
    def accuracies(self) -> list[tuple[float, float]]:
        """Of each exit, before and after."""
        pairs = zip(self.before.logits, self.after.logits, strict=True)
        return [(accuracy(old, self.before.labels), accuracy(new, self.after.labels)) for old, new in pairs]

    @property
    def drop(self) -> float:
        """The most that any exit loses, as a fraction."""
        return max(old - new for old, new in self.accuracies)

    @property
    def agreement(self) -> float:
        """The smallest share of any exit's answers that stay."""
        pairs = zip(self.before.logits, self.after.logits, strict=True)
        return min(accuracy(new, old.argmax(1)) for old, new in pairs)

    def holds(self, max_drop: float | None) -> bool:
        """Whether it loses no more than is allowed."""
        if max_drop is None:
            return True
        return self.drop <= max_drop / 100 and self.agreement >= _AGREEMENT and self.error <= _PART_ERROR

    def parts_note(self) -> str:
        """How far parts in bytes are from themselves in float."""
        return (
            f"parts in bytes differ by at most {self.error:.2g} of their spread from float, of {_PART_ERROR:g} allowed"
        )

    def accuracy_note(self) -> str:
        """Before and after, exit by exit."""
        each = ", ".join(f"exit {k + 1} {old:.2%} -> {new:.2%}" for k, (old, new) in enumerate(self.accuracies))
        return (
            f"calibration accuracy, evaluated again in bytes: {each}; {points(self.drop)} lost at most, and at least "
            f"{self.agreement:.2%} of each exit's answers stay"
        )

    def fallback_note(self, step: Quantize) -> list[str]:
        """What fell back, and what it was good for."""
        if self.first is None:
            return []
        fallen = self.kept[len(step.keep_float) :]
        return [
            f"{len(fallen)} layers fell back to float ({_listed(fallen)}): without, an exit loses "
            f"{100 * self.first.drop:.2f} points and keeps {self.first.agreement:.2%} of its answers, with them "
            f"{100 * self.drop:.2f} and {self.agreement:.2%}"
        ]


def _check_names(prepared: DynamicNetwork, names: list[str], given: list[str]) -> None:
    if not names:
        raise DynamizeError("quantize: the network has no convolution or linear layer that could compute in bytes")
    for one in given:
        if not any(f"{name}.".startswith(f"{one}.") for name in names):
            parents = {name.rpartition(".")[0] for name in names}
            raise DynamizeError(
                f"quantize: keep_float has '{one}', which is no layer that could compute in bytes, nor a module with "
                f"one. {closest(one, [*names, *sorted(parents)])}`dynamize inspect` lists the modules."
            )


def _summary(
    network: DynamicNetwork, quantized: DynamicNetwork, names: list[str], kept: list[str], ranges: str, images: int
) -> str:
    floats = [name for name in names if any(f"{name}.".startswith(f"{one}.") for one in kept)]
    return (
        f"{len(names) - len(floats)} of {len(names)} layers compute in bytes, with ranges by {ranges} from {images} "
        f"calibration images; weights take {_bytes(quantized) / _bytes(network):.2f} of the space before"
    )


def _left_note(left: dict[str, str]) -> list[str]:
    """Which layers no bytes are known for, by reason."""
    reasons = dict.fromkeys(left.values())
    each = [f"{_listed([name for name, why in left.items() if why == reason])} ({reason})" for reason in reasons]
    return [f"{len(left)} layers have no form in bytes and compute in float: {'; '.join(each)}"] if left else []


def _fidelity_note(fidelity: dict[str, float]) -> str:
    worst = [f"{name} {ratio:.1f}" for name, ratio in list(fidelity.items())[:_LISTED]]
    return f"least exact layers, signal to noise in dB: {', '.join(worst)}"


def _calibrated_again(quantized: DynamicNetwork, network: DynamicNetwork, data: Splits, context: Context) -> list[str]:
    """Solve the operating points anew if there were any: thresholds are compared with other confidences now."""
    if network.operating_points is None:
        return []
    step = last_step(network, Kind.SOLVES)
    if step is None or context.teacher is None:
        quantized.operating_points = None
        quantized.set_operating_point(None)
        return ["the operating points held for the network in float and are gone: add a `calibrate` step behind"]
    notes = [note for note in step.apply(quantized, context).notes if note not in data.warnings]
    return [f"calibrated again, as `{step.pass_name}` was before", *notes]


def _bytes(network: DynamicNetwork) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
