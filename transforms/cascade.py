"""`cascade`: networks in a row, the cheapest first; each answers the images that it is sure of."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from dynamize.arguments import given_network, trained_network
from dynamize.calibration.intervals import guessed
from dynamize.compression.layers import resize
from dynamize.compression.shrink import blocks_to_leave_out, leave_out
from dynamize.errors import DynamizeError
from dynamize.graph.given import own_copy, unwrapped
from dynamize.graph.macs import annotated_macs
from dynamize.graph.nodes import output_value, placeholder
from dynamize.measure.accuracy import everything
from dynamize.measure.latency import interleave
from dynamize.member import Member, names_of
from dynamize.nn.cascade import Answer, MemberConfidence, Restart, Verdict
from dynamize.nn.joining import Joining, joinings
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import MAIN, Piece
from dynamize.nn.reuse import carried
from dynamize.preprocessing import of_images, published, steps_between
from dynamize.rewrite.exchange import count_again
from dynamize.rewrite.preprocessed import preprocessed
from dynamize.rewrite.reused import meeting_points, reuse
from dynamize.runtime.compiled import compile_network
from dynamize.sources import load_source
from dynamize.transform import Applied, Context, Kind, Transform, comes_first
from dynamize.transforms.prune import Prune

_ENOUGH = 0.9  # of the MACs asked for: nearer than that leaving out blocks alone is near enough
_SECONDS = 2.0  # how long copies are timed against each other


class Cascade(Transform):
    """Put trained networks in front of the recipe's own: each answers the images that it is sure of (Wang et al. 2020,
    Wisdom of Committees; Lebovitz et al. 2023, Efficient Inference With Model Cascades).

    No training is needed. Each network keeps its own size, crop and normalisation, which are part of its graph. Steps
    behind mean one network with ``member``, and `calibrate`, `quantize` and `fold_batchnorm` all of them; `recalibrate`
    means those with a ``resolution``.

    With ``reuse`` the passes over the images at one resolution after the other share what they see (Yang et al. 2020,
    RANet): projections, which start at zero, add feature maps of each to the next. They always run, and a `distill`
    step behind trains them and the recipe's own network together.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> small = {"source": "dynamize:digits_resnet_small,pretrained=true"}
        >>> dyn = dz.convert(net, [dz.Cascade(first=[small])], (1, 8, 8))
        >>> dyn.members
        ['digits_resnet_small']
    """

    pass_name: Literal["cascade"] = Field("cascade", alias="pass")
    first: Annotated[list[Member], Field(min_length=1)] = Field(
        description="the networks in front, the cheapest first; the recipe's own comes last"
    )
    confidence: MemberConfidence = Field(
        "top_probability",
        description="what the thresholds are compared with; agreement: 1 where all networks so far answer alike",
    )
    combine: Literal["auto"] | Joining = Field(
        "auto",
        description="the answer of an image that has been through several networks: the last one's, or the mean or the "
        "product of their probabilities; auto: what `calibrate` finds best on calibration images",
    )
    reuse: bool | Annotated[list[str], Field(min_length=1)] = Field(
        False,
        description="let each network with a `resolution`, and the recipe's own, go on with the feature maps of the "
        "one before it: at these cut points of the recipe's network; true: at the ends of the last two resolutions at "
        "which it computes a tenth of its MACs or more",
    )

    whole: ClassVar[bool] = True
    once: ClassVar[bool] = True
    added: ClassVar[tuple[str, ...]] = (*Transform.added, "reuse")
    kind: ClassVar[Kind] = Kind.ADDS_EXITS

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        comes_first(self, network)
        names = names_of(self.first, [one.name for one in network.decisions()])
        named = [one.model_copy(update={"name": name}) for one, name in zip(self.first, names, strict=True)]
        built = [build(member, network, context) for member in named]
        nets = {name: net for name, (_, net) in zip(names, built, strict=True)}
        resolved = self.model_copy(update={"first": [member for member, _ in built]})
        _check_row(nets, network)
        resized = tuple(member.called() for member in named if member.resolution is not None)
        places = self._places(network, resolved.first) if self.reuse else []
        _link(network, nets, self.confidence, resized, len(places))
        untrained = [member.called() for member in named if member.shrink is not None]
        network.made, network.resized = tuple((name,) for name in untrained), tuple((name,) for name in resized)
        network.combining = joinings(self.combine)
        notes = [_cost_note(nets, network)]
        if places:
            notes.append(_share(network, resized, places))
            resolved = resolved.model_copy(update={"reuse": places})
        return Applied(network, resolved, [*notes, *_accuracy_notes(network, untrained, context)])

    def _places(self, network: DynamicNetwork, first: Sequence[Member]) -> list[str]:
        """The cut points at which feature maps are handed on."""
        resized = [member for member in first if member.resolution is not None]
        if not resized:
            raise DynamizeError(
                "cascade: reuse: no network of `first` is the recipe's own on smaller images: give it one with "
                "`resolution`, or leave reuse out"
            )
        for member in resized:
            if member.preprocess is not None and member.preprocess != "auto" and member.preprocess.share < 1:
                raise DynamizeError(
                    f"cascade: reuse: {member.called()} sees the middle of the images only, so that its feature maps "
                    "lie elsewhere than those of the others: leave out its `crop`"
                )
        return meeting_points(network, None if self.reuse is True else cast(list[str], self.reuse))


def build(member: Member, network: DynamicNetwork, context: Context) -> tuple[Member, fx.GraphModule]:
    """The network of a member, traced, and the member with everything decided."""
    if member.shrink is not None:
        return _shrunk(member, network, context)
    if member.source is None and member.resolution is None:
        net = _from_python(member, context)
    else:
        _check_resolution(member, network)
        named = member.source is not None
        net = load_source(member.spec(), context.trust_code) if named else copy.deepcopy(network.plain)
    member = _decide_steps(member, net, network, context)
    traced = _with_preprocessing(net, member, network)
    kept = None if member.source is None else member.spec().structure()
    origin = {} if kept is None else {"source": kept.source, "kwargs": kept.kwargs, "checkpoint": None}
    return member.model_copy(update=origin), traced


def _check_resolution(member: Member, network: DynamicNetwork) -> None:
    """Before the network runs on images that may not fit into memory."""
    _, height, width = network.input_shape
    if member.resolution is not None and member.resolution**2 > height * width:
        raise DynamizeError(
            f"cascade: resolution: {member.resolution} is larger than the {height} x {width} of the recipe's images, "
            "and that network would cost more than the recipe's own: give a smaller one"
        )


def _from_python(member: Member, context: Context) -> nn.Module:
    name = member.called()
    if name not in context.members:
        known = ", ".join(context.members) or "none"
        raise DynamizeError(
            f"cascade: '{name}' names neither source, resolution nor shrink, and no network of that name was passed: "
            f"give members={{'{name}': network}} to dz.run_steps, dz.Context or dz.load. Passed: {known}."
        )
    net = trained_network(unwrapped(given_network(context.members[name], f"cascade: {name}")), f"cascade: {name}")
    return own_copy(net).eval()


def _decide_steps(member: Member, net: nn.Module, network: DynamicNetwork, context: Context) -> Member:
    if member.preprocess != "auto":
        return member
    _, height, width = network.input_shape
    given = of_images(context.data.spec if context.data is not None else None, (height, width))
    known = None if member.source is None else published(member.spec(), net)
    wanted = given if known is None else known
    if (size := member.size or member.resolution) is not None:
        wanted = wanted.model_copy(update={"size": (size, size)})
    if member.crop is not None:
        wanted = wanted.model_copy(update={"crop": member.crop})
    if member.normalize is not None:
        if given.normalize is None:
            raise DynamizeError(
                f"cascade: {member.called()} is given a normalisation, but that of the images is not known: say "
                "`normalize` under data, or leave both out if they are the same"
            )
        if (many := len(member.normalize[0])) != (channels := len(given.normalize[0])):
            raise DynamizeError(
                f"cascade: {member.called()}: normalize has {many} channels and the images {channels}; give {channels} "
                "means and deviations"
            )
        wanted = wanted.model_copy(update={"normalize": member.normalize})
    return member.model_copy(update={"preprocess": steps_between(given, wanted)})


def _with_preprocessing(net: nn.Module, member: Member, network: DynamicNetwork) -> fx.GraphModule:
    """A member's graph, which takes the images of the recipe's network."""
    assert member.preprocess != "auto"
    try:
        return preprocessed(net, network.input_shape, member.preprocess)
    except DynamizeError as error:
        raise DynamizeError(f"cascade: {member.called()}: {error}") from error


def _shrunk(member: Member, network: DynamicNetwork, context: Context) -> tuple[Member, fx.GraphModule]:
    """A smaller copy of the recipe's network: of those with fewer blocks, narrower layers and both, the fastest."""
    if member.widths is not None:
        small = _smaller(member, network)
        resize(small, member.widths)
        count_again(small)
        return member, small.plain
    share = member.shrink or 0.0
    fewer = blocks_to_leave_out(network.plain, share)
    found: dict[str, tuple[Member, DynamicNetwork]] = {}
    for left_out in (fewer, fewer[: len(fewer) // 2], []):
        trial = member.model_copy(update={"leave_out": left_out, "preprocess": None})
        small = _smaller(trial, network)
        more = share * annotated_macs(network.plain) / annotated_macs(small.plain)
        widths: dict[str, list[int]] = {}
        if more < _ENOUGH:
            try:
                applied = Prune(macs_ratio=more).apply(small, replace(context, work=None))
            except DynamizeError:
                continue  # this narrow it does not get: another mixture may do
            small, widths = applied.network, getattr(applied.resolved, "widths", None) or {}
        found[f"{len(left_out)} blocks fewer"] = trial.model_copy(update={"widths": widths}), small
    if not found:
        raise DynamizeError(
            f"cascade: shrink: {share:g}, but neither leaving out blocks nor narrower layers bring the network there: "
            "ask for a larger share, or give a smaller network with its checkpoint"
        )
    chosen, small = found[_fastest({name: one for name, (_, one) in found.items()}, context)]
    return chosen, small.plain


def _smaller(member: Member, network: DynamicNetwork) -> DynamicNetwork:
    """A copy of the recipe's network without some blocks."""
    plain = copy.deepcopy(network.plain)
    leave_out(plain, member.leave_out or [], network.input_shape)
    return DynamicNetwork(plain, input_shape=network.input_shape).eval()


def _fastest(networks: Mapping[str, DynamicNetwork], context: Context) -> str:
    if len(networks) == 1:
        return next(iter(networks))
    channels_height_width = next(iter(networks.values())).input_shape
    compiled = {name: compile_network(one, context.backend, context.device) for name, one in networks.items()}
    image = torch.randn(1, *channels_height_width, generator=torch.Generator().manual_seed(0)).to(context.device)
    times = interleave(compiled, [image], context.device, _SECONDS)
    return min(compiled, key=times.median_ms)


def _check_row(nets: Mapping[str, fx.GraphModule], network: DynamicNetwork) -> None:
    """Refuse networks of other classes, and an order that cannot save work."""
    every = {**nets, MAIN: network.plain}
    classes = {name: int(output_value(net.graph).meta["shape"][1]) for name, net in every.items()}
    if len(set(classes.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in classes.items())
        raise DynamizeError(
            f"cascade: the networks tell different numbers of classes apart: {counts}. All need the same classes in "
            "the same order: give checkpoints that were trained on the same images"
        )
    costs = {name: annotated_macs(net) for name, net in every.items()}
    if list(costs.values()) != sorted(costs.values()):
        listed = ", ".join(f"{name} {cost / 1e6:.1f} M" for name, cost in costs.items())
        raise DynamizeError(
            f"cascade: the networks are not in the order of their costs, the cheapest first and the recipe's own last "
            f"(MACs per image: {listed}): order `first` so, and let the dearest be the recipe's own"
        )


def _link(
    network: DynamicNetwork,
    nets: Mapping[str, fx.GraphModule],
    confidence: MemberConfidence,
    resized: Sequence[str],
    points: int,
) -> None:
    """Put the networks in front, with a place to leave behind each and a way back to the images before the next.

    Args:
        resized: those that hand on feature maps.
        points: at how many points they do.
    """
    carries = [carried(number) for number in range(1, points + 1)]
    pieces: dict[str, Piece] = {}
    for k, (name, net) in enumerate(nets.items()):
        if k:
            pieces[f"{name}/{placeholder(net.graph).name}"] = Restart(carries)
        pieces[f"{name}/{output_value(net.graph).name}"] = Answer(confidence, chained=points > 0 and name in resized)
    own = network.plain.graph
    network.insert({**pieces, placeholder(own).name: Restart(carries), output_value(own).name: Verdict()}, nets)


def _share(network: DynamicNetwork, resized: tuple[str, ...], places: Sequence[str]) -> str:
    """Let the network at several resolutions go on with what it has seen; what that takes, in words."""
    together = (*resized, MAIN)
    share = reuse(network, together, places) / annotated_macs(network.plain)
    network.made, network.resized = (*network.made, together), (resized,)
    return (
        f"feature maps at {', '.join(places)} go from each of {', '.join(together)} to the next, for {share:.1%} of "
        f"the network's MACs; {', '.join(resized)} always run"
    )


def _cost_note(nets: Mapping[str, fx.GraphModule], network: DynamicNetwork) -> str:
    own = annotated_macs(network.plain)
    listed = ", ".join(f"{name} ({annotated_macs(net) / own:.0%} of its MACs)" for name, net in nets.items())
    return f"in front of the network: {listed}"


def _accuracy_notes(network: DynamicNetwork, untrained: Sequence[str], context: Context) -> list[str]:
    """What each network answers by itself, and which one seems to speak of other classes."""
    if context.data is None:
        return []
    images = context.data.calibration
    seen = everything(network, images, context.device)
    names = [piece.name for piece in network.leaving]
    labels = seen.labels
    right = {name: logits.argmax(1) == labels for name, logits in zip([*names, MAIN], seen.logits, strict=True)}
    found = ", ".join(f"{name} {one.double().mean():.1%}" for name, one in right.items())
    notes = [f"alone on the calibration images: {found}"]
    if untrained:
        notes.append(f"not trained yet, until a `distill` step behind does it: {', '.join(untrained)}")
    if guessed(right[MAIN], labels) is None:
        trained = [name for name in network.members if name not in untrained]
        notes += [note for name in trained for note in chance_notes(name, right[name], labels, "calibration")]
    return notes


def chance_notes(name: str, right: Tensor, labels: Tensor, split: str) -> list[str]:
    """What to say of a network that is ``right`` (n,) no oftener than by guessing, where another one does better."""
    if guessed(right, labels) is None:
        return []
    return [
        f"{name} is right on {100 * right.double().mean():.1f} % of the {split} images, as by chance: its classes have "
        "another order, its images another normalisation, or its checkpoint is missing"
    ]
