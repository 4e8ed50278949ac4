"""A converted network as ONNX files, a plan of the routing between them, and a driver without torch."""

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynamize.errors import DynamizeError
from dynamize.files import atomically, write_text
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Piece
from dynamize.nn.quantized import is_quantized
from dynamize.runtime.engine import Border
from dynamize.runtime.onnx import INPUTS, NEXT, NEXT_CONTEXT, PathAndHead, export_onnx
from dynamize.runtime.onnxruntime import OnnxRuntime
from dynamize.runtime.threads import chosen_threads
from dynamize.runtime.trial import Features, agree, limit_of, listed

PLAN, DRIVER = "routing.json", "run.py"
_INSTEAD = (
    "Use `dynamize predict`, or dz.compile_network in Python, which leave such a stage to PyTorch. Nothing was changed."
)
_AS_SAVED, _ALL_OFF = "as-saved", "exits-off"


def export(
    network: DynamicNetwork,
    folder: Path,
    *,
    normalize: Sequence[Sequence[float]] | None = None,
    classes: Sequence[str] = (),
) -> list[Path]:
    """Write ``stage-K.onnx`` for every stage, ``routing.json`` and ``run.py`` into an empty or new folder.

    ``routing.json`` holds the stages in order with the names of their inputs and outputs, the thresholds of all
    operating points (a score >= threshold leaves; null: the exit is off and ``without_exit``, the stage without its
    head, runs instead), the input shape (C, H, W) and how images are normalised.

    Args:
        network: at the operating point that the driver uses by default.
        normalize: means and deviations of pixels in 0..1, for the plan.
        classes: their names, for the plan.

    Returns:
        The files.

    Raises:
        DynamizeError: the folder holds other things, or a stage cannot be exported.
    """
    if network.changing:
        raise DynamizeError(
            "a network with gates cannot be exported yet: its sessions live inside dynamize. Use `dynamize predict`, "
            "or dz.compile_network in Python"
        )
    if own := [piece.name for piece in network.row if not (piece.answers or piece.straight)]:
        raise DynamizeError(
            f"{', '.join(own)} run(s) by code of its own, which no driver has: such a network cannot be exported. Use "
            "`dynamize predict`, or dz.compile_network in Python. Nothing was changed."
        )
    if folder.exists() and (not folder.is_dir() or not _replaceable(folder)):
        raise DynamizeError(f"{folder} is not an empty folder: export to a new one. Nothing was changed.")
    stages = _export_stages(network)
    plan = _plan(network, stages) | {"normalize": normalize, "class_names": list(classes)}
    written = []
    for name, content in (item for stage in stages for item in stage.files.items()):
        written.append(folder / name)
        with atomically(written[-1]) as path:
            path.write_bytes(content)
    with atomically(folder / DRIVER) as path:
        shutil.copyfile(Path(__file__).with_name("driver.py"), path)
    write_text(folder / PLAN, json.dumps(plan, indent=1, allow_nan=False) + "\n")
    return [*written, folder / PLAN, folder / DRIVER]


@dataclass(frozen=True)
class _Stage:
    files: dict[str, bytes]  # with its exit, then without it unless the exit must run
    inputs: list[str]
    outputs: list[str]


def _export_stages(network: DynamicNetwork) -> list[_Stage]:
    """A path and the head behind it each; the last one has none, or one that adds what the exits saw."""
    network = copy.deepcopy(network).cpu().eval()
    stages, border, features = [], 0, Features(network, alike=True)
    for number, (path, head) in enumerate(_pairs(network.row), start=1):
        module: nn.Module = nn.Identity() if path is None else path.parts()[0].module
        takes, reached = Border(network.shapes[border]), features.at(border)
        border += path is not None
        context = network.contexts[head.name] if head is not None else 0
        early = head is not None and head.effect == "leaves"
        outputs = ["logits"]
        if early:
            outputs = [NEXT, "logits", "score", *([NEXT_CONTEXT] if head.chained else [])]
        both = module if head is None else PathAndHead(module, head, early)
        files = {f"stage-{number}.onnx": _export(both, takes, context, outputs, reached)}
        if early and not head.chained:
            files[f"stage-{number}-without-exit.onnx"] = _export(module, takes, 0, [NEXT], reached)
        stages.append(_Stage(files, INPUTS[: 2 if context else 1], outputs))
    return stages


@torch.inference_mode()
def _export(module: nn.Module, takes: Border, context: int, outputs: list[str], features: Tensor) -> bytes:
    """ONNX that answers as the module does, in ONNX Runtime."""
    inputs = [features, *([torch.randn(len(features), context)] if context else [])]
    engine = OnnxRuntime(torch.device("cpu"))
    engine.threads = chosen_threads(None)
    wanted = listed(module(*[one.clone() for one in inputs]))
    try:
        found = export_onnx(module, takes, context, outputs)
        answers = engine.load(found, {}, overwrite=False)(inputs)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise DynamizeError(f"a stage cannot be exported: {reason}. {_INSTEAD}") from error
    if not agree(answers, wanted, limit_of(engine, is_quantized(module))):
        raise DynamizeError(
            f"a stage cannot be exported: it answers otherwise in ONNX Runtime than in PyTorch. {_INSTEAD}"
        )
    return found


def _pairs(row: Sequence[Piece]) -> list[tuple[Piece | None, Any]]:
    """A path and the head behind it each; None where two heads follow each other, or at the end."""
    found: list[tuple[Piece | None, Any]] = []
    for piece in row:
        if not piece.answers:
            found.append((piece, None))
        elif found and found[-1][1] is None:
            found[-1] = found[-1][0], piece
        else:
            found.append((None, piece))
    return found


def _plan(network: DynamicNetwork, stages: Sequence[_Stage]) -> dict[str, Any]:
    def listed(thresholds: Mapping[str, float | None]) -> list[float | None]:
        return [thresholds.get(piece.name) for piece in network.leaving]

    points = {point.name: listed(point.thresholds) for point in network.operating_points or []}
    chosen, here = network.operating_point.name if network.operating_point else None, listed(network.setting.thresholds)
    if chosen is None or points.get(chosen) != here:
        chosen = _AS_SAVED if any(one is not None for one in here) else _ALL_OFF
        points = {chosen: here, **points}
    described = []
    for stage in stages:
        file, without_exit = [*stage.files, None][:2]
        named = {"file": file, "without_exit": without_exit}
        described.append(named | {"inputs": stage.inputs, "outputs": stage.outputs})
    return {
        "input": list(network.input_shape),
        "classes": network.shapes[-1][0],
        "operating_point": chosen,
        "operating_points": points,
        "stages": described,
    }


def _replaceable(folder: Path) -> bool:
    """Whether only an earlier export lies there."""
    names = {file.name for file in folder.iterdir()}
    return not names or (PLAN in names and all(name in (PLAN, DRIVER) or name.endswith(".onnx") for name in names))
