"""earlyon 0.3.0 beside this package: the same ResNet-56, the same CIFAR-10 images, one process, interleaved.

    python benchmarks/earlyon_rival.py --data cifar10 --checkpoint resnet56-cifar10-jpeg.pt \
        --artifact runs/cifar10 --work runs/earlyon --out earlyon.md

earlyon trains its exits with its own trainers (frozen backbone; joint) at their default rates, on our batches
(crop and flip; bfloat16 where the CPU has it). Each side calibrates with its own solvers on one half of the
test images and is judged on the other, then the halves swap. earlyon is eager only: it is timed as it ships
and, to be generous, with batch norms folded by hand and channels last. A batch of its leaves as a whole or
not at all, which changes its answers, so accuracy is measured in batches, too.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from cifar10_images import CPU, SHAPE, halves
from earlyon.core.thresholds import (
    CalibrationResult,
    calibrate_thresholds,
    calibrate_thresholds_for_budget,
    collect_head_logits,
    simulate_policy,
)
from earlyon.core.wrappers import EarlyExitWrapper
from earlyon.models import custom_ee
from earlyon.training import joint_train_backbone_and_exits, stage2_train_exits
from earlyon.utils import load_wrapper, save_wrapper
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import dynamize as dz
from dynamize import artifact
from dynamize.calibration.collect import TableMaker
from dynamize.calibration.operating import OperatingPoint
from dynamize.calibration.points import point_for_budget, point_for_drop
from dynamize.conversion import wrap
from dynamize.data import Images, Splits, set_epoch
from dynamize.errors import DynamizeError
from dynamize.evaluation import gather
from dynamize.measure.accuracy import top_answers
from dynamize.measure.latency import interleave
from dynamize.nn.network import DynamicNetwork
from dynamize.runtime.compiled import compile_network
from dynamize.training.loop import decide_precision

NETWORK, BATCH, TIMED = "dynamize:cifar_resnet56", 64, 256
EXITS = ("layer1", "layer2", "layer3.4")  # as in earlyon's CIFAR ResNet, whose last comes after everything
DROPS, BUDGETS = (0.2, 1.0, 2.0), (0.8, 0.65, 0.5)  # targets: points of accuracy; share of the network's MACs
BACKENDS = {"onnxruntime": "ONNX Runtime", "eager": "eager, folded, channels last"}
TRAINERS = {"frozen": stage2_train_exits, "joint": joint_train_backbone_and_exits}

Batch = tuple[Tensor, Tensor]
Key = tuple[str, str, str]  # network, operating point, backend
STATIC: Key = ("static", "", BACKENDS["onnxruntime"])


@dataclass(frozen=True)
class Contender:
    """A network at an operating point on a backend, and its top-1 on the test half, by batch size."""

    call: Callable[[Tensor], object]
    accuracy: dict[int, float]


class TrainingBatches:
    """Our augmented batches as the loader that earlyon's trainers want; each pass over it is an epoch."""

    def __init__(self, images: Images) -> None:
        self.images, self.loader, self.epoch = images, images.training_loader(128, seed=0), 0

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.epoch)
        set_epoch(self.loader, self.epoch)
        self.epoch += 1
        for images, labels in self.loader:
            prepared = self.images.prepare(images, generator)
            yield prepared.contiguous(memory_format=torch.channels_last), labels


def trained(mode: str, epochs: int, start: Path, data: Splits, work: Path) -> EarlyExitWrapper:
    """The network with earlyon's exits, trained in one of its two ways or read from ``work``."""
    torch.manual_seed(0)
    model = custom_ee(dz.source(NETWORK, checkpoint=start), EXITS, 10, input_shape=(1, *SHAPE))
    kept = work / f"earlyon-{mode}-{epochs}.pth"
    if not kept.exists():
        model.to(memory_format=torch.channels_last)
        # without the cache: it keeps the weights of the first step for as long as the block is open
        bf16 = decide_precision("auto", CPU) == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            TRAINERS[mode](model, TrainingBatches(data.train), epochs=epochs)
        work.mkdir(parents=True, exist_ok=True)
        save_wrapper(model, kept)
    return load_wrapper(kept, factory=lambda: model).to(memory_format=torch.contiguous_format).eval()


