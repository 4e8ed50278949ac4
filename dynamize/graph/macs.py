"""Multiply-accumulates of what is really executed, counted by torch's own dispatcher (2 FLOPs are 1 MAC)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def counting_macs() -> Iterator[Callable[[], float]]:
    """Count the MACs that the body executes; call the yielded function to read them, inside or after the body.

    Convolutions and matrix products count, element-wise work and batch norms do not. Only operators that run are
    seen, so work that is skipped is not in the figure.
    """
    with FlopCounterMode(display=False) as counter:
        yield lambda: counter.get_total_flops() / 2


def count_macs(module: Callable[..., object], *inputs: object) -> float:
    """MACs of one call of ``module`` on ``inputs``, over the whole batch."""
    with torch.no_grad(), counting_macs() as counted:
        module(*inputs)
    return counted()


def annotated_macs(traced: fx.GraphModule) -> float:
    """MACs per image of all nodes of an annotated graph (:func:`dynamize.graph.trace.annotate`)."""
    return float(sum(node.meta["macs"] for node in traced.graph.nodes))
