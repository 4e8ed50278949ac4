"""What `dynamize inspect` shows: a network's structure, cost and possible gates; an artifact's exits and gates."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from dynamize import artifact
from dynamize.calibration.points import OperatingPoints
from dynamize.graph.gateable import GateableBlock, gateable_blocks
from dynamize.graph.trace import trace
from dynamize.graph.tree import NetworkTree, network_tree
from dynamize.measure.costs import exit_costs
from dynamize.nn.channels import ChannelUnit
from dynamize.nn.gated import Unit
from dynamize.nn.widths import path_widths
from dynamize.sources import SourceSpec, build, load_source

_USUAL_SIZES = {"cifar_": 32, "digits": 8, "inception": 299}
_USUAL_SIZE = 224


@dataclass(frozen=True)
class Exit:
    """An exit of an artifact: where it is, what its head and leaving there cost in MACs per image.

    ``threshold`` is the score from which an image leaves; None for an exit that is off and for the last.
    """

    after: str | None
    head_macs: float
    macs: float
    threshold: float | None


@dataclass(frozen=True)
class UnitPath:
    """One way through a gated unit: the share of its channels that it computes (0: skipped), and MACs per image."""

    width: float
    macs: float


@dataclass(frozen=True)
class GatedUnit:
    """A gated unit of an artifact: from which cut point to which, the cheapest path first; MACs per image."""

    label: str
    kind: Literal["skip", "channels"]
    after: str
    upto: str
    paths: tuple[UnitPath, ...]
    gate_macs: float


@dataclass(frozen=True)
class Inspection:
    """A network, and what was made of it. The tree is that of the original network, with the gates that it can take;
    ``units`` are the gates that an artifact has."""

    source: str
    tree: NetworkTree
    gates: list[GateableBlock] = field(default_factory=list)
    units: list[GatedUnit] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    operating_points: OperatingPoints | None = None
    operating_point: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        tree = {"input": list(self.tree.input_shape), "macs": self.tree.macs, "params": self.tree.params}
        stages = [
            {
                "shape": list(stage.shape),
                "macs": stage.macs,
                "params": stage.params,
                "blocks": [{**asdict(block), "shape": list(block.shape)} for block in stage.blocks],
            }
            for stage in self.tree.stages
        ]
        points = [] if self.operating_points is None else self.operating_points.model_dump(mode="json")
        return {
            "source": self.source,
            **tree,
            "stages": stages,
            "gates": [_gate(block) for block in self.gates],
            "units": [asdict(unit) for unit in self.units],
            "exits": [asdict(one) for one in self.exits],
            "history": self.history,
            "operating_points": points,
            "operating_point": self.operating_point,
        }


def inspect_source(spec: SourceSpec, input_shape: Sequence[int] | None = None) -> Inspection:
    """Read a network, whose code is trusted, for images of (C, H, W); the usual shape where none is given."""
    network = load_source(spec, trust_code=True)
    shape = tuple(input_shape or usual_input(spec, network))
    traced = trace(network, shape)
    return Inspection(spec.source, network_tree(traced, shape), gateable_blocks(traced))


def inspect_artifact(path: Path, *, trust_code: bool = False) -> Inspection:
    """Read an artifact: the original network's structure, and the exits and gates as they stand."""
    manifest = artifact.read_manifest(path)
    converted = artifact.load(path, trust_code=trust_code)
    assert manifest.source is not None  # load refuses an artifact without one
    traced = trace(build(manifest.source, trust_code=trust_code), manifest.input)
    costs = exit_costs(converted)
    after = [*_places(manifest.history), None]
    leaving = costs.cumulative(converted.thresholds)
    exits = [
        Exit(after[k], float(costs.heads[k]), float(leaving[k]), [*converted.thresholds, None][k])
        for k in range(converted.exit_count)
    ]
    point = manifest.operating_point
    return Inspection(
        source=manifest.source.source,
        tree=network_tree(traced, manifest.input),
        units=[_unit(unit) for unit in converted.units],
        exits=exits,
        history=manifest.history,
        operating_points=manifest.operating_points,
        operating_point=point.name if point else None,
    )


def usual_input(spec: SourceSpec, network: nn.Module) -> tuple[int, int, int]:
    """The (C, H, W) that networks of this name are trained on; the channels are those of its first convolution."""
    configured = getattr(network, "pretrained_cfg", None) or {}  # timm
    if "input_size" in configured:
        channels, height, width = configured["input_size"]
    else:
        name = spec.target[1]
        channels = 3
        height = width = next((size for part, size in _USUAL_SIZES.items() if part in name), _USUAL_SIZE)
    first = next((one for one in network.modules() if isinstance(one, nn.Conv2d)), None)
    return (first.in_channels if first else channels), height, width


def _gate(block: GateableBlock) -> dict[str, Any]:
    chains = [{"name": one.name, "channels": one.channels, "macs": one.macs} for one in block.chains]
    return {**asdict(block), "chains": chains}


def _unit(unit: Unit) -> GatedUnit:
    paths = [UnitPath(width, macs) for width, macs in zip(path_widths(unit), unit.path_macs, strict=True)]
    kind: Literal["skip", "channels"] = "channels" if isinstance(unit, ChannelUnit) else "skip"
    return GatedUnit(unit.label, kind, *unit.region, tuple(paths), unit.gate_macs)


def _places(history: Sequence[dict[str, Any]]) -> list[str]:
    return [name for step in history if step.get("pass") == "exits" for name in step["at"]]
