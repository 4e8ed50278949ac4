"""`factorize`: convolutions and linear layers as products of smaller ones."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from dynamize.compression.bisection import least
from dynamize.compression.comparison import Stopwatch, answers, layer_ratio, whole_macs
from dynamize.compression.factors import Ranks, can_factorize, factor_costs, factorized, ranks_at, spectra
from dynamize.errors import DynamizeError, closest
from dynamize.graph.trace import annotate
from dynamize.nn.network import DynamicNetwork
from dynamize.rewrite.exchange import replace_layers, sliced_layers
from dynamize.runtime.engine import engine_class
from dynamize.transform import Applied, Context, Kind, Transform

_DEFAULT_ENERGY = 0.9
_WORTH = 0.97  # of the layer's time: factors that take longer gain nothing that can be told from noise
_ROUNDS, _TIMED_ROUNDS = 16, 6  # of bisection; times are too noisy for more

Plan = tuple[tuple[str, Ranks], ...]
Below1 = Annotated[float, Field(gt=0, lt=1)]


class Factorize(Transform):
    """Low rank: SVD of linear layers and 1x1 convolutions, Tucker-2 of larger kernels (Kim et al. 2016).

    One of ``energy``, ``macs_ratio`` and ``latency_ratio``; none means ``energy: 0.9``, which is taken back where
    answers change and the whole network is no faster. Accuracy suffers: let a `distill` step follow.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> factorize = dz.Factorize(energy=0.8, timed=False)
        >>> dyn = dz.convert(net, [factorize], (1, 8, 8))
        >>> len(dyn.history[0]["layers"])
        3
    """

    pass_name: Literal["factorize"] = Field("factorize", alias="pass")
    layers: Literal["auto"] | Annotated[list[str], Field(min_length=1)] | dict[str, list[PositiveInt]] = Field(
        "auto", description="module paths, with their ranks if these are decided already; auto: all where it pays"
    )
    energy: Below1 | None = Field(None, description="share of the squared singular values that each layer's ranks keep")
    macs_ratio: Below1 | None = Field(
        None, description="largest MACs, heads included, as a share of those before this step"
    )
    latency_ratio: Below1 | None = Field(
        None, description="largest time at batch 1 on the run's backend, as a share of that before this step"
    )
    round_to: Literal["auto"] | PositiveInt = Field(
        "auto", description="ranks are multiples of this; auto: what the run's backend likes, 16 or 8"
    )
    timed: bool = Field(True, description="leave layers whole whose factors are not faster on the run's backend")

    exact: ClassVar[bool] = False
    kind: ClassVar[Kind] = Kind.RESHAPES_LAYERS
    not_after: ClassVar[Kind] = Kind.SPLITS_CHANNELS

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [name for name in ("energy", "macs_ratio", "latency_ratio") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are targets each; give one of them")
        return self

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        if sliced_layers(network):
            raise DynamizeError(
                "factorize: the network has channel gates, which narrow whole layers: put `factorize` before "
                "`channel_gates`"
            )
        found = _candidates(network)
        if isinstance(self.layers, dict):
            plan: Plan = tuple((name, tuple(ranks)) for name, ranks in self.layers.items())
            _check_ranks(plan, found)
            _exchange(network, found, plan)
            return Applied(network, self, [])
        network.to(context.device)
        chosen = found if self.layers == "auto" else {name: _find(found, name) for name in self.layers}
        macs = whole_macs(network)
        plan, notes = self._decide(network, chosen, context)
        if not plan:
            raise DynamizeError(
                "factorize: no layer gains by it: with these ranks the factors cost as much as the layers. Use a "
                "smaller energy or round_to, or leave this step out."
            )
        changed = _with(network, plan)
        saved = 1 - whole_macs(changed) / macs
        notes.insert(0, f"{len(plan)} of {len(chosen)} layers are products now, without {saved:.0%} of the MACs")
        alike, note = _compared(network, changed, context)
        slow = None if alike else self._no_faster(network, changed, context)
        if slow is not None:
            plan, notes = (), [*_taken_back(len(plan), saved, slow, note, context), *notes[1:]]
        else:
            notes += note
        _exchange(network, found, plan)
        found_ranks = {name: list(ranks) for name, ranks in plan}
        resolved = self.model_copy(update={"layers": found_ranks, "round_to": self._multiple(context)})
        return Applied(network, resolved, notes)

    def _no_faster(self, network: DynamicNetwork, changed: DynamicNetwork, context: Context) -> float | None:
        """The share of the time that is left, where nothing was asked for and next to nothing is saved."""
        asked = (self.energy, self.macs_ratio, self.latency_ratio) != (None, None, None) or self.layers != "auto"
        if asked or not self.timed:
            return None
        ratio = Stopwatch(network, context.backend, context.device).ratio(changed)
        return ratio if ratio > _WORTH else None

    def _multiple(self, context: Context) -> int:
        return engine_class(context.backend).liked_multiple if self.round_to == "auto" else self.round_to

    def _decide(
        self, network: DynamicNetwork, chosen: Mapping[str, "_Candidate"], context: Context
    ) -> tuple[Plan, list[str]]:
        """Ranks of the layers that become products, and notes."""
        found = {name: spectra(one.layer) for name, one in chosen.items()}
        multiple, gain = self._multiple(context), _Gain(chosen, context)
        pays = gain.pays if self.timed else gain.saves

        def at(knob: float) -> Plan:
            ranks = {name: ranks_at(squares, 1 - knob, multiple) for name, squares in found.items()}
            return tuple((name, one) for name, one in ranks.items() if pays(name, one))

        notes: list[str] = []
        if self.latency_ratio is not None:
            watch = Stopwatch(network, context.backend, context.device)
            times: dict[Plan, float] = {}

            def time(plan: Plan) -> float:
                return times.setdefault(plan, watch.ratio(_with(network, plan)))

            plan = least("factorize", "latency_ratio", self.latency_ratio, at, time, _TIMED_ROUNDS)
            notes = [f"on {context.backend} at batch 1 it takes {times[plan]:.2f} of the time before"]
        elif self.macs_ratio is not None:
            macs, target = whole_macs(network), self.macs_ratio
            plan = least(
                "factorize", "macs_ratio", target, at, lambda one: whole_macs(_with(network, one)) / macs, _ROUNDS
            )
        else:
            plan = at(1 - (self.energy or _DEFAULT_ENERGY))
        return plan, notes + gain.notes()


def _compared(network: DynamicNetwork, changed: DynamicNetwork, context: Context) -> tuple[bool, list[str]]:
    """Whether all calibration images, if there are any, are answered as before; and a note."""
    if context.data is None:
        return False, []
    before, after = (answers(one, context.data.calibration, context.device) for one in (network, changed))
    return before.agreement(after) == 1, [before.note(after)]


def _taken_back(layers: int, saved: float, ratio: float, note: list[str], context: Context) -> list[str]:
    return [
        f"taken back: {layers} layers as products save {saved:.0%} of the MACs, but the network takes {ratio:.2f} of "
        f"the time before on {context.backend}; give energy, macs_ratio or latency_ratio to have them all the same",
        *(f"with them: {one}" for one in note),
    ]


@dataclass(frozen=True)
class _Candidate:
    """A layer of the original graph, with the shapes of its input and output for one image."""

    layer: nn.Module
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]


def _candidates(network: DynamicNetwork) -> dict[str, _Candidate]:
    """All layers that can be factorised, by path, in order of execution."""
    plain = network.plain
    annotate(plain, network.input_shape)
    found: dict[str, _Candidate] = {}
    for node in plain.graph.nodes:
        layer = plain.get_submodule(str(node.target)) if node.op == "call_module" else None
        if layer is not None and can_factorize(layer):
            shape = node.all_input_nodes[0].meta["shape"]
            found.setdefault(str(node.target), _Candidate(layer, shape, node.meta["shape"]))
    return found


def _find(found: Mapping[str, _Candidate], name: str) -> _Candidate:
    if name in found:
        return found[name]
    raise DynamizeError(
        f"factorize: '{name}' is no linear layer and no convolution with groups=1 of this network. "
        f"{closest(name, list(found))}Known: {', '.join(found)}."
    )


def _check_ranks(plan: Plan, found: Mapping[str, _Candidate]) -> None:
    for name, ranks in plan:
        outputs, inputs, *window = _find(found, name).layer.get_parameter("weight").shape
        most = (outputs, inputs) if any(size > 1 for size in window) else (min(outputs, inputs),)
        if len(ranks) != len(most) or any(rank > limit for rank, limit in zip(ranks, most, strict=True)):
            raise DynamizeError(
                f"factorize: layer '{name}' cannot have the ranks {list(ranks)}: give at most {list(most)}"
                + (", of its outputs and its inputs" if len(most) == 2 else "")
            )


def _exchange(network: DynamicNetwork, found: Mapping[str, _Candidate], plan: Plan) -> None:
    replace_layers(network, {found[name].layer: factorized(found[name].layer, ranks) for name, ranks in plan})


def _with(network: DynamicNetwork, plan: Plan) -> DynamicNetwork:
    """A copy with factors in the place of layers."""
    changed = copy.deepcopy(network)
    _exchange(changed, _candidates(changed), plan)
    return changed


class _Gain:
    """Whether factors are cheaper than their layer, in MACs and on the clock of the run's backend."""

    def __init__(self, chosen: Mapping[str, _Candidate], context: Context) -> None:
        self.chosen, self.context = chosen, context
        self.slow: dict[str, float] = {}  # fewer MACs, yet no faster: share of the layer's time
        self._times: dict[tuple[str, Ranks], float] = {}

    def saves(self, name: str, ranks: Ranks) -> bool:
        """In MACs."""
        one = self.chosen[name]
        whole, factors = factor_costs(one.layer, ranks, one.shape, one.out_shape)
        return factors < whole

    def pays(self, name: str, ranks: Ranks) -> bool:
        """In MACs and in time at batch 1, each by itself."""
        self.slow.pop(name, None)
        if not self.saves(name, ranks):
            return False
        if (name, ranks) not in self._times:
            one = self.chosen[name]
            self._times[name, ranks] = layer_ratio(
                one.layer, factorized(one.layer, ranks), one.shape, self.context.backend, self.context.device
            )
        ratio = self._times[name, ranks]
        if ratio > _WORTH:
            self.slow[name] = ratio
        return ratio <= _WORTH

    def notes(self) -> list[str]:
        """About the ranks asked for last."""
        if not self.slow:
            return []
        few = [f"{name} ({ratio:.2f} of its time)" for name, ratio in list(self.slow.items())[:5]]
        more = f" and {len(self.slow) - len(few)} more" if len(self.slow) > len(few) else ""
        return [f"left whole, as factors are not faster on {self.context.backend}: {', '.join(few)}{more}"]
