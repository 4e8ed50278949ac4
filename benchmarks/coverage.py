"""Which networks can be converted: promises 1, 2 and 6 on every CNN of torchvision, or one of each timm family.

    python benchmarks/coverage.py --library torchvision --out coverage-torchvision.md
    python benchmarks/coverage.py --library timm --out coverage-timm.md
    python benchmarks/coverage.py --names resnet18,densenet121

Each network is built with random weights and the batch-norm statistics of a few images, and converted with two
convolutional exits. Promise 1: with exits off its answers are bit-equal. Promise 2: four images that leave at
different exits get what a dense pass and the thresholds say, and exactly the multiply-accumulates of their exits are
executed. Promise 6: saved, and loaded in another process, it answers and routes as before. By how much fvcore and thop
count more than we do is in the table too, and below it why, network by network, where that is more than 1 %.

Beside ``--out`` lie its rows (``.jsonl``), one written as soon as its network is done: a run that was stopped goes on
from there.
"""

import gc
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Generic, Protocol, TypeVar

import numpy as np
import torch
import typer
from pydantic import TypeAdapter
from torch import Tensor, nn

import dynamize as dz
from dynamize import artifact
from dynamize.conversion import apply, wrap
from dynamize.graph.cuts import cut_points
from dynamize.graph.macs import count_macs
from dynamize.measure.costs import exit_costs
from dynamize.measure.counters import count_three_ways
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.transform import Context
from dynamize.transforms import Exits

IMAGES = 4
TOLERANCE = 1e-5  # of the largest logit, where a batch was split and kernels for other batch sizes ran
SIDE = 96  # of the images, unless a network needs larger ones; cuts and promises do not depend on it
SIDES = {
    "inception_v3": 299,
    "inception_v4": 299,
    "inception_resnet_v2": 299,
    "nasnetalarge": 224,
    "pnasnet5large": 224,
}
NEVER, ALWAYS = float("inf"), float("-inf")

# The smallest network of each model file in timm 1.0.31 that is a CNN, by parameters, its tiny test networks aside.
TIMM = {
    "byobnet": "mobileone_s1", "convmixer": "convmixer_768_32", "convnext": "convnext_zepto_rms",
    "cspnet": "cs3darknet_focus_s", "cspnext": "cspnext_tiny", "densenet": "densenet121", "dla": "dla46x_c",
    "dpn": "dpn48b", "efficientnet": "mobilenetv2_035", "fasternet": "fasternet_t0", "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf", "ghostnet": "ghostnet_050", "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0", "hrnet": "hrnet_w18_small", "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2", "inception_v3": "inception_v3", "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small", "mambaout": "mambaout_femto", "metaformer": "poolformerv2_s12",
    "mobilenetv3": "mobilenetv3_small_050", "nasnet": "nasnetalarge", "nfnet": "nf_regnet_b0",
    "pnasnet": "pnasnet5large", "rdnet": "rdnet_tiny", "regnet": "regnetx_002", "repghost": "repghostnet_050",
    "repvit": "repvit_m1", "res2net": "res2next50", "resnest": "resnest14d", "resnet": "resnet10t",
    "resnetv2": "resnetv2_18", "rexnet": "rexnet_100", "selecsls": "selecsls42", "senet": "legacy_seresnet18",
    "sknet": "skresnet18", "starnet": "starnet_s050", "tresnet": "tresnet_m", "vgg": "vgg11",
    "vovnet": "ese_vovnet19b_slim_dw", "xception": "legacy_xception", "xception_aligned": "xception41p",
}  # fmt: skip
NOT_TIMM = {
    "self-attention over tokens (transformers)": "beit, cait, convit, crossvit, davit, deepseek_vit, deit, eva, gcvit, "
    "gemma4_vit, hiera, hieradet_sam2, mvitv2, naflexvit, nest, pit, pvt_v2, qwen3_vit, swin_transformer*, tnt, twins, "
    "vision_transformer*, vitamin, volo, xcit",
    "convolutions with self- or linear attention (hybrids)": "byoanet, coat, cpubone, csatv2, edgenext, "
    "efficientformer*, efficientvit_*, iformer, levit, lowformer, maxxvit, mobilenetv5, mobilevit, nextvit, shvit, "
    "swiftformer, tiny_vit, visformer",
    "state-space, recurrent or MLP mixing of tokens": "efficientvim, mlp_mixer, sequencer",
}
NOT_TORCHVISION = ("vit_", "swin_", "maxvit")


class Library(StrEnum):
    torchvision = "torchvision"
    timm = "timm"


