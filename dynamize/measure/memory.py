"""Bytes that a network takes: on disk, and at most at once while it answers. The same on every run and machine."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from safetensors.torch import save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dynamize.errors import DynamizeError
from dynamize.graph.tracer import blank
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting


def saved_bytes(network: DynamicNetwork) -> int:
    """Size of the network's weights as a safetensors file; an int8 weight is one byte."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    return len(save(state, metadata={"format": "pt"}))


def peak_bytes(network: DynamicNetwork) -> int:
    """Weights, the image, and the most that feature maps take at once while one image goes the dearest path.

    That path is the last exit with all gates open and those heads that are on. Counted are the tensors of eager PyTorch
    while they are alive, not what an operator needs inside; a backend that fuses operators needs less, and integers
    that eager PyTorch only imitates count as the floats that it computes with.
    """
    weights = sum({id(one): one.nbytes for one in network.state_dict(keep_vars=True).values()}.values())
    return weights + image_bytes(network)


def image_bytes(network: DynamicNetwork) -> int:
    """As :func:`peak_bytes`, without the weights."""
    training = network.training
    never = {name: None if one is None else float("inf") for name, one in network.setting.thresholds.items()}
    dearest = Setting(never, ALL_OPEN)
    network.eval()
    image = blank(network, 1, *network.input_shape)
    try:
        with torch.no_grad():
            network.run(image, dearest)  # what is made once, on the first call, is not counted
            with LiveBytes() as live:
                network.run(image, dearest)
    finally:
        network.train(training)
    return image.nbytes + live.peak


def check_batches(network: DynamicNetwork, batches: Sequence[int], device: torch.device) -> None:
    """Refuse batches that no memory can hold.

    Raises:
        DynamizeError: the images of one and their feature maps are larger than the memory of the device.
    """
    each, most = image_bytes(network), max(batches, default=0)
    here = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else psutil.virtual_memory().total
    )
    if most * each > here:
        raise DynamizeError(
            f"a batch of {most} images takes {most * each / 1e9:.3g} GB, and this machine has {here / 1e9:.3g} GB of "
            f"memory: give batches of at most {here // each}"
        )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside the block, for as long as each of them is alive.

    Attributes:
        now: alive at this moment.
        peak: the most that ever was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {id(one.untyped_storage()) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), given)
        return made

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        if id(storage) in given or id(storage) in self._alive:
            return
        self._alive.add(id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, id(storage), storage.nbytes())

    def _drop(self, storage: int, size: int) -> None:
        self._alive.discard(storage)
        self.now -= size
