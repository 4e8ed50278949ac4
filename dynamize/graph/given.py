"""A network as it is handed over: out of its wrappers, and copied."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dynamize.errors import DynamizeError

_HOLDING_A_MODULE = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside ``torch.compile``, data parallelism and averaging, one in another.

    Example:
        >>> net = dz.source("dynamize:digits_resnet")
        >>> unwrapped(torch.nn.DataParallel(net)) is net
        True
    """
    while True:
        if isinstance(network, _HOLDING_A_MODULE):
            network = network.module
        elif "_orig_mod" in network._modules:  # torch.compile
            network = network._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return network


def own_copy(network: nn.Module) -> nn.Module:
    """A deep copy, also of a network that keeps tensors it has computed: its features, or a weight that is a product.

    Raises:
        DynamizeError: it cannot be copied.
    """
    computed = {
        id(tensor): tensor.detach().clone()
        for module in network.modules()
        for tensor in _held(vars(module))
        if tensor.grad_fn is not None
    }
    try:
        return copy.deepcopy(network, dict(computed))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DynamizeError(
            f"{type(network).__name__} cannot be copied: {reason}. Let the module hold parameters, buffers and plain "
            "values only. Nothing was changed."
        ) from error


def _held(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors in attributes, and in what these hold."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (dict, list, tuple, set)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _held(one, depth - 1)
