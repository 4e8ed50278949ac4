"""How wide each path of a gated unit is, for people and charts."""

from dynamize.nn.channels import ChannelUnit
from dynamize.nn.gated import Unit


def path_widths(unit: Unit) -> list[float]:
    """Share of the unit's channels that each path computes: 0 where it is skipped, 1 on the original path."""
    if not isinstance(unit, ChannelUnit):
        return [0.0, 1.0]
    totals = [sum(channels) for channels in zip(*unit.widths.values(), strict=True)]
    return [total / totals[-1] for total in totals]
