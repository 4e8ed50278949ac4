"""How much of the work that gates leave out the clock shows at ImageNet shapes, decisions forced at a stated rate.

    python benchmarks/gates_speed.py --out gates_speed.md

There is no training data for these, so each image skips a random half of the gateable blocks, or computes two of four
groups of channels everywhere; gates are evaluated all the same. The static network is the same one without gates on
the same backend. Times are medians of interleaved rounds in one process; nothing else may run meanwhile.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import dynamize as dz
from dynamize.conversion import wrap
from dynamize.files import write_text
from dynamize.measure.costs import exit_costs
from dynamize.measure.latency import interleave
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.report import share_of_saving_shown

SHAPE, CPU = (3, 224, 224), torch.device("cpu")
NETWORKS = ("torchvision:resnet50", "torchvision:mobilenet_v3_large")
INPUTS = 4  # batches of each size

Decide = Callable[[DynamicNetwork, int], Tensor]


def half_skipped(network: DynamicNetwork, images: int) -> Tensor:
    """For each image a random half of the units skipped."""
    units = len(network.changing)
    generator = torch.Generator().manual_seed(0)
    ranks = torch.rand(images, units, generator=generator).argsort(1)
    return (ranks >= units // 2).long()


def half_width(network: DynamicNetwork, images: int) -> Tensor:
    """For each image the path of each unit that is nearest to half of its channels."""
    middle = [len(unit.path_macs) // 2 - 1 for unit in network.changing]
    return torch.tensor(middle).expand(images, -1)


CASES: dict[str, tuple[dz.SkipGates | dz.ChannelGates, Decide, tuple[int, ...]]] = {
    "skip gates, half of the gateable blocks": (dz.SkipGates(group=1), half_skipped, (1, 32)),
    "channel gates, 2 of 4 groups": (dz.ChannelGates(keep_first=False, multiple=16), half_width, (1, 32)),
}


def main(
    out: Annotated[Path, typer.Option(help="Markdown file to write")],
    seconds: Annotated[float, typer.Option(help="for each comparison")] = 30.0,
    backends: Annotated[str, typer.Option(help="comma-separated")] = "onnxruntime,eager",
) -> None:
    """Measure every network, kind of gate, backend and batch size."""
    lines = [
        "| network | gates | backend | batch | executed MACs | static ms | dynamic ms | speed-up "
        "| share of the saving shown | all open |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    busy = 0.0
    for source in NETWORKS:
        torch.manual_seed(0)
        plain = dz.source(source).eval()
        static = wrap(plain, SHAPE)
        for name, (transform, decide, batches) in CASES.items():
            dynamic = dz.convert(plain, [transform], SHAPE).eval()
            for backend in backends.split(","):
                for batch in batches:
                    line, used = compare(static, dynamic, decide, backend, batch, seconds)
                    lines.append(f"| {source.partition(':')[2]} | {name} | {backend} | {batch} | {line} |")
                    busy = max(busy, used)
                    print(lines[-1], flush=True)
    lines += ["", f"Other processes used at most {busy:.2f} cores meanwhile."]
    write_text(out, "\n".join(lines) + "\n")


def forced(network: DynamicNetwork, choices_NU: Tensor) -> Setting:
    """These paths for the images of a batch, whatever the gates say."""
    return Setting(forced={unit.name: choices_NU[:, u] for u, unit in enumerate(network.changing)})


def compare(
    static: DynamicNetwork, dynamic: DynamicNetwork, decide: Decide, backend: str, batch: int, seconds: float
) -> tuple[str, float]:
    """One line of the table, and how many cores others used."""
    choices = decide(dynamic, INPUTS * batch)
    macs = exit_costs(dynamic).executed(forced(dynamic, choices).forced, len(choices))
    whole = float(exit_costs(static).cumulative()[-1])
    ratio = float(macs.mean()) / whole
    compiled, plain = dz.compile_network(dynamic, backend), dz.compile_network(static, backend)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(batch, *SHAPE, generator=generator) for _ in range(INPUTS)]
    decided = {id(images): forced(dynamic, some) for images, some in zip(inputs, choices.split(batch), strict=True)}
    last = torch.tensor([len(unit.path_macs) - 1 for unit in dynamic.changing])
    whole_way = forced(dynamic, last.expand(batch, -1))
    contenders = {
        "static": plain,
        "dynamic": lambda images: compiled.run(images, decided[id(images)]).logits,
        "open": lambda images: compiled.run(images, whole_way).logits,
    }
    times = interleave(contenders, inputs, CPU, seconds)
    speedup = times.speedup("static", "dynamic")
    shown = share_of_saving_shown(ratio, speedup)
    line = (
        f"{ratio:.3f} | {times.median_ms('static'):.2f} | {times.median_ms('dynamic'):.2f} | {speedup:.2f} "
        f"| {shown:.2f} | {times.speedup('static', 'open'):.2f}"
    )
    return line, times.busy_elsewhere


if __name__ == "__main__":
    typer.run(main)
