"""Solving an artifact's thresholds again: another budget or other images, no training, one file replaced."""

from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn

from dynamize import artifact
from dynamize.artifact import Manifest
from dynamize.conversion import apply
from dynamize.data import load_data
from dynamize.devices import choose_device
from dynamize.errors import DynamizeError
from dynamize.faults import explain
from dynamize.measure.accuracy import judgeable
from dynamize.nn.network import DynamicNetwork
from dynamize.runtime.engine import default_backend
from dynamize.sources import SourceSpec, Weights, load_source
from dynamize.transform import Context
from dynamize.transforms import Calibrate


def budget(
    *,
    max_drop: float | None = None,
    macs_ratio: float | None = None,
    macs: float | None = None,
    latency_ms: float | None = None,
    labels: str | None = None,
    certain: float | None = None,
) -> Calibrate:
    """The `calibrate` step for one budget as the command line gives it; DynamizeError for an impossible one."""
    how = {"labels": labels, "certain": certain}
    budgets = {"max_drop": max_drop, "macs_ratio": macs_ratio, "macs": macs, "latency_ms": latency_ms}
    given: dict[str, float | str] = {key: value for key, value in budgets.items() if value is not None}
    if len(given) > 1:
        flags = " and ".join(f"--{key.replace('_', '-')}" for key in given)
        raise DynamizeError(f"{flags} are budgets each: give one of them")
    given |= {key: value for key, value in how.items() if value is not None}
    try:
        return Calibrate.model_validate(given)
    except ValidationError as error:
        raise DynamizeError(f"the budget cannot be used:{explain(error, Calibrate, given)}") from error


def recalibrate(
    path: Path,
    step: Calibrate,
    *,
    data: str | None = None,
    checkpoint: Weights | None = None,
    device: str = "auto",
    trust_code: bool = False,
) -> tuple[DynamicNetwork, list[str]]:
    """Calibrate an artifact on its calibration split and replace its ``manifest.json`` in one piece.

    Args:
        path: folder of the artifact.
        step: the budget.
        data: where the images lie now, if not where the run found them.
        checkpoint: of the original network, against which drops are judged; None means the run's own.

    Returns:
        The network at its new operating point, and notes for people.

    Raises:
        DynamizeError: the original network cannot be had, or the budget is infeasible; nothing is changed then.
    """
    manifest = artifact.read_manifest(path)
    network = artifact.load(path, trust_code=trust_code)
    chosen = choose_device(device)
    teacher = original(manifest, path, checkpoint, trust_code).to(chosen).requires_grad_(False)
    channels, height, width = manifest.input
    spec = artifact.image_spec(manifest, path, data)
    splits = load_data(spec, (channels, height, width), len(manifest.classes) or None, decoded=("calibration",))
    context = Context(
        data=judgeable(splits, teacher, chosen),
        teacher=teacher,
        device=chosen,
        seed=int(manifest.about.get("seed", 0)),
        backend=_backend(manifest, chosen),
    )
    network.history = [one for one in network.history if one.get("pass") != step.pass_name]
    network, notes = apply(network, step, context)
    again = {"step": step.describe(), "data": spec.source}
    changed = manifest.model_copy(
        update={
            "history": network.history,
            "temperatures": artifact.temperatures(network),
            "operating_points": network.operating_points,
            "operating_point": network.operating_point,
            "about": manifest.about | {"recalibrated": again},
        }
    )
    artifact.write_manifest(path, changed)
    return network, notes


def original(manifest: Manifest, path: Path, checkpoint: Weights | None, trust_code: bool) -> nn.Module:
    """The original network with its weights, in eval mode.

    Raises:
        DynamizeError: neither ``checkpoint`` nor what the run recorded gives them.
    """
    if checkpoint is not None and manifest.source is not None:
        return load_source(manifest.source.with_weights(checkpoint), trust_code)
    recorded = manifest.about.get("recipe", {}).get("model")
    if recorded is None:
        raise DynamizeError(
            f"{path} does not record the checkpoint of the original network, against which accuracy drops are judged: "
            "give it with --checkpoint FILE"
        )
    spec = SourceSpec.model_validate({key: value for key, value in recorded.items() if key != "input"})
    if spec.weights is not None and not spec.weights.file.exists():
        raise DynamizeError(
            f"the checkpoint of the original network, {spec.weights.file}, is not here: run this where the recipe ran, "
            "or give the file with --checkpoint FILE"
        )
    torch.manual_seed(int(manifest.about.get("seed", 0)))  # as the run did, where there was no checkpoint
    return load_source(spec, trust_code)


def _backend(manifest: Manifest, device: torch.device) -> str:
    recorded = manifest.about.get("recipe", {}).get("backends") or [default_backend(device)]
    return str(recorded[0])
