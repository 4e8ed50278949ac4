"""Networks that many tests begin with are read and converted once in a process; each test gets a copy of its own."""

import copy
import functools
import hashlib
import io
from collections.abc import Callable, Sequence
from typing import ParamSpec

import torch
from torch import Tensor, fx, nn

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


def read_once(trace: Callable[..., fx.GraphModule]) -> Callable[..., fx.GraphModule]:
    """``trace``, which reads networks of dynamize's own that ``torch.save`` cannot tell apart only once."""
    known: dict[tuple[object, ...], fx.GraphModule] = {}

    @functools.wraps(trace)
    def read(network: nn.Module, input_shape: Sequence[int], *, check: bool = True) -> fx.GraphModule:
        if not type(network).__module__.startswith("dynamize.models."):
            return trace(network, input_shape, check=check)
        saved = io.BytesIO()
        torch.save(network, saved)
        key = (hashlib.sha256(saved.getbuffer()).digest(), *input_shape, check)
        if key not in known:
            known[key] = trace(network, input_shape, check=check)
        return copy.deepcopy(known[key])

    return read
