"""An artifact: a folder that holds a converted network as data, so that loading it runs nobody's code."""

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from dynamize.arguments import given_network
from dynamize.calibration.operating import OperatingPoint, OperatingPoints
from dynamize.checkpoints import load_into, read_state_dict, save_state_dict
from dynamize.conversion import replay
from dynamize.data.spec import DataSpec
from dynamize.errors import DynamizeError
from dynamize.files import write_text
from dynamize.fingerprint import Answers
from dynamize.folders import CODE, MANIFEST, WEIGHTS, code_files
from dynamize.nn.network import DynamicNetwork
from dynamize.sources import SourceSpec, build
from dynamize.transform import Context, registered
from dynamize.upgrade import upgraded, upgraded_manifest
from dynamize.usercode import import_file


class Manifest(BaseModel):
    """What ``manifest.json`` holds: how to rebuild the structure, and at which operating points it can stand.

    ``source`` is None for a network that came from Python; it is then given again when loading. ``temperatures``, by
    name of the decision, stand here and win over the buffers in the weights, because the thresholds hold for them only:
    calibrating again replaces this one file. ``answers`` tell whether the source is still the same code; artifacts that
    were written before have none.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[2] = 2
    source: SourceSpec | None
    input: tuple[int, ...]
    history: list[dict[str, Any]]
    answers: Answers | None = None
    temperatures: dict[str, float] | None = None
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
    code: Sequence[Path] = (),
) -> None:
    """Write ``manifest.json`` and ``weights.safetensors`` into the folder ``path``.

    Args:
        network: what :func:`dynamize.convert` returned, trained or not.
        source: where the original network came from; known by itself if it was made by :func:`dynamize.source`.
        data: resolved description of the images, for ``predict`` and ``calibrate``.
        classes: their names.
        about: anything else worth keeping, as JSON.
        code: files that define transforms of the user's own; they are copied, and run when loading if they are trusted.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dz.save(dz.convert(net, [dz.Exits()], (1, 8, 8)), "out")
    """
    if not isinstance(network, DynamicNetwork):
        raise DynamizeError("dz.save keeps a converted network: make it with dz.convert(network, [...], input_shape)")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    source = source or network.source
    manifest = Manifest(
        source=None if source is None else source.structure(),
        input=network.input_shape,
        history=network.history,
        answers=Answers.of(network),
        temperatures=temperatures(network),
        operating_points=network.operating_points,
        operating_point=network.operating_point,
        data=data,
        classes=classes or [],
        about=about or {},
        versions=versions(),
    )
    save_state_dict(network.state_dict(), folder / WEIGHTS)
    for file in code:
        (folder / CODE).mkdir(exist_ok=True)
        shutil.copy(file, folder / CODE)
    write_manifest(folder, manifest)


def load(
    path: str | os.PathLike[str],
    *,
    network: nn.Module | None = None,
    members: Mapping[str, nn.Module] | None = None,
    trust_code: bool = False,
) -> DynamicNetwork:
    """Rebuild what :func:`save` wrote, in eval mode and at the same operating point.

    Args:
        path: the folder.
        network: the original network's structure, needed if it came from Python; its weights do not matter.
        members: the same of networks in front of it that came from Python, by name.
        trust_code: whether a source such as ``file.py:factory``, and transforms that the artifact brings, may be
            imported.

    Raises:
        DynamizeError: a file is missing or damaged, the source needs ``network`` or ``trust_code``, a step needs a
            transform that is not here, or the network answers otherwise than the one that was converted.

    Example:
        >>> net = dz.source("dynamize:digits_resnet", pretrained=True)
        >>> dz.save(dz.convert(net, [dz.Exits()], (1, 8, 8)), "out")
        >>> dz.load("out").history[0]["pass"]
        'exits'
    """
    manifest = read_manifest(path)
    if network is None:
        if manifest.source is None:
            raise DynamizeError(
                f"{path} was converted from a module in Python, whose code is not in the artifact: "
                "load it with dz.load(path, network=YourNetwork())"
            )
        network = build(manifest.source, trust_code=trust_code)
    given_network(network, "dz.load")
    _find_transforms(manifest, Path(path), trust_code)
    try:
        given = Context(members=members or {}, trust_code=trust_code)
        rebuilt = replay(network, manifest.history, manifest.input, given)
    except ValidationError as error:
        raise DynamizeError(
            f"{Path(path) / MANIFEST} has a step in its history that this version does not know: {_first_line(error)}. "
            "Use the version of dynamize that wrote it, or run the recipe again."
        ) from error
    state = upgraded(read_state_dict(Path(path) / WEIGHTS), rebuilt)
    load_into(rebuilt, state, f"the network in {path}", Path(path) / WEIGHTS)
    _refuse_other_code(rebuilt, manifest, Path(path), type(network).__name__)
    if manifest.temperatures is not None:
        _set_temperatures(rebuilt, manifest.temperatures, Path(path) / MANIFEST)
    rebuilt.source = manifest.source
    rebuilt.operating_points = manifest.operating_points
    rebuilt.set_operating_point(manifest.operating_point)
    return rebuilt.eval()


def _refuse_other_code(network: DynamicNetwork, manifest: Manifest, folder: Path, name: str) -> None:
    """Refuse a network that has the shapes of the converted one and computes something else."""
    if manifest.answers is None:
        return
    try:
        distance = manifest.answers.distance(network)
        how = f"its answers to fixed noise differ by {distance:.2g} of their spread"
    except (RuntimeError, TypeError, ValueError) as error:
        distance, how = float("inf"), f"it does not run as that one did ({_first_line(error)})"
    if distance <= manifest.answers.tolerance:
        return
    now = versions()
    other = [f"{key} {old} (here {now[key]})" for key, old in manifest.versions.items() if now.get(key, old) != old]
    other = [one for one in other if not one.startswith("threads")]
    written = f"; it was written with {', '.join(other)}" if other else ""
    raise DynamizeError(
        f"{folder} was converted from another network than {name}: with the same weights {how}. Its code, a constant "
        f"or a buffer that is not saved is another one: give the network that was converted{written}."
    )


def _find_transforms(manifest: Manifest, folder: Path, trust_code: bool) -> None:
    """See to it that the transform of each step is here, from what the artifact brings if that is trusted."""
    missing, brought = _missing(manifest), code_files(folder)
    if missing and trust_code:
        for file in brought:
            import_file(file)
        missing = _missing(manifest)
    if not missing:
        return
    repair = (
        "Import the module that defines it before loading, or install the package or the newer version of dynamize "
        "that brings it."
    )
    if brought and not trust_code:
        files = ", ".join(str(file) for file in brought)
        repair = f"The artifact brings it: read {files}, then add --trust-code (in Python: trust_code=True)."
    raise DynamizeError(f"{folder} needs the code of the transform {', '.join(missing)}, which is not here. {repair}")


def _missing(manifest: Manifest) -> list[str]:
    known = registered()
    return [f"`{step['pass']}`" for step in manifest.history if "pass" in step and step["pass"] not in known]


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The checked ``manifest.json`` of an artifact."""
    file = Path(path) / MANIFEST
    try:
        return Manifest.model_validate(upgraded_manifest(json.loads(file.read_text(encoding="utf-8"))))
    except FileNotFoundError as error:
        raise DynamizeError(
            f"{path} holds no artifact ({MANIFEST} is missing): name the folder that `dynamize run --out` wrote"
        ) from error
    except (ValidationError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DynamizeError(
            f"{file} is damaged or of another version: {_first_line(error)}. Run the recipe again."
        ) from error


def write_manifest(path: str | os.PathLike[str], manifest: Manifest) -> None:
    """Replace ``manifest.json`` in one piece."""
    write_text(Path(path) / MANIFEST, manifest.model_dump_json(indent=1) + "\n")


def image_spec(manifest: Manifest, path: str | os.PathLike[str], source: str | None = None) -> DataSpec:
    """The artifact's images, or those of another ``source``.

    Raises:
        DynamizeError: the artifact names no images and ``source`` is not given, or ``source`` is none.
    """
    if manifest.data is None and source is None:
        raise DynamizeError(f"{path} does not say which images it was made with: name them with --data")
    kept = {} if manifest.data is None else manifest.data.model_dump()
    given = {} if source is None else {"source": source}
    try:
        return DataSpec.model_validate({**kept, **given})
    except ValidationError as error:
        raise DynamizeError(f"--data {source}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error


def temperatures(network: DynamicNetwork) -> dict[str, float]:
    """By name of the decision, what its logits are divided by before they are scored."""
    return {piece.name: float(piece.temperature) for piece in network.scored}


def _set_temperatures(network: DynamicNetwork, given: Mapping[str, float], file: Path) -> None:
    pieces = {piece.name: piece for piece in network.scored}
    if set(given) != set(pieces):
        raise DynamizeError(
            f"{file} is damaged: it has temperatures for {', '.join(given) or 'no exit'}, the network has "
            f"{', '.join(pieces) or 'no early exit'}. Run the recipe again."
        )
    for name, temperature in given.items():
        pieces[name].temperature.fill_(temperature)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in ("dynamize", "torch", "torchvision", "onnxruntime")}
    return found | {"python": platform.python_version(), "threads": str(torch.get_num_threads())}


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        return f"{where}: {fault['msg']}" if where else fault["msg"]
    return str(error).splitlines()[0]
