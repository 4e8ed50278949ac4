"""Which device to run on, what the machine is called, and what the processor holds close by."""

import platform
import subprocess
import sys
from pathlib import Path

import torch

from dynamize.errors import DynamizeError

DEVICES = ("auto", "cpu", "cuda", "mps")
_PROCESSORS = Path("/proc/cpuinfo")  # Linux
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


def machine_name(device: torch.device) -> str:
    """The processor, its architecture and torch's threads, and the accelerator if one is used."""
    threads = torch.get_num_threads()
    parts = [_processor(), platform.machine(), f"{threads} thread{'s' if threads > 1 else ''}"]
    if device.type == "cuda":
        parts.insert(0, torch.cuda.get_device_name(device))
    return ", ".join(dict.fromkeys(filter(None, parts)))


def _processor() -> str:
    """Name of the processor; nothing where the system does not say."""
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
        lines = [line.partition(":") for line in _PROCESSORS.read_text(encoding="utf-8").splitlines()]
    except (OSError, subprocess.SubprocessError):  # no Linux, or a container that hides it
        return platform.processor()
    names = [value.strip() for key, _, value in lines if key.strip() in ("model name", "Model", "Hardware")]
    return names[0] if names else platform.processor()


def cache_bytes() -> int:
    """Size of the processor's last cache; 32 MB where the system does not say."""
    try:
        sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    except OSError:  # a container may hide it
        sizes = []
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes if size[-1:] in _UNITS), default=_USUAL_CACHE)
