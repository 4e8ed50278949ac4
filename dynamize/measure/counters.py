"""What three libraries count in one network, and why they differ: torch's dispatcher, whose figures are ours, fvcore,
thop. All are multiply-accumulates per image; what fvcore and thop call FLOPs are such too."""

import copy
import logging
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynamize.graph.tracer import blank

log = logging.getLogger(__name__)

_KINDS = (
    ("resizing", ("upsampl", "grid_sampl")),
    ("normalisation", ("norm",)),
    ("pooling", ("pool",)),
    ("convolution", ("conv",)),
    ("matrix product", ("linear", "mm", "matmul", "einsum", "attention")),
)
_MACS = ("convolution", "matrix product")
_LIMIT = 0.01  # of our count: what differs by more is explained
_WORTH_SAYING = 0.0005

Kinds = Mapping[str, float]


@dataclass(frozen=True)
class Count:
    """What one library counts.

    Attributes:
        counter: ours, fvcore or thop.
        modules: MACs by path of a module ("" is the network) and kind of operator, those of its children included.
        unsupported: operators (fvcore) or classes of modules (thop) that it has no rule for, and how often they come.
        failure: why it cannot count this network.
    """

    counter: str
    modules: Mapping[str, Kinds] = field(default_factory=dict)
    unsupported: Mapping[str, int] = field(default_factory=dict)
    failure: str | None = None

    @property
    def kinds(self) -> Kinds:
        """Of the whole network."""
        return self.modules.get("", {})

    @property
    def total(self) -> float:
        """Of the whole network."""
        return sum(self.kinds.values())

    def own(self) -> dict[str, float]:
        """Convolutions and matrix products by module, those of its children left out."""
        found = {path: sum(kinds.get(kind, 0.0) for kind in _MACS) for path, kinds in self.modules.items()}
        whole = dict(found)
        for path in whole:
            if path:
                found[_holder(path, whole)] -= whole[path]
        return found


@dataclass(frozen=True)
class Counts:
    """The three counts of a network; ``classes`` are its modules' by path."""

    ours: Count
    others: tuple[Count, ...]
    classes: Mapping[str, str]

    @property
    def every(self) -> tuple[Count, ...]:
        """Ours first."""
        return (self.ours, *self.others)

    def difference(self, other: Count) -> float:
        """By which share of our count another one is larger."""
        return (other.total - self.ours.total) / max(self.ours.total, 1.0)

    def disagreements(self) -> list[str]:
        """A sentence for each counter that fails, or is to blame that the counts lie further apart than 1 %."""
        failed = [f"{one.counter} cannot count this network: {one.failure}" for one in self.others if one.failure]
        counted = [one for one in self.others if not one.failure and not self.ours.failure]
        differences = [0.0, *map(self.difference, counted)]
        if max(differences) - min(differences) <= _LIMIT:
            return failed
        far = [one for one in counted if abs(self.difference(one)) > _LIMIT / 2]
        return failed + [f"{one.counter} counts {_signed(self.difference(one))}: {self.why(one)}" for one in far]

    def why(self, other: Count) -> str:
        """Where a counter's figures come from that are not ours."""
        reasons = list(self._reasons(other))
        return "; ".join(reasons) if reasons else "for no reason that is known here"

    def _reasons(self, other: Count) -> Iterator[str]:
        added = {kind: macs for kind, macs in other.kinds.items() if kind not in _MACS}
        if said := self._shares(added):
            yield f"it adds {said}, which is element-wise or folds into a layer"
        missing: dict[str, float] = defaultdict(float)
        otherwise: dict[str, float] = defaultdict(float)
        ours, theirs = self.ours.own(), other.own()
        for path in ours.keys() | theirs.keys():
            mine, its = ours.get(path, 0.0), theirs.get(path, 0.0)
            (missing if mine and not its else otherwise)[self.classes.get(path, path)] += its - mine
        if said := self._shares(missing):
            no_rule = ", ".join(name for name in other.unsupported if kind_of(name) in _MACS)
            yield f"it leaves out {said}: {_WHY_MISSING[other.counter].format(no_rule=no_rule or 'what they compute')}"
        if said := self._shares(otherwise, signed=True):
            yield f"it counts {said} by another formula, or once for each name of a shared module"

    def _shares(self, macs: Mapping[str, float], signed: bool = False) -> str:
        shares = {name: value / max(self.ours.total, 1.0) for name, value in macs.items()}
        large = [
            name for name in sorted(shares, key=lambda one: -abs(shares[one])) if abs(shares[name]) > _WORTH_SAYING
        ]
        said = [f"{name} ({_signed(shares[name]) if signed else _percent(abs(shares[name]))})" for name in large]
        return ", ".join(said)


