"""What `dynamize suggest` answers: which two pretrained networks, one behind the other, should give an accuracy for the
fewest MACs, and which single network is the rival. Predicted from published figures; nothing is built or measured."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dynamize.errors import DynamizeError, InfeasibleError
from dynamize.sources import SourceSpec
from dynamize.verbs.published import TIMM_TABLES, Published, find_network, timm_networks, torchvision_networks

LARGEST_DROP = 1.0
_DROPS = (0.0, 0.5, 1.0)  # points
_DEFERRED = (0.075, 0.055, 0.045)  # share of the images for each point that the first network is worse
_GAPS = (2.0, 9.0)  # points, between which this was measured
RULE = (
    "Of the images, 7.5 % are deferred to the second network for each point that the first one is worse, 5.5 % for a "
    "drop of 0.5 points, 4.5 % for one of 1 point: a fit to 20 pairs on ImageNet that are 2 to 9 points apart."
)


@dataclass(frozen=True)
class Choice:
    """A network, or a cascade of two, and what it is expected to reach.

    Attributes:
        members: one or two, the cheaper first.
        accuracy: in percent; of a cascade predicted.
        macs: mean per image; of a cascade predicted.
        macs_worst: of an image that all members see.
        deferred: predicted share of the images that the second member answers.
        drop: points below the last member.
    """

    members: tuple[Published, ...]
    accuracy: float
    macs: float
    macs_worst: float
    deferred: float = 0.0
    drop: float = 0.0

    @property
    def label(self) -> str:
        """Its members' labels."""
        return " -> ".join(one.label for one in self.members)


@dataclass(frozen=True)
class Suggestion:
    """What was asked for, and what there is, the cheapest first.

    Attributes:
        wanted: top-1, in percent.
        network: what it is the accuracy of, where a network was named.
        networks: single ones that reach it.
        cascades: that cost less, one for each last network, with its best first one.
        ahead: of the named network, with what may stand before it.
        known: how many pretrained networks were looked at.
    """

    wanted: float
    network: Published | None
    networks: list[Choice]
    cascades: list[Choice]
    ahead: list[Choice]
    known: int
    notes: list[str]

    @property
    def best(self) -> Choice:
        """The cheapest of all that reach the wanted accuracy."""
        return min([*self.networks[:1], *self.cascades[:1], *self.ahead[:1]], key=lambda one: one.macs)

    @property
    def to_try(self) -> Choice | None:
        """The cascade of the recipe: the cheapest, of the named network where there is one."""
        return next(iter(self.cascades if self.network is None else self.ahead), None)

    def saving(self, choice: Choice) -> float:
        """How many times fewer MACs than the cheapest single network that reaches the accuracy."""
        return self.networks[0].macs / choice.macs

    def recipe(self, data: str) -> str | None:
        """The YAML of :attr:`to_try`, for images that lie at ``data``."""
        return None if self.to_try is None else _recipe(self.to_try, data)

    def to_dict(self, data: str) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "wanted_accuracy": self.wanted,
            "network": None if self.network is None else asdict(self.network),
            "predicted": True,
            "rule": RULE,
            "best": self._plain(self.best),
            **{name: [self._plain(one) for one in getattr(self, name)] for name in ("networks", "cascades", "ahead")},
            "known_networks": self.known,
            "notes": self.notes,
            "recipe": self.recipe(data),
        }

    def _plain(self, choice: Choice) -> dict[str, Any]:
        return asdict(choice) | {"saving": self.saving(choice)}


