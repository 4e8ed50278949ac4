"""A short way to the end: the network's own later layers without the blocks that keep the shape."""

import copy

from torch import fx, nn

from dynamize.graph.cuts import cut_points
from dynamize.graph.extract import extract


def tail(traced: fx.GraphModule, after: str, depth: int) -> tuple[nn.Sequential, nn.Module]:
    """Copies of what the network needs to get from a cut point to its answer.

    Between two cut points lies a block. Those that change the shape are kept, since what follows depends on it; of
    the blocks that keep it only the last ``depth`` of each resolution are, and none at the resolution of ``after``.
    The copies start from the trained weights: in a residual network such a head knows the classes before it is
    trained.

    Returns:
        The blocks, (N, C, H, W) -> (N, C', H', W'), and the classifier behind them, -> (N, classes).
    """
    cuts = cut_points(traced)
    start = next(i for i, cut in enumerate(cuts) if cut.name == after)
    kept: list[tuple[str, str]] = []
    waiting: list[tuple[str, str]] = []  # blocks that keep the shape, since the last one that changed it
    changed = False
    for before, cut in zip(cuts[start:], cuts[start + 1 :], strict=False):
        if before.shape == cut.shape:
            waiting.append((before.name, cut.name))
            continue
        kept += waiting[-depth:] if changed and depth else []
        kept.append((before.name, cut.name))
        waiting, changed = [], True
    kept += waiting[-depth:] if changed and depth else []
    blocks = [copy.deepcopy(extract(traced, first, last)) for first, last in kept]
    return nn.Sequential(*blocks), copy.deepcopy(extract(traced, cuts[-1].name, None))