_WHY_MISSING = {
    "fvcore": "it has no rule for {no_rule}",
    "thop": "it counts modules whose very class it knows, no functions and no subclasses",
}


def count_three_ways(network: nn.Module, input_shape: Sequence[int]) -> Counts:
    """Count a network in eval mode on a blank image of (C, H, W); the network itself stays as it is."""
    example = blank(network, 1, *input_shape)
    counted = [_tried(name, count, network, example) for name, count in _COUNTERS.items()]
    classes = {path: _class(module) for path, module in network.named_modules(remove_duplicate=False)}
    return Counts(counted[0], tuple(counted[1:]), classes)


def kind_of(name: str) -> str:
    """The kind of work of an operator (``aten::addmm``) or a class of modules (``BatchNorm2d``)."""
    lower = name.lower()
    return next((kind for kind, words in _KINDS if any(word in lower for word in words)), "other")


def _tried(name: str, count: Callable[[nn.Module, Tensor], Count], network: nn.Module, example: Tensor) -> Count:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # thop leaves buffers behind, fvcore hooks where tracing fails
            return count(copy.deepcopy(network).eval(), example)
    except Exception as error:  # other libraries stumble over many things; a table without them is still a table
        log.debug("%s", name, exc_info=True)
        return Count(name, failure=next(iter(str(error).splitlines()), "") or type(error).__name__)


def _ours(network: nn.Module, example: Tensor) -> Count:
    with FlopCounterMode(display=False) as counter:
        network(example)
    root = type(network).__name__
    found = {
        "" if name == "Global" else name.removeprefix(f"{root}."): {
            str(op): flops / 2 for op, flops in flops_of.items()
        }
        for name, flops_of in counter.get_flop_counts().items()
        if name != root  # the same as Global
    }
    return Count("ours", {path: _by_kind(operators) for path, operators in found.items()})


def _fvcore(network: nn.Module, example: Tensor) -> Count:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(network, (example,))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    modules = {path: _by_kind(operators) for path, operators in analysis.by_module_and_operator().items()}
    silent = {name.removeprefix("aten::"): calls for name, calls in analysis.unsupported_ops().items()}
    return Count("fvcore", modules, silent)


def _thop(network: nn.Module, example: Tensor) -> Count:
    from thop import profile
    from thop.profile import register_hooks

    total, _, layers = profile(network, (example,), verbose=False, ret_layer_info=True)
    modules: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for path, macs in _leaves(layers) if layers else [("", total)]:
        kind = kind_of(type(network.get_submodule(path)).__name__)
        for holder in _holders(path) if macs else ():
            modules[holder][kind] += float(macs)
    bare = [module for module in network.modules() if not list(module.children())]
    silent = Counter(_class(module) for module in bare if type(module) not in register_hooks)
    return Count("thop", modules, silent)


_COUNTERS = {"ours": _ours, "fvcore": _fvcore, "thop": _thop}


def _leaves(layers: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """thop's own nested table, flat: what has children shows the sum of them."""
    for name, (macs, _, inside) in layers.items():
        path = f"{above}.{name}" if above else name
        if inside:
            yield from _leaves(inside, path)
        else:
            yield path, macs


def _by_kind(operators: Mapping[str, float]) -> Kinds:
    kinds: dict[str, float] = defaultdict(float)
    for name, macs in operators.items():
        if macs:
            kinds[kind_of(name)] += float(macs)
    return dict(kinds)


def _holders(path: str) -> Iterator[str]:
    """A module's path, those of the modules around it, and the network's."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _holder(path: str, known: Mapping[str, float]) -> str:
    """The nearest module around this one that was counted."""
    return next(one for one in _holders(path) if one != path and one in known)


def _class(module: nn.Module) -> str:
    """Conv2d of torch, timm.Conv2d of others."""
    library = type(module).__module__.partition(".")[0]
    name = type(module).__name__
    return name if library == "torch" else f"{library}.{name}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f} %"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
