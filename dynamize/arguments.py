"""What users hand over in Python, looked at before it is worked with: a network, a shape, steps, class numbers."""

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from dynamize.errors import DynamizeError

_SHOWN = 60
T = TypeVar("T")


def given_network(network: Any, where: str) -> nn.Module:
    """The network, if it is one whose weights can be read.

    Args:
        where: what it is given to, for messages.

    Raises:
        DynamizeError: it is no module, one whose layers cannot be read, or one without weights.
    """
    if isinstance(network, str):
        raise DynamizeError(
            f"{where} takes a network and was given the text {network!r}: make the network from it with "
            f"dz.source({network!r})"
        )
    if isinstance(network, type) and issubclass(network, nn.Module):
        raise DynamizeError(f"{where} takes a network and was given its class: write {network.__name__}(...)")
    if not isinstance(network, nn.Module):
        raise DynamizeError(
            f"{where} takes a network, a torch.nn.Module, and was given {_described(network)}: a state dict or a file "
            'of weights becomes one with dz.source(YourNetwork(), checkpoint="FILE")'
        )
    if isinstance(network, torch.jit.ScriptModule):
        raise DynamizeError(f"{where} cannot read a scripted network: give the module that it was scripted from")
    for name, tensor in _tensors(network):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise DynamizeError(
                f"{name} of the network has no shape yet, as its layer is a lazy one: run the network once on images, "
                f"then give it to {where}"
            )
        if tensor.is_meta:
            raise DynamizeError(
                f"{name} of the network is on the meta device and has no values: build it on a real device, and load "
                "its weights first"
            )
        if tensor.is_inference():
            raise DynamizeError(
                f"{name} of the network was made in torch.inference_mode() and can neither be trained nor followed: "
                "build the network and load its weights outside of it"
            )
    return network


def trained_network(network: Any, where: str) -> nn.Module:
    """The network, if it can be read and its weights are numbers.

    Raises:
        DynamizeError: as ``given_network``, or a weight is NaN or infinite.
    """
    given: nn.Module = given_network(network, where)
    for name, tensor in _tensors(given):
        parameter = isinstance(tensor, nn.Parameter)  # buffers may hold -inf, as masks do
        bad = tensor.is_floating_point() and not bool((tensor.isfinite() if parameter else ~tensor.isnan()).all())
        if bad:
            raise DynamizeError(
                f"{name} of the network holds values that are not finite (NaN or infinite): its training diverged, or "
                "its file is damaged; load an earlier checkpoint"
            )
    return given


def _tensors(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [*network.named_parameters(), *network.named_buffers()]


def given_shape(shape: Any) -> tuple[int, int, int]:
    """(C, H, W) of an image.

    Raises:
        DynamizeError: it is something else.
    """
    numbers = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    if len(numbers) == 3 and all(isinstance(one, int) and one > 0 for one in numbers):
        return numbers
    batch = f": leave out the batch size, as in {numbers[1:]}" if len(numbers) == 4 else ", as in (3, 224, 224)"
    raise DynamizeError(f"input_shape is channels, height and width of one image, and {shape!r} was given{batch}")


def given_steps(steps: Any, base: type) -> None:
    """Check that these are steps, of a class derived from ``base``.

    Raises:
        DynamizeError: they are something else.
    """
    if isinstance(steps, base):
        raise DynamizeError(f"steps are a list: write [{type(steps).__name__}(...)]")
    if not isinstance(steps, list | tuple):
        raise DynamizeError(f"steps are a list such as [dz.Exits(), dz.Distill()], and {_described(steps)} was given")
    for one in steps:
        if isinstance(one, type) and issubclass(one, base):
            raise DynamizeError(f"a step is made with brackets: write {one.__name__}()")
        if not isinstance(one, base):
            raise DynamizeError(f"{_described(one)} is no step: write for example dz.Exits(count=2)")


def given_data(data: Any, kind: type[T]) -> T:
    """The images, if they are splits (``kind``).

    Raises:
        DynamizeError: they are something else.
    """
    if isinstance(data, kind):
        return data
    raise DynamizeError(
        f"data are train, calibration and test images together, and {_described(data)} was given: write "
        "data=dz.splits(train=..., calibration=..., test=...), each a DataLoader, a dataset or (images, labels)"
    )


def given_networks(networks: Any, argument: str) -> dict[str, nn.Module]:
    """Networks by name.

    Raises:
        DynamizeError: it is something else.
    """
    if isinstance(networks, Mapping) and all(isinstance(name, str) for name in networks):
        return {name: trained_network(one, f"{argument}: {name}") for name, one in networks.items()}
    raise DynamizeError(
        f"{argument} are networks by name, and {_described(networks)} was given: write {argument}={{'small': network}}"
    )


def given_folder(out: Any) -> Path:
    """Where to write.

    Raises:
        DynamizeError: it is no path.
    """
    if isinstance(out, str | os.PathLike):
        return Path(out)
    raise DynamizeError(f"out is the folder to write, and {_described(out)} was given: write out='runs/mine'")


def class_numbers(labels: Any, classes: int, where: str, *, unlabelled: bool = False) -> Tensor:
    """Labels (N,) as int64.

    Args:
        classes: how many there are.
        where: whose labels, for messages.
        unlabelled: whether -1 may stand for an image without one.

    Raises:
        DynamizeError: they are of another shape or kind, or some are no classes.
    """
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        given = f"{tuple(labels.shape)} of {labels.dtype}" if isinstance(labels, Tensor) else _described(labels)
        one_hot = isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[1] == classes
        repair = "labels.argmax(1)" if one_hot and classes > 1 else "labels.flatten().long()"
        raise DynamizeError(
            f"{where}: labels are one whole number for each image, and {given} were given: try {repair}"
        )
    if not len(labels):
        return labels.long()
    low, high = int(labels.min()), int(labels.max())
    if low == -1 and not unlabelled and high < classes:
        missing = int((labels == -1).sum())
        raise DynamizeError(
            f"{where}: {missing} of {len(labels)} images have no label (-1), so that answers to them cannot be judged: "
            "leave them out, or give them to dz.convert in a dz.Context, where the original network's answers stand in"
        )
    if low < (-1 if unlabelled else 0) or high >= classes:
        hint = ": subtract 1" if low == 1 and high == classes else ""
        raise DynamizeError(
            f"{where}: labels from {low} to {high} do not fit the network's {classes} classes, 0 to {classes - 1}{hint}"
        )
    return labels.long()


def _described(value: Any) -> str:
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= _SHOWN else text[:_SHOWN] + '...'} ({type(value).__name__})"


def is_positive(value: object) -> bool:
    """Whether it is a finite number above zero."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf
