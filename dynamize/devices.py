"""Which device to run on."""

import torch

from dynamize.errors import DynamizeError

DEVICES = ("auto", "cpu", "cuda", "mps")


def choose_device(name: str) -> torch.device:
    """The device of this name; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        DynamizeError: no such device here.
    """
    if name not in DEVICES:
        raise DynamizeError(f"'{name}' is no device: use one of {', '.join(DEVICES)}")
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in here.items() if available)
    if not here[name]:
        raise DynamizeError(f"this machine has no {name}: use --device cpu, or auto")
    return torch.device(name)
