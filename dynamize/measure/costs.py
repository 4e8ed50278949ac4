"""What each way through a network costs, in multiply-accumulates."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import LEAVES, Decision, Setting

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """What a network costs piece by piece.

    Attributes:
        steps: in order of execution, the MACs per image of a static piece, or a decision.
        switchable: names of the decisions that do not run, and cost nothing, where their exit is off.
    """

    steps: tuple[float | Decision, ...]
    switchable: frozenset[str]

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
        spent, found = 0.0, []
        for step in self.steps:
            if not isinstance(step, Decision):
                spent += step
                continue
            off = setting is not None and setting.thresholds.get(step.name) is None and step.name in self.switchable
            spent += 0.0 if off else step.always + max(step.macs)
            found += [spent] if step.effect == "leaves" else []
        return np.array([*found, spent])

    def executed(self, taken: Mapping[str, Tensor], images: int) -> Floats:
        """MACs that each image (N,) cost, from the option that it took in each decision; -1: not reached, or idle."""
        spent, here = np.zeros(images), np.ones(images, bool)
        for step in self.steps:
            if not isinstance(step, Decision):
                spent[here] += step
                continue
            options = taken[step.name].numpy()
            reached = options >= 0
            spent[reached] += step.always + np.array(step.macs)[options[reached]]
            if step.effect == "leaves":
                here &= options != LEAVES
        return spent

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


def exit_costs(network: DynamicNetwork) -> Costs:
    """The costs of a network as its pieces were counted."""
    steps = tuple(piece.decision or piece.macs for piece in network.row)
    switchable = frozenset(piece.name for piece in network.leaving if piece.idle(Setting()))
    return Costs(steps, switchable)
