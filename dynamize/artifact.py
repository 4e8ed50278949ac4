"""An artifact: a folder that holds a converted network as data, so that loading it runs nobody's code."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from dynamize.calibration.points import OperatingPoint, OperatingPoints
from dynamize.checkpoints import load_into, read_state_dict, save_safetensors_atomically
from dynamize.convert import replay
from dynamize.data.spec import DataSpec
from dynamize.errors import DynamizeError
from dynamize.files import write_text
from dynamize.nn.network import DynamicNetwork
from dynamize.sources import SourceSpec, build

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"


class Manifest(BaseModel):
    """What ``manifest.json`` holds: how to rebuild the structure, and at which operating points it can stand.

    ``source`` is None for a network that came from Python; it is then given again when loading.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    source: SourceSpec | None
    input: tuple[int, ...]
    history: list[dict[str, Any]]
    operating_points: OperatingPoints | None = None
    operating_point: OperatingPoint | None = None
    data: DataSpec | None = None
    classes: list[str] = []
    about: dict[str, Any] = {}
    versions: dict[str, str] = {}


def save(
    network: DynamicNetwork,
    path: str | os.PathLike[str],
    *,
    source: SourceSpec | None = None,
    data: DataSpec | None = None,
    classes: list[str] | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Write ``manifest.json`` and ``weights.safetensors`` into the folder ``path``.

    Args:
        network: what :func:`dynamize.convert` returned, trained or not.
        source: where the original network came from; known by itself if it was made by :func:`dynamize.source`.
        data: resolved description of the images, for ``predict`` and ``calibrate``.
        classes: their names.
        about: anything else worth keeping, as JSON.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    source = source or network.source
    manifest = Manifest(
        source=None if source is None else source.structure(),
        input=network.input_shape,
        history=network.history,
        operating_points=network.operating_points,
        operating_point=network.operating_point,
        data=data,
        classes=classes or [],
        about=about or {},
        versions=versions(),
    )
    save_safetensors_atomically(network.state_dict(), folder / WEIGHTS)
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")


def load(
    path: str | os.PathLike[str], *, network: nn.Module | None = None, trust_code: bool = False
) -> DynamicNetwork:
    """Rebuild what :func:`save` wrote, in eval mode and at the same operating point.

    Args:
        path: the folder.
        network: the original network's structure, needed if it came from Python; its weights do not matter.
        trust_code: whether a source such as ``file.py:factory`` may be imported.

    Raises:
        DynamizeError: a file is missing or damaged, or the source needs ``network`` or ``trust_code``.
    """
    manifest = read_manifest(path)
    if network is None:
        if manifest.source is None:
            raise DynamizeError(
                f"{path} was converted from a module in Python, whose code is not in the artifact: "
                "load it with dz.load(path, network=YourNetwork())"
            )
        network = build(manifest.source, trust_code=trust_code)
    rebuilt = replay(network, manifest.history, manifest.input)
    load_into(rebuilt, read_state_dict(Path(path) / WEIGHTS), f"the network in {path}", Path(path) / WEIGHTS)
    rebuilt.source = manifest.source
    rebuilt.operating_points = manifest.operating_points
    rebuilt.set_operating_point(manifest.operating_point)
    return rebuilt.eval()


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The checked ``manifest.json`` of an artifact."""
    file = Path(path) / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DynamizeError(
            f"{path} holds no artifact ({MANIFEST} is missing): name the folder that `dynamize run --out` wrote"
        ) from error
    except (ValidationError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DynamizeError(
            f"{file} is damaged or of another version: {str(error).splitlines()[0]}. Run the recipe again."
        ) from error


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in ("dynamize", "torch", "torchvision", "onnxruntime")}
    return found | {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