def fast_earlyon(model: EarlyExitWrapper) -> EarlyExitWrapper:
    """The same exits on the same network, with batch norms folded and in channels-last memory."""
    backbone = dz.source(NETWORK).eval()
    backbone.load_state_dict(model.backbone.state_dict())
    for module in backbone.modules():
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
            if hasattr(module, norm):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
    fast = custom_ee(backbone, EXITS, 10, input_shape=(1, *SHAPE))
    fast.exit_heads.load_state_dict(model.exit_heads.state_dict())
    return fast.to(memory_format=torch.channels_last).eval()


def route(model: EarlyExitWrapper, policy: CalibrationResult, images_NCHW: Tensor) -> Any:
    """What earlyon answers under a policy, from its single-image router or its batched one."""
    model.config.confidence_thresholds, model.config.enabled_exits = policy.thresholds, policy.enabled_exits
    return model(images_NCHW) if len(images_NCHW) == 1 else model.forward_inference_batched(images_NCHW)


def earlyon_contenders(mode: str, model: EarlyExitWrapper, data: Splits) -> dict[Key, Contender]:
    """earlyon at every target, by its own two calibrators; it warns of a compute target that it misses."""
    fast = fast_earlyon(model)
    calibration, test = list(data.calibration.batches(256)), list(data.test.batches(256))
    policies = {f"drop {drop:g}": calibrate_thresholds(fast, calibration, drop / 100) for drop in DROPS}
    for budget in BUDGETS:
        policies[f"compute {budget:g}"] = calibrate_thresholds_for_budget(fast, calibration, budget)
    logits, found = collect_head_logits(fast, test, "cpu"), dict[Key, Contender]()
    for name, policy in policies.items():
        in_batches = batched_accuracy(fast, policy, test)  # sets the policy, which the next line replays
        accuracy = {1: simulate_policy(logits, fast).accuracy, BATCH: in_batches}
        for wrapper, backend in ((model, "eager as it ships"), (fast, BACKENDS["eager"])):
            found[f"earlyon, {mode}", name, backend] = Contender(partial(route, wrapper, policy), accuracy)
    return found