@dataclass
class Row:
    """One line of the table. A promise is True, False or None where it was not reached."""

    network: str
    side: int = 0
    cuts: int = 0
    exits: list[str] = field(default_factory=list)
    promises: dict[int, bool | None] = field(default_factory=lambda: {1: None, 2: None, 6: None})
    differences: dict[str, float | None] = field(default_factory=lambda: {"fvcore": None, "thop": None})
    disagreements: list[str] = field(default_factory=list)
    why_not: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return all(self.promises.values())

    def markdown(self) -> str:
        kept = [{True: "yes", False: "NO", None: "-"}[self.promises[number]] for number in (1, 2, 6)]
        why = "; ".join(self.why_not).replace("|", "\\|").replace("\n", " ")
        exits = ", ".join(self.exits)
        counted = ["-" if share is None else f"{100 * share:+.1f} %" for share in self.differences.values()]
        seconds = f"{self.seconds:.0f}"
        cells = [self.network, str(self.side or "-"), str(self.cuts), exits, *kept, *counted, seconds, why]
        return f"| {' | '.join(cells)} |"


HEADER = (
    "| network | input | cut points | exits at | promise 1 | 2 | 6 | fvcore | thop | s | why not |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def networks(library: Library) -> list[str]:
    """Names of what is checked, torchvision's by their parameters."""
    if library is Library.timm:
        return list(TIMM.values())
    from torchvision import models

    names = [name for name in models.list_models(module=models) if not name.startswith(NOT_TORCHVISION)]
    return sorted(names, key=lambda name: models.get_model_weights(name).DEFAULT.meta["num_params"])


def settle(network: nn.Module, images: Tensor) -> None:
    """Give batch norms the statistics of these images: a deep random network otherwise tells no image from another."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.momentum = 1.0
    network.train()(images)
    network.eval()


def check(library: Library, name: str, folder: Path, other: ProcessPoolExecutor) -> Row:
    """All promises on one network; what fails is in the row."""
    row, started = Row(name), time.monotonic()
    try:
        with torch.no_grad():
            _check(row, f"{library}:{name}", folder, other)
    except Exception as error:  # whatever a network does, the table says it and goes on
        row.why_not.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    row.seconds = time.monotonic() - started
    return row


def _check(row: Row, source: str, folder: Path, other: ProcessPoolExecutor) -> None:
    torch.manual_seed(0)
    network = dz.source(source)
    row.side = SIDES.get(row.network, SIDE)
    shape = (3, row.side, row.side)
    images = torch.randn(IMAGES, *shape) * torch.tensor([0.5, 1.0, 1.5, 2.0])[:, None, None, None]
    settle(network, images)

    counts = count_three_ways(network, shape)
    row.differences |= {one.counter: None if one.failure else counts.difference(one) for one in counts.others}
    row.disagreements = counts.disagreements()

    plain = wrap(network, shape)
    row.cuts = len(cut_points(plain.plain))
    dynamic, _ = apply(plain, Exits(count=2, head="conv"), Context())
    row.exits = [str(name) for name in dynamic.history[0]["at"]]
    wanted = network(images)
    if not bool(torch.isfinite(wanted).all()):
        row.why_not.append("the random network's own answers are not finite")
    row.promises[1] = torch.equal(dynamic(images), wanted)
    del network, plain

    logits, exits = expected(dynamic, images)
    with dz.record_routing(dynamic) as routing:
        found = dynamic(images)
    row.promises[2] = _promise_2(row, dynamic, images, (found, routing.exits), (logits, exits))

    artifact.save(dynamic, folder)
    setting = dynamic.setting
    del dynamic
    gc.collect()
    answer = other.submit(answers, folder, setting, images.numpy(), torch.get_num_threads()).result()
    row.promises[6] = bool(
        np.array_equal(answer[0], found.numpy()) and np.array_equal(answer[1], routing.exits.numpy())
    )
    if not row.promises[6]:
        distance = float(np.abs(answer[0] - found.numpy()).max())
        row.why_not.append(f"loaded elsewhere: logits differ by {distance:.1e}, exits {answer[1].tolist()}")


def expected(dynamic: DynamicNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
    """Set thresholds at the median of whoever still waits; the dense logits and exits that follow from them."""
    early = len(dynamic.leaving)
    for piece, logits in zip(dynamic.leaving, dynamic.all_exits(images)[:-1], strict=True):
        spread = (logits - logits.mean(dim=1, keepdim=True)).std().clamp_min(1e-6)
        linear = [module for module in piece.modules() if isinstance(module, nn.Linear)][-1]
        linear.weight.mul_(3 / spread)  # random heads are never sure
    every = dynamic.run(images, everyone=True)
    logits_KNC = torch.stack([*(logits for _, logits, _ in every.seen), every.logits])
    thresholds: dict[str, float | None] = {}
    exits_N = torch.full((len(images),), early)
    waiting = torch.ones(len(images), dtype=torch.bool)
    for k, (name, _, scores) in enumerate(every.seen):
        assert scores is not None
        ranked = scores[waiting].sort().values.tolist()
        middle = len(ranked) // 2
        thresholds[name] = threshold = (ranked[middle - 1] + ranked[middle]) / 2
        leaves = waiting & (scores >= threshold)
        exits_N[leaves], waiting = k, waiting & ~leaves
    dynamic.setting = Setting(thresholds)
    return logits_KNC[exits_N, torch.arange(len(images))], exits_N


def _promise_2(
    row: Row,
    dynamic: DynamicNetwork,
    images: Tensor,
    found: tuple[Tensor, Tensor],
    wanted: tuple[Tensor, Tensor],
) -> bool:
    failed = []
    if not torch.equal(found[1], wanted[1]):
        failed.append(f"left at {found[1].tolist()}, densely {wanted[1].tolist()}")
    distance = float((found[0] - wanted[0]).abs().max() / wanted[0].abs().max())
    if not distance <= TOLERANCE:
        failed.append(f"dynamic and dense answers differ by {distance:.1e}")
    executed, due = count_macs(dynamic, images), sum(leaving_cost(dynamic, images, k) for k in wanted[1].tolist())
    listed = exit_costs(dynamic).cumulative()[wanted[1].numpy()].sum()
    if executed != due or executed != listed:
        failed.append(f"executed {executed:.0f} MACs, one image at a time {due:.0f}, exit_costs says {listed:.0f}")
    row.why_not += failed
    return not failed


def leaving_cost(dynamic: DynamicNetwork, images: Tensor, exit_index: int) -> float:
    """MACs that one image executes to leave at this exit."""
    here = {piece.name: ALWAYS if k == exit_index else NEVER for k, piece in enumerate(dynamic.leaving)}
    return count_macs(dynamic.run, images[:1], Setting(here))


def answers(folder: Path, setting: Setting, images: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """In another process: load the artifact, and say what it answers and where each image leaves."""
    torch.set_num_threads(threads)
    dynamic = artifact.load(folder)
    dynamic.setting = setting
    with torch.no_grad(), dz.record_routing(dynamic) as routing:
        logits = dynamic(torch.from_numpy(images))
    del dynamic
    gc.collect()
    return logits.numpy(), routing.exits.numpy()


class Line(Protocol):
    """What was found out about one network."""

    network: str

    @property
    def good(self) -> bool: ...

    def markdown(self) -> str: ...


L = TypeVar("L", bound=Line)


@dataclass(frozen=True)
class Table(Generic[L]):
    """A table of networks.

    Attributes:
        row: class of a row, a dataclass.
        header: two lines of Markdown.
        check: finds out about one network; it is given a folder, and a process that never saw the network.
        summary: what the rows come to.
    """

    row: type[L]
    header: str
    check: Callable[[Library, str, Path, ProcessPoolExecutor], L]
    summary: Callable[[Library, list[L]], str]

    def write(
        self,
        library: Annotated[Library, typer.Option(help="where the networks come from")] = Library.torchvision,
        names: Annotated[str, typer.Option(help="comma-separated; empty: all")] = "",
        out: Annotated[Path | None, typer.Option(help="Markdown file to write as well")] = None,
    ) -> None:
        """Print the table line by line and what it comes to; exit code 1 if a network fails."""
        wanted = [name.strip() for name in names.split(",") if name.strip()] or networks(library)
        found: list[L] = []
        typer.echo(self.header)
        for row in self._rows(library, wanted, out):
            found.append(row)
            typer.echo(row.markdown())
        end = self.summary(library, found)
        typer.echo("\n" + end)
        if out is not None:
            lines = [self.header, *(row.markdown() for row in found), "", end, ""]
            out.write_text("\n".join(lines), encoding="utf-8")
        if not all(row.good for row in found):
            raise typer.Exit(1)

    def _rows(self, library: Library, names: list[str], out: Path | None) -> Iterator[L]:
        """One network after another, but those that an earlier run has done."""
        adapter = TypeAdapter(self.row)
        kept = None if out is None else out.with_suffix(".jsonl")
        done: dict[str, L] = {}
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
            done = {row.network: row for row in map(adapter.validate_json, lines)}
        spawn = multiprocessing.get_context("spawn")
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=10) as other,
        ):
            for name in names:
                row = done.get(name) or self.check(library, name, Path(folder), other)
                if kept is not None and name not in done:
                    with kept.open("a", encoding="utf-8") as file:
                        file.write(adapter.dump_json(row).decode() + "\n")
                yield row
                gc.collect()


def summary(library: Library, found: list[Row]) -> str:
    """The percentage, and what was left out and why."""
    good = sum(row.good for row in found)
    lines = [f"{good} of {len(found)} networks ({good / max(1, len(found)):.0%}) keep all three promises."]
    if library is Library.torchvision:
        left_out = ", ".join(f"{prefix}*" for prefix in NOT_TORCHVISION)
        lines.append(f"Not checked, because they are transformers: {left_out}.")
    else:
        lines += [f"Not checked, {reason}: {families}." for reason, families in NOT_TIMM.items()]
    differ = [f"- {row.network}: {'; '.join(row.disagreements)}." for row in found if row.disagreements]
    if differ:
        lines.append("\n".join(["Where the counters are further apart than 1 %:", "", *differ]))
    return "\n\n".join(lines)


main = Table(Row, HEADER, check, summary).write


if __name__ == "__main__":
    typer.run(main)
