"""What `dynamize inspect` shows: a network's structure, cost and possible gates; an artifact's decisions."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dynamize import artifact
from dynamize.calibration.operating import OperatingPoints
from dynamize.graph.gateable import GateableBlock, gateable_blocks
from dynamize.graph.trace import trace
from dynamize.graph.tree import NetworkTree, network_tree
from dynamize.inputs import usual_input
from dynamize.measure.costs import exit_costs
from dynamize.measure.counters import Count, Counts, count_three_ways
from dynamize.nn.piece import Decision, Effect, Piece, Setting
from dynamize.sources import SourceSpec, build, load_source


@dataclass(frozen=True)
class OptionFacts:
    """An option of a decision, and what it costs in MACs per image."""

    label: str
    macs: float


@dataclass(frozen=True)
class DecisionFacts:
    """A decision of an artifact: from which node of the original network to which, the cheapest option first.

    ``always`` is what deciding costs, in MACs per image. Where images leave, ``macs_to_leave`` is what an image has
    cost that leaves there, with the dearest options taken before, and ``threshold`` the score from which it does; None
    for one that is off. Both are None elsewhere.
    """

    name: str
    kind: str
    effect: Effect
    after: str
    upto: str
    options: tuple[OptionFacts, ...]
    always: float
    macs_to_leave: float | None = None
    threshold: float | None = None


@dataclass(frozen=True)
class Inspection:
    """A network, and what was made of it. The tree is that of the original network, with the gates that it can take;
    ``counts`` are what three libraries count in it; ``decisions`` are those that an artifact takes, and ``macs_to_end``
    what an image costs that never leaves before."""

    source: str
    tree: NetworkTree
    counts: Counts
    gates: list[GateableBlock] = field(default_factory=list)
    decisions: list[DecisionFacts] = field(default_factory=list)
    macs_to_end: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    operating_points: OperatingPoints | None = None
    operating_point: str | None = None

    def to_dict(self, operators: bool = False) -> dict[str, Any]:
        """The same as plain data; with ``operators`` also each count by module and by kind of operator."""
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
            "decisions": [asdict(one) for one in self.decisions],
            "macs_to_end": self.macs_to_end,
            "counters": [_count(self.counts, one, operators) for one in self.counts.every],
            "disagreements": self.counts.disagreements(),
            "history": self.history,
            "operating_points": points,
            "operating_point": self.operating_point,
        }


def inspect_source(
    spec: SourceSpec, input_shape: Sequence[int] | None = None, *, trust_code: bool | None = None
) -> Inspection:
    """Read a network for images of (C, H, W); the usual shape where none is given.

    Args:
        trust_code: True runs the code that the source and the checkpoint name, None that of the source only.
    """
    network = load_source(spec, trust_code)
    shape = tuple(input_shape or usual_input(spec, network))
    traced = trace(network, shape)
    counts = count_three_ways(network, shape)
    return Inspection(spec.source, network_tree(traced, shape), counts, gateable_blocks(traced))


def inspect_artifact(path: Path, *, trust_code: bool = False) -> Inspection:
    """Read an artifact: the original network's structure, and the decisions as they stand."""
    manifest = artifact.read_manifest(path)
    converted = artifact.load(path, trust_code=trust_code)
    assert manifest.source is not None  # load refuses an artifact without one
    original = build(manifest.source, trust_code=trust_code)
    traced = trace(original, manifest.input)
    *to_leave, to_end = map(float, exit_costs(converted).cumulative(converted.setting))
    macs = dict(zip(converted.decision_names[0], to_leave, strict=True))
    point = manifest.operating_point
    return Inspection(
        source=manifest.source.source,
        tree=network_tree(traced, manifest.input),
        counts=count_three_ways(original, manifest.input),
        decisions=[
            _facts(piece, piece.decision, macs.get(piece.name), converted.setting)
            for piece in converted.row
            if piece.decision is not None
        ],
        macs_to_end=to_end,
        history=manifest.history,
        operating_points=manifest.operating_points,
        operating_point=point.name if point else None,
    )


def _count(counts: Counts, one: Count, operators: bool) -> dict[str, Any]:
    totals = {"counter": one.counter, "macs": one.total, "difference": counts.difference(one), "failure": one.failure}
    if one.failure:
        totals |= {"macs": None, "difference": None}
    return totals | {"modules": one.modules, "unsupported": one.unsupported} if operators else totals


def _gate(block: GateableBlock) -> dict[str, Any]:
    chains = [{"name": one.name, "channels": one.channels, "macs": one.macs} for one in block.chains]
    return {**asdict(block), "chains": chains}


def _facts(piece: Piece, decision: Decision, macs_to_leave: float | None, setting: Setting) -> DecisionFacts:
    return DecisionFacts(
        name=decision.name,
        kind=decision.kind,
        effect=decision.effect,
        after=piece.place[0],
        upto=piece.place[1],
        options=tuple(map(OptionFacts, decision.options, decision.macs)),
        always=decision.always,
        macs_to_leave=macs_to_leave,
        threshold=setting.thresholds.get(decision.name),
    )
