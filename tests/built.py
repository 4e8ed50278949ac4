"""Networks that many tests begin with are converted once in a process; each test gets a copy of its own."""

import copy
import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

from dynamize.nn.network import DynamicNetwork

P = ParamSpec("P")


def built_once(build: Callable[P, DynamicNetwork]) -> Callable[P, DynamicNetwork]:
    """``build``, which seeds random numbers first; a copy leaves them where building would."""
    known: dict[str, tuple[DynamicNetwork, Tensor]] = {}

    @functools.wraps(build)
    def copied(*args: P.args, **kwargs: P.kwargs) -> DynamicNetwork:
        key = repr((args, sorted(kwargs.items())))
        if key not in known:
            known[key] = build(*args, **kwargs), torch.get_rng_state()
        network, state = known[key]
        torch.set_rng_state(state)
        return copy.deepcopy(network)

    return copied