def batched_accuracy(model: EarlyExitWrapper, policy: CalibrationResult, test: list[Batch]) -> float:
    """Top-1 of earlyon's batched router over shuffled batches of 64."""
    images, labels = (torch.cat(part) for part in zip(*test, strict=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    found = [route(model, policy, images[some]).predictions.argmax(1) for some in order.split(BATCH)]
    return float((torch.cat(found) == labels[order]).double().mean())


def our_contenders(network: DynamicNetwork, teacher: nn.Module, data: Splits) -> dict[Key, Contender]:
    """The converted network at the same targets on both backends, without those that it refuses."""
    network, points = copy.deepcopy(network), dict[str, OperatingPoint]()
    table = TableMaker(network, data.calibration, teacher, CPU, "onnxruntime").table(0.0)
    static = table.static_cost["macs"]
    solvers = {f"drop {drop:g}": partial(point_for_drop, table, drop) for drop in DROPS}
    solvers |= {f"compute {share:g}": partial(point_for_budget, table, share * static) for share in BUDGETS}
    for name, solve in solvers.items():
        try:
            points[name] = solve()
        except DynamizeError as refusal:
            print(f"dynamize, {name}: {refusal}", flush=True)
    compiled = {name: compile_network(network, backend) for backend, name in BACKENDS.items()}
    found: dict[Key, Contender] = {}
    for name, point in points.items():
        network.set_operating_point(point)
        accuracy = top1(network, data.test)
        for backend, one in compiled.items():
            found["dynamize", name, backend] = Contender(partial(one.run, setting=network.setting), accuracy)
    return found


def static_contenders(network: nn.Module, images: Images) -> dict[Key, Contender]:
    """The untouched network on both backends."""
    accuracy, static = top1(network, images), wrap(network, SHAPE)
    calls = {name: compile_network(static, backend) for backend, name in BACKENDS.items()}
    return {("static", "", name): Contender(call, accuracy) for name, call in calls.items()}


def top1(network: nn.Module, images: Images) -> dict[int, float]:
    """Accuracy of a classifier that treats each image of a batch by itself."""
    found, labels = top_answers(network, images, CPU)
    return dict.fromkeys((1, BATCH), float((found == labels).double().mean()))


def measure(contenders: dict[Key, Contender], images: Images, seconds: float) -> dict[Key, list[float]]:
    """At batch 1, then at batch 64: accuracy, ms per image, and times faster than static ONNX Runtime."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:TIMED]
    pixels, figures = gather(images, chosen, CPU), {key: list[float]() for key in contenders}
    names = {key: ", ".join(key) for key in contenders}
    for size in (1, BATCH):
        batches = [part for part in pixels.split(size) if len(part) == size]
        times = interleave({names[key]: c.call for key, c in contenders.items()}, batches, CPU, seconds)
        for key, name in names.items():
            speedup = times.speedup(names[STATIC], name)
            figures[key] += [contenders[key].accuracy[size], times.median_ms(name) / size, speedup]
        for warning in times.warnings():
            print(warning, flush=True)
    return figures


def markdown(folds: dict[Key, list[list[float]]]) -> str:
    """The table: means over folds, networks in the order measured."""
    heads = " | ".join(f"accuracy, batch {size} | ms per image | vs static ORT" for size in (1, BATCH))
    lines = [f"| network | target | runs in | {heads} |", "|---|---|---|" + "---:|" * 6]
    for (network, target, backend), figures in folds.items():
        one, ms, faster, many, batch_ms, batch_faster = np.mean(figures, axis=0)
        target += "" if len(figures) == len(folds[STATIC]) else " (one half only)"
        cells = f"{one:.2%} | {ms:.3f} | {faster:.2f} | {many:.2%} | {batch_ms:.3f} | {batch_faster:.2f}"
        lines.append(f"| {network} | {target} | {backend} | {cells} |")
    note = f"{torch.get_num_threads()} threads; means over both halves of the test images."
    return "\n".join([*lines, "", note, ""])


def main(
    data: Annotated[Path, typer.Option(help="folder with train/ and test/")],
    checkpoint: Annotated[Path, typer.Option(help="the ResNet-56 that both start from")],
    converted: Annotated[Path, typer.Option("--artifact", help="the same network, converted by dynamize")],
    work: Annotated[Path, typer.Option(help="where earlyon's trained exits are kept")],
    out: Annotated[Path, typer.Option(help="Markdown file to write")],
    frozen_epochs: Annotated[int, typer.Option(help="0 leaves the frozen mode out")] = 20,
    joint_epochs: Annotated[int, typer.Option(help="0 leaves the joint mode out")] = 12,
    seconds: Annotated[float, typer.Option(help="of timing for each batch size and half")] = 120.0,
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> None:
    """Train earlyon's exits, calibrate and measure both sides, and write the table."""
    limits = {"train_limit": train_limit, "test_limit": test_limit, "calibration": test_limit}
    both = [halves(data, fold=fold, **limits) for fold in (0, 1)]
    teacher, network = dz.source(NETWORK, checkpoint=checkpoint).eval(), artifact.load(converted)
    plans = {"frozen": frozen_epochs, "joint": joint_epochs}
    rivals = {mode: trained(mode, n, checkpoint, both[0], work) for mode, n in plans.items() if n > 0}
    folds: dict[Key, list[list[float]]] = defaultdict(list)
    for half in both:
        contenders = static_contenders(teacher, half.test) | our_contenders(network, teacher, half)
        for mode, model in rivals.items():
            contenders |= earlyon_contenders(mode, model, half)
        for key, figures in measure(contenders, half.test, seconds).items():
            folds[key].append(figures)
    out.write_text(markdown(folds), encoding="utf-8")
    print(markdown(folds))


if __name__ == "__main__":
    typer.run(main)
