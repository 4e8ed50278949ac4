"""What each way through a network costs, in multiply-accumulates."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import LEAVES, Decision, Setting

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Once:
    """What several legs begin with and the first of them that runs does, for images that an earlier one has seen.

    Attributes:
        macs: per image.
        leg: number of the earlier leg.
    """

    macs: float
    leg: int


Step = float | Once | Decision


@dataclass(frozen=True)
class Costs:
    """What a network costs piece by piece.

    Attributes:
        legs: in order of execution, from the images to the next piece that starts from them again: the MACs per image
            of each static piece, a decision, or what was put off until then.
        switchable: names of the decisions that do not run, and cost nothing, where their exit is off.
    """

    legs: tuple[tuple[Step, ...], ...]
    switchable: frozenset[str]

    @property
    def steps(self) -> list[Step]:
        """Those of all legs in order."""
        return [step for leg in self.legs for step in leg]

    @property
    def leaving(self) -> list[Decision]:
        """The decisions at which images leave, in order."""
        return [one for one in self.steps if isinstance(one, Decision) and one.effect == "leaves"]

    @property
    def changing(self) -> list[Decision]:
        """The other decisions, in order."""
        return [one for one in self.steps if isinstance(one, Decision) and one.effect == "changes"]

    def cumulative(self, setting: Setting | None = None) -> Floats:
        """MACs of leaving at each exit (K,), the dearest options taken; without a setting all exits are on."""
        start, found = 0.0, []
        done: set[Once] = set()
        asked: list[bool] = []
        for leg in self.legs:
            spent = needed = start  # needed: up to the last decision that is on; the rest of a leg only leads to an end
            put_off = {step for step in leg if isinstance(step, Once) and asked[step.leg]} - done
            for step in leg:
                if not isinstance(step, Decision):
                    spent += _macs(step) if not isinstance(step, Once) or step in put_off else 0.0
                    continue
                off = setting is not None and setting.thresholds.get(step.name) is None and step.name in self.switchable
                spent += 0.0 if off else step.always + max(step.macs)
                if step.effect == "leaves":
                    found.append(spent)
                    needed = needed if off else spent
            asked.append(needed > start)
            done |= put_off if asked[-1] else set()
            start, last = needed, spent
        return np.array([*found, last])

    def cheapest(self) -> float:
        """MACs of the cheapest way to an answer: the first exit that pays, and the cheapest option of all else."""
        spent, found = 0.0, []
        for step in self.steps:
            if not isinstance(step, Decision):
                spent += _macs(step)
            else:
                spent += step.always + min(step.macs)
                found += [spent] if step.effect == "leaves" else []
        return min([*found, spent])

    def executed(self, taken: Mapping[str, Tensor], images: int) -> Floats:
        """MACs that each image (N,) cost, from the option that it took in each decision; -1: not reached, or idle."""
        spent = np.zeros(images)
        for step, runs in zip(self.steps, self.runs(taken, images), strict=True):
            if isinstance(step, Decision):
                spent[runs] += step.always + np.array(step.macs)[taken[step.name].numpy()[runs]]
            else:
                spent[runs] += _macs(step)
        return spent

    def runs(self, taken: Mapping[str, Tensor], images: int) -> Iterator[Bools]:
        """For each of `steps`, which images (N,) it ran for."""
        here = np.ones(images, bool)
        waiting: dict[Once, Bools] = {}
        asked: list[Bools] = []
        for number, leg in enumerate(self.legs, start=1):
            last = number == len(self.legs)
            decided = _decided_later(leg, taken, images)
            asked.append(decided[0])
            needed = [np.ones(images, bool)] * len(leg) if last else decided
            for step, wanted in zip(leg, needed, strict=True):
                if isinstance(step, Once):
                    due = here & wanted & waiting.get(step, asked[step.leg])
                    waiting[step] = waiting.get(step, asked[step.leg]) & ~due
                    yield due
                    continue
                if not isinstance(step, Decision):
                    yield here & wanted
                    continue
                yield taken[step.name].numpy() >= 0
                if step.effect == "leaves":
                    here = here & (taken[step.name].numpy() != LEAVES)

    def savings(self, taken: Mapping[str, Tensor]) -> dict[str, Floats]:
        """By decision that changes what comes after, MACs that each image (N,) saves against the dearest option."""
        found: dict[str, Floats] = {}
        for decision in self.changing:
            saved = np.append(max(decision.macs) - np.array(decision.macs), 0.0)
            found[decision.name] = saved[taken[decision.name].numpy()]
        return found

    def up_to_exits(self, saved: Mapping[str, Floats]) -> list[Floats]:
        """Sums of what was saved in each decision, up to each exit and to the end, K."""
        total: Floats = np.zeros_like(next(iter(saved.values()))) if saved else np.zeros(())
        found = []
        for step in self.steps:
            if isinstance(step, Decision) and step.effect == "leaves":
                found.append(total)
            elif isinstance(step, Decision):
                total = total + saved[step.name]
        return [*found, total]


def _macs(step: float | Once) -> float:
    return step.macs if isinstance(step, Once) else step


def _decided_later(leg: Sequence[Step], taken: Mapping[str, Tensor], images: int) -> list[Bools]:
    """For each step of a leg that is not the last, which images it runs for: those for which something behind it in the
    leg decides whether they leave."""
    found, decided = [], np.zeros(images, bool)
    for step in reversed(leg):
        if isinstance(step, Decision) and step.effect == "leaves":
            decided = decided | (taken[step.name].numpy() >= 0)
        found.append(decided)
    return found[::-1]


def exit_costs(network: DynamicNetwork) -> Costs:
    """The costs of a network as its pieces were counted."""
    legs: list[list[Step]] = [[]]
    put_off: list[Once] = []
    for piece in network.row:
        if piece.restarts and legs[-1]:
            legs.append(list(put_off) if piece.cuts else [])
        if piece.waits:
            put_off.append(Once(piece.macs, len(legs) - 1))
        else:
            legs[-1].append(piece.decision or piece.macs)
    switchable = frozenset(piece.name for piece in network.leaving if piece.idle(Setting()))
    return Costs(tuple(map(tuple, legs)), switchable)
