"""A recipe gone through before anything is trained: what the network will look like, and what cannot work."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from dynamize.conversion import alone, apply
from dynamize.errors import InfeasibleError
from dynamize.nn.network import DynamicNetwork
from dynamize.transform import Context, Kind, Transform


@dataclass(frozen=True)
class Rehearsed:
    """One step.

    Attributes:
        step: as it was given.
        network: what it made, to go on with; None where steps before it change what it looks at.
        notes: what it said when it was tried.
        seconds: that trying took.
    """

    step: Transform
    network: DynamicNetwork | None = None
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
        for one in alone(network, step):
            step.check(one, context)
            if known:
                try:
                    step.check_budget(one, context)
                except InfeasibleError as error:
                    raise InfeasibleError(told(error, number, step, trained=False), error.nearest) from error
        if step.structural and (step.exact or step.kind & (Kind.ADDS_EXITS | Kind.ADDS_GATES)):
            started = time.monotonic()
            network, notes = apply(network, step, context)
            made = copy.deepcopy(network) if settled else None
            found.append(Rehearsed(step, made, notes, time.monotonic() - started))
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
    field, value = error.instead
    option = f"--set steps.{number - 1}.{field}={value}"
    if trained:
        return (
            f"{text} What was trained is kept: the same command with --resume {option} goes on from there "
            f"(in Python: resume=True and {field}={value})."
        )
    return f"{text} Nothing was trained yet; {option} asks for that (in Python: {field}={value})."
