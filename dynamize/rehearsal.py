"""A recipe gone through before anything is trained: what the network will look like, and what cannot work."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from dynamize.conversion import apply
from dynamize.errors import InfeasibleError
from dynamize.nn.network import DynamicNetwork
from dynamize.transform import Context, Kind, Transform, parse_step


@dataclass(frozen=True)
class Rehearsed:
    """One step.

    Attributes:
        step: with what could be decided before training, if ``settled``; else as it was given.
        settled: whether it may be applied as it is here, as no step before it changes what it looks at.
        notes: what it said when it was tried.
        seconds: that trying took.
    """

    step: Transform
    settled: bool = False
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def rehearse(
    network: DynamicNetwork, steps: Sequence[Transform], context: Context, first: int = 1
) -> tuple[DynamicNetwork, list[Rehearsed]]:
    """Try the steps that add decisions or change no answer; the others refuse what cannot work.

    Args:
        network: as it stands before the steps, with the weights that they will find; it is consumed.
        first: number of the first step, for messages.

    Returns:
        The network in the structure that it will have, as far as that is known before training, and the steps.

    Raises:
        DynamizeError: a step cannot work, or its budget is below what the cheapest path costs.
    """
    settled = known = True  # the weights, and what each path costs
    found: list[Rehearsed] = []
    for number, step in enumerate(steps, start=first):
        step.check(network, context)
        if known:
            try:
                step.check_budget(network, context)
            except InfeasibleError as error:
                raise InfeasibleError(told(error, number, step, trained=False), error.nearest) from error
        if step.structural and (step.exact or step.kind & (Kind.ADDS_EXITS | Kind.ADDS_GATES)):
            started = time.monotonic()
            network, notes = apply(network, step, context)
            resolved = parse_step(network.history[-1]) if settled else step
            found.append(Rehearsed(resolved, settled, notes, time.monotonic() - started))
            continue
        found.append(Rehearsed(step))
        settled, known = False, known and not step.structural
    return network, found


def told(error: InfeasibleError, number: int, step: Transform, *, trained: bool) -> str:
    """The refusal of a budget, with what to type.

    Args:
        number: of the step, from 1 on.
        trained: whether the steps before it are done and kept.
    """
    text = f"step {number} `{step.pass_name}`: {error}"
    if error.instead is None:
        return text
    option = f"--set steps.{number - 1}.{error.instead[0]}={error.instead[1]}"
    if trained:
        return f"{text} What was trained is kept: the same command with --resume {option} goes on from there."
    return f"{text} Nothing was trained yet; {option} asks for that."
