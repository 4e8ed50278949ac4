"""Training checkpoints: tensors and plain values only, written whole or not at all."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from dynamize.errors import DynamizeError
from dynamize.files import atomically
from dynamize.nn.network import DynamicNetwork
from dynamize.upgrade import upgraded, upgraded_optimizer

_SECONDS_BETWEEN = 60.0


@dataclass
class Position:
    """How far training is: ``step`` steps into ``epoch``, with the loss summed so far and the rows of past epochs."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


class CheckpointClock:
    """Says when the next checkpoint inside an epoch is due."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.last = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.last > _SECONDS_BETWEEN


def save_checkpoint(work: Path, position: Position, network: nn.Module, optimizer: Any, schedule: LRScheduler) -> None:
    """Write ``work/checkpoint.pt``."""
    state = {
        "position": asdict(position),
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": {k: v for k, v in schedule.state_dict().items() if isinstance(v, int | float | list)},
    }
    with atomically(work / "checkpoint.pt") as path:
        torch.save(state, path)


def load_checkpoint(work: Path, network: DynamicNetwork, optimizer: Any, schedule: LRScheduler) -> Position | None:
    """Restore what :func:`save_checkpoint` wrote, in this version or an earlier one; None where there is nothing.

    Raises:
        DynamizeError: the file is damaged or belongs to another run.
    """
    path = work / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        network.load_state_dict(upgraded(state["network"], network))
        optimizer.load_state_dict(upgraded_optimizer(state["optimizer"], state["network"], network))
        schedule.load_state_dict(state["schedule"])
        return Position(**state["position"])
    except Exception as error:
        raise DynamizeError(
            f"{path} cannot be continued from ({str(error).splitlines()[0]}): delete it to start this step anew, or "
            "run without --resume"
        ) from error
