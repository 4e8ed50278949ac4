"""The training loop: on accelerate, so the same code runs on one process, several, or several machines.

Everything random is a function of (seed, epoch, step, process), so a run that was killed and goes on from its
checkpoint does exactly what it would have done.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, broadcast
from pydantic import Field
from torch import Tensor, nn

from dynamize.data import Splits, set_epoch
from dynamize.errors import DynamizeError
from dynamize.files import write_json_lines
from dynamize.measure.accuracy import exit_accuracies
from dynamize.nn import channels_last
from dynamize.nn.network import DynamicNetwork
from dynamize.training.parts import Trained, kept
from dynamize.training.state import CheckpointClock, Position, load_checkpoint, save_checkpoint
from dynamize.transform import Context, Progress, quiet

Loss = Callable[[Any, Tensor, Tensor], Tensor]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16"],
    Field(description="auto: bfloat16 autocast where the device computes it natively"),
]
WEIGHT_DECAY = 5e-4
_STEPS_BETWEEN_CHECKS = 20  # reading a loss waits for the device


@runtime_checkable
class Advancing(Protocol):
    """A loss that changes in the course of the training."""

    def advance(self, progress: float) -> None:
        """Told before each step how much is over, 0 to 1."""


@dataclass(frozen=True)
class Plan:
    """How to train. ``batch_size`` is over all processes; ``lr`` is the peak of a one-cycle schedule
    (Smith & Topin 2018); SGD with Nesterov momentum 0.9. ``part`` is what is trained: "heads" freezes the networks' own
    layers and their batch-norm statistics, "last" all of them but the last layer and the last batch norm of each;
    ``frozen`` does so to single modules. ``work`` keeps checkpoints and metrics; None keeps nothing."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    bf16: bool
    seed: int
    part: Trained = "all"
    work: Path | None = None
    resume: bool = False
    trackers: tuple[str, ...] = ()
    device: torch.device = torch.device("cpu")
    label: str = "train"
    frozen: tuple[nn.Module, ...] = ()

    @classmethod
    def of(cls, context: Context, **fields: Any) -> Self:
        """With the seed, device and folder of a context unless ``fields`` name others."""
        given = {name: getattr(context, name) for name in ("seed", "device", "work", "resume")}
        return cls(**given | fields)


def train(
    network: DynamicNetwork, data: Splits, loss: Loss, plan: Plan, progress: Progress = quiet
) -> list[dict[str, Any]]:
    """Train ``network`` in place and return one row of metrics for each epoch.

    A row holds the epoch, the mean training loss, the accuracy of each exit on the calibration split and seconds.

    Raises:
        DynamizeError: the loss is not finite; the message names the step and the last good checkpoint.
    """
    accelerator = _accelerator(plan)
    channels_last.lay_out(network.to(plan.device)).train()
    with _trainable(network, plan) as parameters:
        run = _Run(accelerator, network, data, loss, plan, parameters)
        rows = run.all_epochs(progress)
    for buffer in network.buffers():  # batch-norm statistics differ between processes: all take the first one's
        broadcast(buffer)
    network.eval().to(memory_format=torch.contiguous_format)
    for tracker in accelerator.trackers:  # `end_training` would also end the process group, which later steps need
        tracker.finish()
    return rows