def suggest(
    source: SourceSpec | None = None,
    *,
    accuracy: float | None = None,
    max_drop: float | None = None,
    timm_tables: Sequence[Path] = (),
    most: int = 5,
) -> Suggestion:
    """Networks and cascades for an accuracy in percent, or for that of a network less ``max_drop`` points.

    Args:
        source: a pretrained network of torchvision or timm; or
        accuracy: top-1 on ImageNet-1k.
        max_drop: with ``source``: 0 by default.
        timm_tables: as of :func:`timm_networks`.
        most: rows of each kind.

    Raises:
        DynamizeError: not exactly one of ``source`` and ``accuracy``, or nothing is known of the source.
        InfeasibleError: no network reaches the accuracy.
    """
    _check(source is not None, accuracy, max_drop)
    theirs, notes = timm_networks(timm_tables) if timm_tables else ([], _about_timm())
    every = torchvision_networks() + theirs
    network = find_network(source, every) if source is not None else None
    wanted = accuracy if network is None else network.accuracy - (max_drop or 0.0)
    assert wanted is not None  # one of the two was given
    candidates = _best_weights(every)
    reaching = sorted((one for one in candidates if one.accuracy >= wanted), key=lambda one: one.macs)
    if not reaching:
        best = max(every, key=lambda one: one.accuracy)
        raise InfeasibleError(
            f"No network that is known here has {wanted:g} %: the best is {best.source} with {best.accuracy:.2f} %. "
            f"Ask for --accuracy {math.floor(10 * best.accuracy) / 10:g} or less.",
            nearest=best.accuracy,
        )
    networks = [Choice((one,), one.accuracy, one.macs, one.macs) for one in reaching]
    pairs = [found[0] for last in reaching if (found := _cascades(candidates, last, wanted))]
    cascades = sorted((one for one in pairs if one.macs < reaching[0].macs), key=lambda one: one.macs)
    ahead = _cascades(candidates, network, wanted) if network else []
    if not (ahead if network else cascades):
        what = network.label if network else f"{wanted:g} %"
        notes = [*notes, f"no cascade for {what}: no cheap enough network is 2 to 9 points less accurate"]
    return Suggestion(wanted, network, networks[:most], cascades[:most], ahead[:most], len(every), notes)


def _check(has_network: bool, accuracy: float | None, max_drop: float | None) -> None:
    if has_network == (accuracy is not None):
        raise DynamizeError("Give an accuracy or a network: suggest --accuracy 80, or suggest torchvision:resnet50.")
    if max_drop is not None and not has_network:
        raise DynamizeError("--max-drop is of a network: name one, or ask for a lower --accuracy.")
    if max_drop is not None and not 0 <= max_drop <= LARGEST_DROP:
        raise DynamizeError(f"--max-drop {max_drop:g}: the rule predicts drops of 0 to {LARGEST_DROP:g} points.")
    if accuracy is not None and not 1 < accuracy <= 100:
        raise DynamizeError(f"--accuracy {accuracy:g} is in percent, above 1 and at most 100: --accuracy 80.")


def _about_timm() -> list[str]:
    if find_spec("timm") is None:
        return []
    return [
        "timm is installed but ships no accuracies and MACs: give results-imagenet.csv and a benchmark-infer-*.csv "
        f"with --timm-results, both from {TIMM_TABLES}"
    ]


def _best_weights(networks: Sequence[Published]) -> list[Published]:
    """Of each network at one size, the most accurate weights."""
    best: dict[tuple[str, int], Published] = {}
    for one in networks:
        key = (one.label.partition(" ")[0].partition(".")[0], one.size)
        if key not in best or one.accuracy > best[key].accuracy:
            best[key] = one
    return list(best.values())


def _cascades(firsts: Sequence[Published], last: Published, wanted: float) -> list[Choice]:
    """Pairs that end in ``last`` and should reach the accuracy, the cheapest first."""
    drop = min(last.accuracy - wanted, LARGEST_DROP)
    deferred_by_point = float(np.interp(drop, _DROPS, _DEFERRED))
    found = []
    for first in firsts:
        gap = last.accuracy - first.accuracy
        macs = first.macs + deferred_by_point * gap * last.macs
        if _GAPS[0] <= gap <= _GAPS[1] and macs < last.macs:
            worst = first.macs + last.macs
            found.append(Choice((first, last), last.accuracy - drop, macs, worst, deferred_by_point * gap, drop))
    return sorted(found, key=lambda one: one.macs)


def _recipe(cascade: Choice, data: str) -> str:
    first, last = cascade.members
    return f"""\
version: 1
description: {json.dumps(f"{cascade.label}, predicted {cascade.accuracy:.1f} % at {cascade.macs / 1e9:.3g}G MACs")}
model:
  source: {json.dumps(last.source)}
  input: [3, {last.size}, {last.size}]
data:
  source: {json.dumps(data)}
  calibration_from: test
  normalize: {json.dumps(last.normalize)}
  resize: {last.resize}
steps:
  - pass: cascade
    first:
      - {{source: {json.dumps(first.source)}}}
  - pass: calibrate
    max_drop: {math.floor(cascade.drop * 100) / 100:g}
"""
