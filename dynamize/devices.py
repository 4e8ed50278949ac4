"""Which device to run on, and what the processor holds close by."""

from pathlib import Path

import torch

from dynamize.errors import DynamizeError

DEVICES = ("auto", "cpu", "cuda", "mps")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # Linux
_USUAL_CACHE = 2**25
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


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


def cache_bytes() -> int:
    """Size of the processor's last cache; 32 MB where the system does not say."""
    try:
        sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    except OSError:  # a container may hide it
        sizes = []
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes if size[-1:] in _UNITS), default=_USUAL_CACHE)
