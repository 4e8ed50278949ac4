"""Pretrained networks as others published them: accuracy on ImageNet-1k, MACs, preprocessing.

torchvision's weights carry all of it. timm ships its networks' preprocessing only; accuracies and MACs are in tables of
its repository, whose files the user names.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamize.errors import DynamizeError, closest
from dynamize.sources import SourceSpec, available

CLASSES = 1000
TIMM_TABLES = "https://github.com/huggingface/pytorch-image-models/tree/main/results"
_TORCHVISION_OTHERS = ("vision_transformer", "swin_transformer", "maxvit")  # files of networks that are no CNNs
# Files of timm 1.0 with CNNs, mixes of convolutions and attention aside.
TIMM_CNNS = {
    "byobnet", "convmixer", "convnext", "cspnet", "cspnext", "densenet", "dla", "dpn", "efficientnet",
    "fasternet", "fastvit", "focalnet", "ghostnet", "hardcorenas", "hgnet", "hrnet", "inception_next",
    "inception_resnet_v2", "inception_v3", "inception_v4", "lcnetv2", "mambaout", "metaformer", "mobilenetv3",
    "nasnet", "nfnet", "pnasnet", "rdnet", "regnet", "repghost", "repvit", "res2net", "resnest", "resnet",
    "resnetv2", "rexnet", "selecsls", "senet", "sknet", "starnet", "tresnet", "vgg", "vovnet", "xception",
    "xception_aligned",
}  # fmt: skip
_TIMM_HYBRIDS = ("caformer", "hybrid")  # with attention, in files of CNNs
_ACCURACY, _MACS, _SIZES = ("top1",), ("infer_gmacs", "gmacs"), ("img_size", "infer_img_size")


@dataclass(frozen=True)
class Published:
    """A pretrained network, as it was published.

    Attributes:
        source: what a recipe calls it, weights included.
        label: the same, shorter, for tables.
        network: its source without weights.
        accuracy: top-1 on ImageNet-1k, in percent.
        macs: per image.
        size: height and width of its input.
        resize: shorter side before the centre crop.
        normalize: mean and deviation of pixels in 0..1.
    """

    source: str
    label: str
    network: str
    accuracy: float
    macs: float
    size: int
    resize: int
    normalize: tuple[tuple[float, ...], tuple[float, ...]]


def torchvision_networks() -> list[Published]:
    """The CNNs of the installed torchvision, each with every one of its weights that have an accuracy."""
    from torchvision import models

    found = []
    for name in available("torchvision"):
        if models.get_model_builder(name).__module__.rpartition(".")[2] not in _TORCHVISION_OTHERS:
            found += [_of_torchvision(name, weights) for weights in models.get_model_weights(name)]
    return [one for one in found if math.isfinite(one.accuracy)]


def timm_networks(tables: Sequence[Path]) -> tuple[list[Published], list[str]]:
    """The CNNs of the installed timm that have both figures in tables of its repository; notes on what was left out.

    Args:
        tables: CSV files with the columns ``model`` and ``top1``, ``img_size`` (results-imagenet.csv) or
            ``infer_gmacs``, ``infer_img_size`` (benchmark-infer-*.csv), in any order.

    Raises:
        DynamizeError: timm is not installed; a file is missing, or has none of these columns.
    """
    known = set(available("timm"))
    rows = [row for table in tables for row in _read(table)]
    accuracies = [row for row in rows if _number(row, _ACCURACY)]
    macs: dict[str, dict[int, float]] = {}
    for row in rows:
        if giga := _number(row, _MACS):
            size = int(_number(row, _SIZES) or 0)
            macs.setdefault(row["model"].partition(".")[0], {})[size] = giga * 1e9
    cnns = [row for row in accuracies if (name := row["model"].partition(".")[0]) in known and _is_cnn(name)]
    made = [_of_timm(row, macs.get(row["model"].partition(".")[0], {})) for row in cnns]
    found = [one for one in made if one is not None]
    silent = sum(row["model"].partition(".")[0] not in macs for row in cnns)
    notes = [f"{silent} timm networks are left out: the tables have no infer_gmacs of theirs"] if silent else []
    if not accuracies:
        notes.append("the timm tables have no accuracies (column top1): add results-imagenet.csv")
    return found, notes


def find_network(spec: SourceSpec, networks: Sequence[Published]) -> Published:
    """The published network that a source names; of several weights the newest, unless it names some.

    Raises:
        DynamizeError: nobody published figures of it, or it is not the network that they were published for.
    """
    given = {key: value for key, value in spec.kwargs.items() if value is not None}
    weights = given.pop("weights", None) or "DEFAULT"
    given.pop("pretrained", None)
    if given:
        changed = ", ".join(f"{key}={value}" for key, value in given.items())
        raise DynamizeError(
            f"Nobody published figures of {spec.source} with {changed}: leave that out to see those on ImageNet."
        )
    name = spec.source if spec.library != "timm" else f"timm:{_tagged(spec.target[1])}"
    same = [one for one in networks if one.network == name]
    if not same:
        near = closest(spec.source, sorted({one.network for one in networks}))
        raise DynamizeError(
            f"No accuracy and MACs of {spec.source!r} are known here. {near}Known are torchvision's pretrained CNNs, "
            "and timm's that are in tables given with --timm-results; for any other network say --accuracy."
        )
    if spec.library == "timm":
        return same[0]
    named = {one.source.rpartition("=")[2]: one for one in same}
    key = str(weights).rpartition(".")[2]
    if key == "DEFAULT":
        key = _default_weights(spec.target[1])
    if key not in named:
        raise DynamizeError(
            f"{spec.source} has no weights {weights!r} with a published accuracy: use one of {', '.join(named)}."
        )
    return named[key]


def _default_weights(name: str) -> str:
    from torchvision import models

    default: str = models.get_model_weights(name).DEFAULT.name
    return default


def _tagged(name: str) -> str:
    """A timm network's name with the tag of its weights; timm's choice where it has none."""
    import timm

    config = None if "." in name else timm.get_pretrained_cfg(name, allow_unregistered=True)
    return f"{name}.{config.tag}" if config is not None and config.tag else name


def _of_torchvision(name: str, weights: Any) -> Published:
    transform = weights.transforms()
    return Published(
        source=f"torchvision:{name},weights={weights.name}",
        label=f"{name} {weights.name.removeprefix('IMAGENET1K_')}",
        network=f"torchvision:{name}",
        accuracy=weights.meta["_metrics"]["ImageNet-1K"]["acc@1"],
        macs=weights.meta["_ops"] * 1e9,
        size=transform.crop_size[0],
        resize=transform.resize_size[0],
        normalize=(tuple(transform.mean), tuple(transform.std)),
    )


def _is_cnn(architecture: str) -> bool:
    import timm

    in_file: bool = timm.models.is_model_in_modules(architecture, TIMM_CNNS)
    return in_file and not any(word in architecture for word in _TIMM_HYBRIDS)


def _of_timm(row: Mapping[str, str], macs: Mapping[int, float]) -> Published | None:
    """A row of timm's table of accuracies; None without MACs, or for other classes than ImageNet-1k's."""
    import timm

    name = row["model"]
    config = timm.get_pretrained_cfg(name)
    accuracy, size = _number(row, _ACCURACY), int(_number(row, _SIZES) or 0)
    if not (config and macs and accuracy and size and config.num_classes == CLASSES):
        return None
    near = min(macs, key=lambda one: abs(one - size))
    return Published(
        source=f"timm:{name},pretrained=true",
        label=f"timm:{name}",
        network=f"timm:{name}",
        accuracy=accuracy,
        macs=macs[near] * (size / near) ** 2 if near else macs[near],
        size=size,
        resize=math.floor(size / (_number(row, ("crop_pct",)) or config.crop_pct)),
        normalize=(tuple(config.mean), tuple(config.std)),
    )


def _read(table: Path) -> Iterator[dict[str, str]]:
    try:
        with table.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            columns = set(reader.fieldnames or ())
            if "model" not in columns or not columns & {*_ACCURACY, *_MACS}:
                raise DynamizeError(
                    f"{table} is no table of timm's: it lacks the columns model, and top1 or infer_gmacs. Take "
                    f"results-imagenet.csv and a benchmark-infer-*.csv from {TIMM_TABLES}"
                )
            yield from (row for row in reader if row["model"])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DynamizeError(f"Cannot read {table}: {getattr(error, 'strerror', None) or error}.") from error


def _number(row: Mapping[str, str | None], columns: Sequence[str]) -> float | None:
    """The first of the columns that is there, as a number above 0."""
    for column in columns:
        try:
            value = float((row.get(column) or "").replace(",", ""))
        except ValueError:
            continue
        return value if math.isfinite(value) and value > 0 else None
    return None