class _Run:
    def __init__(
        self,
        accelerator: Accelerator,
        network: DynamicNetwork,
        data: Splits,
        loss: Loss,
        plan: Plan,
        parameters: list[nn.Parameter],
    ) -> None:
        self.accelerator, self.network, self.data, self.loss, self.plan = accelerator, network, data, loss, plan
        optimizer = torch.optim.SGD(parameters, lr=plan.lr, momentum=0.9, nesterov=True, weight_decay=plan.weight_decay)
        loader = data.train.training_loader(plan.batch_size, plan.seed)
        self.wrapped, self.optimizer, self.loader = accelerator.prepare(network, optimizer, loader)
        self.steps = len(self.loader)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, plan.lr, total_steps=max(2, plan.epochs * self.steps)
        )
        self.position = Position()
        self.clock = CheckpointClock()
        self.started = time.monotonic()
        if plan.resume and plan.work is not None:
            found = load_checkpoint(plan.work, network, optimizer, self.schedule)
            self.position = found or self.position

    def all_epochs(self, progress: Progress) -> list[dict[str, Any]]:
        plan, position = self.plan, self.position
        for epoch in range(position.epoch, plan.epochs):
            self.started = time.monotonic() - position.seconds
            set_epoch(self.loader, epoch)
            first = position.step
            batches = self.accelerator.skip_first_batches(self.loader, first) if first else self.loader
            label = f"{plan.label}: epoch {epoch + 1}/{plan.epochs}"
            self._epoch(epoch, first, progress(batches, label, self.steps - first))
            main = self.accelerator.is_main_process
            accuracies = exit_accuracies(self.network, self.data.calibration, plan.device) if main else []
            position.rows.append(
                {
                    "step": plan.label,
                    "epoch": epoch + 1,
                    "loss": position.loss / max(1, self.steps),
                    "calibration_accuracy": accuracies,
                    "seconds": round(time.monotonic() - self.started, 1),
                }
            )
            self.accelerator.log(_flat(position.rows[-1]), step=epoch + 1)
            position.epoch, position.step, position.loss, position.seconds = epoch + 1, 0, 0.0, 0.0
            self._save()
        return position.rows

    def _epoch(self, epoch: int, first: int, batches: Any) -> None:
        self.network.train()
        held, trained = kept(self.network, self.plan.part)
        for module in (*self.plan.frozen, *held):
            module.eval()
        for module in trained:
            module.train()
        waiting: list[Tensor] = []
        for step, (images, labels) in enumerate(batches, start=first):
            waiting.append(self._step(epoch, step, images, labels))
            if len(waiting) >= _STEPS_BETWEEN_CHECKS or step == self.steps - 1:
                self._check(waiting, epoch, step)
                self.position.step = step + 1
                waiting.clear()
                if self.clock.due() and step < self.steps - 1:
                    self.position.seconds = time.monotonic() - self.started
                    self._save()

    def _step(self, epoch: int, step: int, images: Tensor, labels: Tensor) -> Tensor:
        plan = self.plan
        if isinstance(self.loss, Advancing):
            self.loss.advance((epoch * self.steps + step) / (plan.epochs * self.steps))
        seed = hash((plan.seed, epoch, step, self.accelerator.process_index)) % 2**62
        torch.manual_seed(seed)  # dropout and stochastic depth
        generator = torch.Generator().manual_seed(seed)
        images, labels = images.to(plan.device, non_blocking=True), labels.to(plan.device, non_blocking=True)
        images = channels_last.images_for(self.network, self.data.train.prepare(images, generator))
        with torch.autocast(plan.device.type, torch.bfloat16, enabled=plan.bf16):
            loss = self.loss(self.wrapped(images), images, labels)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def _check(self, losses: list[Tensor], epoch: int, step: int) -> None:
        values = torch.stack(losses).tolist()
        for i, value in enumerate(values):
            if value != value or abs(value) == float("inf"):
                at = step - len(values) + 1 + i
                kept = self.plan.work and (self.plan.work / "checkpoint.pt").exists()
                raise DynamizeError(
                    f"{self.plan.label}: the loss became {value} at epoch {epoch + 1}, step {at + 1} of {self.steps}. "
                    + (
                        f"The last good state is in {self.plan.work / 'checkpoint.pt'}. "
                        if kept and self.plan.work
                        else ""
                    )
                    + f"Try a smaller learning rate than {self.plan.lr:g}, e.g. lr: {self.plan.lr / 5:g}."
                )
        self.position.loss += sum(values)

    def _save(self) -> None:
        plan = self.plan
        if plan.work is None or not self.accelerator.is_main_process:
            return
        write_json_lines(plan.work / "metrics.jsonl", self.position.rows)
        save_checkpoint(plan.work, self.position, self.network, self.optimizer, self.schedule)
        self.clock.reset()


def _accelerator(plan: Plan) -> Accelerator:
    accelerator = Accelerator(
        cpu=plan.device.type == "cpu",
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=list(plan.trackers) or None,
        project_dir=str(plan.work) if plan.work else None,
        step_scheduler_with_optimizer=False,
    )
    if plan.trackers:
        accelerator.init_trackers("dynamize")
    return accelerator


@contextmanager
def _trainable(network: DynamicNetwork, plan: Plan) -> Iterator[list[nn.Parameter]]:
    """The parameters to train; the others are frozen inside the block and as they were after it."""
    before = {p: p.requires_grad for p in network.parameters()}
    held, trained = kept(network, plan.part)
    for module in (*plan.frozen, *held):
        module.requires_grad_(False)
    for parameter in (parameter for module in trained for parameter in module.parameters()):
        parameter.requires_grad_(before[parameter])
    try:
        yield [p for p in network.parameters() if p.requires_grad]
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


def _flat(row: dict[str, Any]) -> dict[str, float]:
    flat = {"loss": row["loss"]}
    flat |= {f"calibration_accuracy/exit_{k + 1}": a for k, a in enumerate(row["calibration_accuracy"])}
    return flat


def decide_precision(asked: Precision, device: torch.device) -> Precision:
    """What ``auto`` means on a device: bfloat16 where it computes that natively."""
    if asked != "auto":
        return asked
    return "bfloat16" if _bf16_is_native(device) else "float32"


def _bf16_is_native(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
