"""How strongly to compress so that a target is met: bisection on one knob."""

from collections.abc import Callable, Hashable
from typing import TypeVar

from dynamize.errors import InfeasibleError

P = TypeVar("P", bound=Hashable)


def least(
    step: str, figure: str, target: float, plan_at: Callable[[float], P], measure: Callable[[P], float], rounds: int
) -> P:
    """The plan of the smallest knob, 0 to 1, whose figure is no more than ``target``; arguments as for
    :func:`bracket`."""
    return bracket(step, figure, target, plan_at, measure, rounds)[1]


def bracket(
    step: str, figure: str, target: float, plan_at: Callable[[float], P], measure: Callable[[P], float], rounds: int
) -> tuple[P, P]:
    """The plan of the largest knob that misses ``target`` and that of the smallest that meets it; where all meet it,
    the plan at 0 twice.

    Args:
        step: name of the transform, for the error.
        figure: name of what is measured, for the error.
        target: largest figure that is allowed.
        plan_at: knob -> plan; more of it compresses more.
        measure: plan -> figure; called once for each plan.
        rounds: of bisection.

    Raises:
        InfeasibleError: not even the knob at 1 reaches the target.
    """
    known: dict[P, float] = {}

    def reaches(plan: P) -> bool:
        if plan not in known:
            known[plan] = measure(plan)
        return known[plan] <= target

    low, high = 0.0, 1.0
    if not reaches(plan_at(high)):
        nearest = known[plan_at(high)]
        raise InfeasibleError(
            f"{step}: {figure} {target:g} cannot be reached: the least possible is {nearest:.3f}. Ask for more than "
            "that, or leave fewer layers whole.",
            nearest,
        )
    if reaches(plan_at(low)):
        return plan_at(low), plan_at(low)
    for _ in range(rounds):
        middle = (low + high) / 2
        if reaches(plan_at(middle)):
            high = middle
        else:
            low = middle
    return plan_at(low), plan_at(high)
