"""`fuse_branches`: parallel linear branches become one convolution each."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import nn

from dynamize.errors import DynamizeError, closest
from dynamize.graph.macs import annotated_macs
from dynamize.graph.nodes import positions
from dynamize.graph.parallel import ParallelBranches, fuse, parallel_branches
from dynamize.graph.replace import check_same, every_module
from dynamize.graph.trace import annotate
from dynamize.nn.branches import BranchBlock
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.row import spans
from dynamize.rewrite.exchange import check_answers, count_again, exit_answers, module_names, replace_layers
from dynamize.transform import Applied, Context, Kind, Transform

_PIXELS = 8  # times the stride, added to the reach of a kernel: side of the map on which a block is compared


class FuseBranches(Transform):
    """Fuse the blocks of `expand_branches`, and parallel branches that the network came with (RepVGG, MobileOne).

    Computed in float64 and compared with what it replaces; answers stay the same up to rounding, 1e-5 of the largest at
    most. Branches of the network's own are found as sums of convolutions, batch norms, average pools and identities of
    one feature map; one convolution for them may not cost more than they do.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> steps = [dz.ExpandBranches(), dz.FuseBranches()]  # train between them
        >>> dyn = dz.convert(net, steps, (1, 8, 8))
        >>> sum(p.numel() for p in dyn.parameters()) <= sum(p.numel() for p in net.parameters())
        True
    """

    pass_name: Literal["fuse_branches"] = Field("fuse_branches", alias="pass")
    sums: Literal["auto"] | list[str] = Field(
        "auto", description="node names of sums in the original network to fuse too; auto: all that can be"
    )

    exact: ClassVar[bool] = False  # rounding
    kind: ClassVar[Kind] = Kind.FUSES_BRANCHES
    not_after: ClassVar[Kind] = Kind.RESHAPES_LAYERS

    def apply(self, network: DynamicNetwork, context: Context) -> Applied:
        annotate(network.plain, network.input_shape)
        wanted, before = exit_answers(network), _cost(network)
        blocks = [module for module in every_module(network) if isinstance(module, BranchBlock)]
        names = module_names(network)
        replace_layers(network, {block: _checked(names[block], block) for block in blocks})
        found, refused = parallel_branches(network.plain)
        found, refused = _outside_units(network, found, refused)
        if self.sums != "auto":
            found = [_find(found, refused, name) for name in self.sums]
        if not blocks and not found and self.sums == "auto":
            why = "".join(f" `{name}`: {reason}." for name, reason in refused.items())
            raise DynamizeError(f"fuse_branches: the network has no parallel linear branches to fuse.{why}")
        if found:
            fuse(network.plain, found)
            network.rebuild()
            count_again(network)
        check_answers("fuse_branches", network, wanted)
        after = _cost(network)
        notes = [
            f"{len(blocks) + len(found)} blocks of branches are one convolution each: {before[0] / 1e6:.2f} M to "
            f"{after[0] / 1e6:.2f} M parameters, {before[1] / 1e6:.1f} M to {after[1] / 1e6:.1f} M MACs",
            *(f"`{name}` stays: {reason}" for name, reason in refused.items()),
        ]
        return Applied(network, self.model_copy(update={"sums": [one.name for one in found]}), notes)


def _checked(name: str, block: BranchBlock) -> nn.Conv2d:
    conv = block.fuse()
    sides = zip(conv.dilation, conv.kernel_size, conv.stride, strict=True)
    example = (2, conv.in_channels, *(step * (size - 1) + _PIXELS * stride for step, size, stride in sides))
    check_same(name, conv, block, example)
    return conv


def _outside_units(
    network: DynamicNetwork, found: list[ParallelBranches], refused: dict[str, str]
) -> tuple[list[ParallelBranches], dict[str, str]]:
    """Without those inside of gated units, which hold regions of their own."""
    position, ends = positions(network.plain.graph), spans(network.plain, network.changing)
    gated = [one for one in found if any(start < position[one.name] <= end for start, end in ends)]
    reasons = {one.name: "it is inside of a block with a gate: fuse before the step that puts gates" for one in gated}
    return [one for one in found if one not in gated], refused | reasons


def _find(found: list[ParallelBranches], refused: dict[str, str], name: str) -> ParallelBranches:
    for branches in found:
        if branches.name == name:
            return branches
    known = [branches.name for branches in found]
    why = f": {refused[name]}" if name in refused else f". {closest(name, known)}"
    raise DynamizeError(
        f"fuse_branches: `{name}` is no sum of parallel linear branches that can be fused{why} "
        f"Known: {', '.join(known) or 'none'}."
    )


def _cost(network: DynamicNetwork) -> tuple[int, float]:
    """Parameters, and MACs per image of the original path."""
    params = sum(parameter.numel() for parameter in network.parameters())
    return params, annotated_macs(network.plain)
