"""How a plan looks in a terminal."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from dynamize.cli.tables import heading, table
from dynamize.report.cells import ABSENT, count

if TYPE_CHECKING:
    from dynamize.plan import Plan


def planned(plan: "Plan") -> Group:
    """The network and its images, the exits and gates that it will have, and the steps with their minutes."""
    shape = "x".join(map(str, plan.input))
    images = ", ".join(f"{number} {name}" for name, number in plan.images.items())
    parts: list[RenderableType] = [
        Text(f"{plan.source}  {shape}  {count(plan.macs)} MACs", style="bold"),
        Text(f"{plan.classes} classes; images: {images}; as it is, {100 * plan.accuracy:.2f} % of test are right"),
    ]
    if plan.exits:
        made = table(("", "left"), ("after", "left"), ("MACs", "right"), ("head", "right"), ("probe", "right"))
        for one in plan.exits:
            probe = ABSENT if one.probe is None else f"{100 * one.probe:.1f} %"
            made.add_row(*map(Text, [one.name, one.after, f"{one.macs_ratio:.3f}", f"{one.head_ratio:.3f}", probe]))
        parts += [heading([one.kind for one in plan.exits]), made]
        parts.append(Text("MACs to leave and of the head: shares of the network's", style="dim"))
    if plan.gates:
        made = table(("gate", "left"), ("MACs of each path", "left"))
        for gate in plan.gates:
            paths = ", ".join(f"{name} {ratio:.3f}" for name, ratio in zip(gate.options, gate.macs_ratios, strict=True))
            made.add_row(Text(gate.name), Text(paths))
        parts += [Text("\nGates", style="bold"), made]
    if plan.exits or plan.gates:
        parts.append(Text(f"The cheapest path costs {plan.cheapest_ratio:.3f} of the network's MACs."))
    made = table(("step", "right"), ("", "left"), ("minutes", "right"))
    for number, step in enumerate(plan.steps, start=1):
        made.add_row(*map(Text, [str(number), step.transform, _minutes(step.minutes)]))
    made.add_row(Text(""), Text("together"), Text(_minutes(plan.minutes)))
    parts += [Text("\nSteps", style="bold"), made]
    parts += [Text(f"- {note}", style="dim") for step in plan.steps for note in step.notes]
    parts += [Text(f"! {warning}", style="yellow") for warning in plan.warnings]
    return Group(*parts, Text(f"\n{_verdict(plan.warnings)}"))


def _verdict(warnings: list[str]) -> str:
    if not warnings:
        return "Nothing stands in the way of this run."
    return f"It would run, but {'what is' if len(warnings) == 1 else 'all that is'} marked with ! is in question."


def _minutes(minutes: float) -> str:
    return "< 1" if minutes < 1 else f"about {minutes:.0f}"
