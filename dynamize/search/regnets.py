"""The ladder of spaces from AnyNet to RegNet (Radosavovic et al. 2020, Designing Network Design Spaces, sec. 3)."""

from collections.abc import Sequence
from typing import Any, Literal

from dynamize.errors import DynamizeError, unknown
from dynamize.models.regnet import STAGES, STEM, AnyNet, Stage, quantised_line, snapped
from dynamize.search.spaces import Choice, Knob, Space

Rung = Literal["A", "B", "C", "D", "E"]
_RUNGS = ("A", "B", "C", "D", "E")
_NUMBERS = range(1, STAGES + 1)
_RATIOS = (1, 2, 4)
_GROUPS = (1, 2, 4, 8, 16, 32)


class AnyNetSpace(Space):
    """Networks of four stages: depths to 16, widths to 1024, bottleneck ratios of 1, 2 and 4, groups of 1 to 32.

    Args:
        rung: A: each stage by itself; B: one bottleneck ratio; C: one group width too; D: widths do not fall from stage
            to stage; E: depths do not either (section 3.2).
        most_depth: of a stage.
        most_width: of a stage.
    """

    def __init__(self, rung: Rung = "A", most_depth: int = 16, most_width: int = 1024) -> None:
        if rung not in _RUNGS:
            raise DynamizeError(unknown(str(rung), "rung of the ladder", list(_RUNGS)))
        shared = {"b": rung >= "B", "g": rung >= "C"}
        knobs: dict[str, Knob] = {}
        knobs |= {f"d{k}": Knob(range(1, most_depth + 1), log=True) for k in _NUMBERS}
        knobs |= {f"w{k}": Knob(range(8, most_width + 1, 8), log=True) for k in _NUMBERS}
        for name, values in (("b", _RATIOS), ("g", _GROUPS)):
            knobs |= {key: Knob(values) for key in ([name] if shared[name] else [f"{name}{k}" for k in _NUMBERS])}
        self.rung, self.knobs = rung, knobs
        rising = (("w", "D"), ("d", "E"))
        self.rising = [[f"{name}{k}" for k in _NUMBERS] for name, first in rising if rung >= first]

    def stages(self, choice: Choice) -> list[Stage]:
        """What :class:`AnyNet` is made of, with channels that fit their groups."""
        return [snapped(choice[f"d{k}"], choice[f"w{k}"], _of(choice, "g", k), _of(choice, "b", k)) for k in _NUMBERS]

    def describe(self, choice: Choice) -> str:
        stages = self.stages(choice)
        parts = {
            "depths": _row([stage.depth for stage in stages]),
            "widths": _row([stage.width for stage in stages]),
            "g": _row([stage.group_width for stage in stages]),
            "b": _row([f"{stage.bottleneck:g}" for stage in stages]),
        }
        return "dynamize:anynet," + ",".join(f"{name}={value}" for name, value in parts.items())


class RegNetSpace(Space):
    """Networks of four stages whose widths follow a quantised line, with a bottleneck ratio of 1 (section 3.3)."""

    def __init__(self) -> None:
        self.knobs = {
            "d": Knob(range(STAGES, 65)),
            "w0": Knob(range(8, 257, 8), log=True),
            "wa": Knob([tenths / 10 for tenths in range(80, 2561)], log=True),
            "wm": Knob([hundredths / 100 for hundredths in range(150, 301)], log=True),
            "g": Knob(_GROUPS),
        }

    def allowed(self, choice: Choice) -> bool:
        depths, _ = quantised_line(choice["d"], choice["w0"], choice["wa"], choice["wm"])
        return len(depths) == STAGES

    def stages(self, choice: Choice) -> list[Stage]:
        """What :class:`AnyNet` is made of."""
        depths, widths = quantised_line(choice["d"], choice["w0"], choice["wa"], choice["wm"])
        return [snapped(depth, width, choice["g"]) for depth, width in zip(depths, widths, strict=True)]

    def describe(self, choice: Choice) -> str:
        return "dynamize:regnet," + ",".join(f"{name}={value:g}" for name, value in choice.items())


def network(space: AnyNetSpace | RegNetSpace, choice: Choice, **options: Any) -> AnyNet:
    """What was chosen, with random weights; ``options`` are those of :class:`AnyNet`."""
    return AnyNet(space.stages(choice), **options)


def macs(
    stages: Sequence[Stage], side: int, num_classes: int = 1000, in_channels: int = 3, stem_stride: int = 2
) -> int:
    """Multiply-accumulates of an :class:`AnyNet` without squeeze-and-excitation for an image of ``side`` x ``side``,
    without building it: a population is drawn from thousands."""
    side = -(-side // stem_stride)
    total, channels = 9 * in_channels * STEM * side**2, STEM
    for stage in stages:
        for block in range(stage.depth):
            before, side = side, side if block else -(-side // 2)
            total += channels * stage.inner * before**2
            total += (9 * stage.group_width + stage.width) * stage.inner * side**2
            total += 0 if block else channels * stage.width * side**2
            channels = stage.width
    return total + channels * num_classes


def _of(choice: Choice, name: str, stage: int) -> int:
    value: int = choice[name] if name in choice else choice[f"{name}{stage}"]
    return value


def _row(values: Sequence[object]) -> str:
    return "-".join(map(str, values))
