"""`glance_focus`: a glance at the whole image, then crops of it where the glance says, then the whole image."""

import copy
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from torch import fx

from dynamize.errors import DynamizeError
from dynamize.graph.evidence import LastMap, last_map
from dynamize.graph.macs import annotated_macs
from dynamize.graph.nodes import output_value, placeholder
from dynamize.nn.cascade import Answer, MemberConfidence, Restart, Verdict
from dynamize.nn.joining import Joining, joinings
from dynamize.nn.looking import Anywhere, Crop, LearntLook, Look, Policy
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Piece
from dynamize.nn.proposal import Proposal
from dynamize.nn.where import ClassMap, Occlusion, Peaks, Share
from dynamize.preprocessing import Steps
from dynamize.rewrite.preprocessed import preprocessed
from dynamize.transform import Applied, Context, Kind, Transform, comes_first

GLANCE = "glance"
_ROUND = 16  # pixels that a glance is a multiple of, by default

Size = tuple[int, int]


class GlanceFocus(Transform):
    """Look at the whole image in low resolution, then at crops of it in full, and answer as soon as one is sure (Wang
    et al. 2020, GFNet, sec. 3); images that no crop made sure go through the network as it was.

    No training is needed: crops are where the glance's class activation map has its peaks (Zhou et al. 2016), or, in a
    network that has none, where its last feature map is missed most when it is left out; and `calibrate` solves the
    thresholds, chooses who is asked, and how answers are joined. With all of them off the network answers as before. A
    `distill` step behind trains all looks together; the network itself only if it says ``member: main``.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dyn = dz.convert(net, [dz.GlanceFocus(glance=6, crops=1)], (1, 8, 8))
        >>> dyn.members
        ['glance', 'focus-1']
    """

    pass_name: Literal["glance_focus"] = Field("glance_focus", alias="pass")
    glance: Literal["auto"] | PositiveInt = Field(
        "auto", description="shorter side of the whole image as the glance sees it, in pixels; auto: about half"
    )
    crops: Annotated[int, Field(ge=0, le=8)] = Field(1, description="how many crops are looked at, one after the other")
    crop: Annotated[float, Field(gt=0, lt=1)] = Field(0.7, description="share of each side of the image in a crop")
    size: Literal["auto"] | PositiveInt = Field(
        "auto", description="shorter side of a crop as its network sees it, in pixels; auto: that of the glance"
    )
    policy: Policy = Field(
        "activation",
        description="where crops are: activation: at the peaks of the surest classes; learned: starts there and is "
        "trained by `distill`; centre and random are controls",
    )
    confidence: MemberConfidence = Field(
        "top_probability",
        description="what the thresholds are compared with; agreement: 1 where all answers so far are alike",
    )
    combine: Literal["auto"] | Joining = Field(
        "auto",
        description="the answer after several looks: the last one's, or the mean or the product of their "
        "probabilities; auto: what `calibrate` finds best on calibration images",
    )

    whole: ClassVar[bool] = True
    once: ClassVar[bool] = True
    kind: ClassVar[Kind] = Kind.ADDS_EXITS

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        comes_first(self, network)
        given: Size = (network.input_shape[1], network.input_shape[2])
        resolved = self._decided(min(given))
        assert resolved.glance != "auto"
        assert resolved.size != "auto"
        side = scaled(given, round(self.crop * min(given)))
        nets = {GLANCE: _seeing(network, given, scaled(given, resolved.glance))}
        for number in range(1, self.crops + 1):
            nets[f"focus-{number}"] = _seeing(network, side, scaled(given, resolved.size))
        policy = self._policy(nets[GLANCE], (side[0] / given[0], side[1] / given[1])) if self.crops else {}
        pieces: dict[str, Piece] = {}
        for number, (name, net) in enumerate(nets.items()):
            if number:
                pieces[f"{name}/{placeholder(net.graph).name}"] = Crop(number - 1, side)
            needs = GLANCE if number and policy else None
            pieces[f"{name}/{output_value(net.graph).name}"] = Answer(self.confidence, needs)
        own = network.plain.graph
        network.insert({**pieces, placeholder(own).name: Restart(), output_value(own).name: Verdict()}, nets)
        if policy:
            network.insert(policy)
        network.made = network.resized = (tuple(nets),)
        network.combining = joinings(self.combine)
        return Applied(network, resolved, [_cost_note(nets, network)])

    def _decided(self, side: int) -> "GlanceFocus":
        glance = self.glance
        if glance == "auto":
            glance = max(_ROUND, _ROUND * round(side / 2 / _ROUND)) if side > 2 * _ROUND else max(1, round(0.75 * side))
        assert isinstance(glance, int)
        if glance > side:
            raise DynamizeError(f"glance_focus: glance: {glance} is larger than the {side} pixels of the images")
        size = glance if self.size == "auto" else self.size
        assert isinstance(size, int)
        if size > side:
            raise DynamizeError(f"glance_focus: size: {size} is larger than the {side} pixels of the images")
        return self.model_copy(update={"glance": glance, "size": size})

    def _policy(self, glance: fx.GraphModule, share: tuple[float, float]) -> dict[str, Piece]:
        """The pieces that say where crops are, by the place that they stand at; none for the middle."""
        end = f"{GLANCE}/{output_value(glance.graph).name}"
        if self.policy == "centre":
            return {}
        if self.policy == "random":
            return {end: Anywhere(self.crops)}
        found = last_map(glance)
        if found is None:
            raise DynamizeError(
                f"glance_focus: policy: {self.policy} reads a feature map of several pixels, through which the whole "
                "answer comes, and there is none; the glance may be too small for it: give a larger `glance`, or "
                "policy: centre"
            )
        return {f"{GLANCE}/{found.node}": self._look(found, share)}

    def _look(self, found: LastMap, share: Share) -> Look:
        by_weights = ClassMap(found.shape[1:]) if found.means else None
        if self.policy == "learned":
            torch.manual_seed(0)
            return LearntLook(Proposal(found.shape, self.crops, share, by_weights))
        evidence = by_weights or Occlusion(found.shape, share)
        return Look(evidence, Peaks(evidence.grid, self.crops, share))


def scaled(size: Size, shorter: int) -> Size:
    """A size of the same shape with this shorter side."""
    least = min(size)
    return max(1, round(size[0] * shorter / least)), max(1, round(size[1] * shorter / least))


def _seeing(network: DynamicNetwork, given: Size, size: Size) -> fx.GraphModule:
    """A copy of the network for images of a size ``given``, which it sees in another one."""
    channels = network.input_shape[0]
    try:
        return preprocessed(
            copy.deepcopy(network.plain), (channels, *given), None if given == size else Steps(size=size)
        )
    except DynamizeError as error:
        raise DynamizeError(f"glance_focus: on images of {size[0]} x {size[1]}: {error}") from error


def _cost_note(nets: dict[str, fx.GraphModule], network: DynamicNetwork) -> str:
    own = annotated_macs(network.plain)
    costs = {name: annotated_macs(net) for name, net in nets.items()}
    if looking := sum(piece.macs for piece in network.row if piece.waits):
        costs["saying where to look"] = looking
    return "before the whole image: " + ", ".join(
        f"{name} ({macs / own:.{0 if macs > 0.01 * own else 1}%} of its MACs)" for name, macs in costs.items()
    )
