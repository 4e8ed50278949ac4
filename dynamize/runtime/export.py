"""A converted network as ONNX files, a plan of the routing between them, and a driver without torch."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynamize.errors import DynamizeError
from dynamize.files import atomically, write_text
from dynamize.graph.trace import blank
from dynamize.nn.network import DynamicNetwork
from dynamize.runtime.onnx import export_onnx, export_stage, stages_with_inputs

PLAN, DRIVER = "routing.json", "run.py"
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
    if network.units:
        raise DynamizeError(
            "a network with gates cannot be exported yet: its sessions live inside dynamize. Use `dynamize predict`, "
            "or dz.compile_network in Python"
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
    training = network.training
    stages = []
    for stage, inputs in stages_with_inputs(network.cpu().eval()):
        model, outputs = export_stage(stage, inputs)
        files = {f"stage-{stage.index + 1}.onnx": model}
        if not network.chained and stage.index < network.exit_count - 1:
            segment = export_onnx(network.segments[stage.index], inputs[:1], ["next_features"])
            files[f"stage-{stage.index + 1}-without-exit.onnx"] = segment
        stages.append(_Stage(files, ["features", "context"][: len(inputs)], outputs))
    network.train(training)
    return stages


def _plan(network: DynamicNetwork, stages: Sequence[_Stage]) -> dict[str, Any]:
    points = {point.name: list(point.thresholds) for point in network.operating_points or []}
    chosen = network.operating_point.name if network.operating_point else None
    if chosen is None or points.get(chosen) != network.thresholds:
        chosen = _AS_SAVED if any(one is not None for one in network.thresholds) else _ALL_OFF
        points = {chosen: list(network.thresholds), **points}
    described = []
    for stage in stages:
        file, without_exit = [*stage.files, None][:2]
        named = {"file": file, "without_exit": without_exit}
        described.append(named | {"inputs": stage.inputs, "outputs": stage.outputs})
    return {
        "input": list(network.input_shape),
        "classes": _class_count(network),
        "operating_point": chosen,
        "operating_points": points,
        "stages": described,
    }


def _class_count(network: DynamicNetwork) -> int:
    with torch.no_grad():
        return int(network.all_exits(blank(network, 1, *network.input_shape))[-1].shape[1])


def _replaceable(folder: Path) -> bool:
    """Whether only an earlier export lies there."""
    names = {file.name for file in folder.iterdir()}
    return not names or (PLAN in names and all(name in (PLAN, DRIVER) or name.endswith(".onnx") for name in names))
