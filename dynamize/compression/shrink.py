"""A smaller copy of a network, made of its own layers: residual blocks left out, channels narrowed, or both."""

from collections.abc import Sequence

from torch import fx

from dynamize.errors import DynamizeError
from dynamize.graph.macs import annotated_macs
from dynamize.graph.residual import ResidualBlock, residual_blocks
from dynamize.graph.splice import splice
from dynamize.graph.trace import annotate

Region = tuple[str, str]


def blocks_to_leave_out(traced: fx.GraphModule, share: float) -> list[Region]:
    """Residual blocks (their first and last node) without which a network costs about ``share`` of its MACs, or as
    near to that as leaving out blocks comes.

    From each run of blocks that keep the shape the last ones go, from the longest run first: the first blocks after a
    change of resolution matter most (Wang et al. 2018, SkipNet, sec. 4.3).
    """
    total = annotated_macs(traced)
    runs = _runs(residual_blocks(traced))
    gone: list[Region] = []
    left = total
    while left > share * total and any(runs):
        block = max(runs, key=len).pop()
        gone.append((block.after, block.upto))
        left -= block.macs - block.bypass_macs
    return gone


def leave_out(traced: fx.GraphModule, blocks: Sequence[Region], input_shape: Sequence[int]) -> None:
    """Take residual blocks out of an annotated graph, in place.

    Raises:
        DynamizeError: it has no such blocks.
    """
    known = {(block.after, block.upto) for block in residual_blocks(traced) if block.identity}
    missing = [upto for after, upto in blocks if (after, upto) not in known]
    if missing:
        raise DynamizeError(
            f"{', '.join(missing)} end no residual block of this network that can be left out: the step was made for "
            "another network"
        )
    for after, upto in reversed(blocks):
        splice(traced, after, upto, None)
    annotate(traced, input_shape)


def _runs(blocks: Sequence[ResidualBlock]) -> list[list[ResidualBlock]]:
    """Neighbouring blocks that an image may skip as if they were not there."""
    runs: list[list[ResidualBlock]] = []
    for block in (block for block in blocks if block.identity):
        if runs and runs[-1][-1].upto == block.after:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs
