"""A converted network as ONNX files, a plan of what is decided between them, and a driver without torch.

What is exported is what :func:`~dynamize.runtime.compiled.compile_network` compiles for ONNX Runtime, part by part;
what happens in between is what the pieces say of it (:mod:`dynamize.nn.instructions`).
"""

import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from dynamize.errors import DynamizeError
from dynamize.files import folder_at_once
from dynamize.nn.instructions import Rows
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Call, Piece, Setting, setting_at
from dynamize.runtime.compiled import CompiledNetwork
from dynamize.runtime.engine import Border
from dynamize.runtime.onnx import Session, as_onnx
from dynamize.runtime.onnxruntime import OnnxRuntime
from dynamize.runtime.session import session_options
from dynamize.runtime.threads import Threads, chosen_threads
from dynamize.runtime.trial import agree, listed

PLAN, DRIVER = "routing.json", "run.py"
END = "end"  # in the plan, the place at which those are answered who do not leave before
AS_SAVED = "as-saved"
_RUNS = ("bind", "decide", "let_go")  # the methods of a piece that `instruct` speaks of
_INSTEAD = "Use `dynamize predict`, or dz.compile_network in Python, which leave it to PyTorch. Nothing was changed."


def export(
    network: DynamicNetwork,
    folder: Path,
    *,
    images: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
    places: Sequence[str] = (),
    overwrite: bool = False,
) -> list[Path]:
    """Write all parts as ONNX, ``routing.json`` and ``run.py`` into a new folder, in one piece.

    ``routing.json`` holds the steps, each one word of :mod:`dynamize.nn.instructions` with the files that it concerns;
    and all operating points with the numbers of the steps that run at each, thresholds (a score >= threshold leaves),
    offset, and how answers are joined.

    Args:
        network: at the operating point that the driver uses by default.
        images: how image files are made ready, for the driver: channels, size (H, W), cover (H, W) or None,
            interpolation, and mean and deviation of pixels in 0..1.
        classes: their names, for the driver.
        places: what those that answer are called, in order.
        overwrite: replace an earlier export.

    Returns:
        The files.

    Raises:
        DynamizeError: the folder holds an earlier export and is not to be overwritten, or other things; a part cannot
            be exported; or a piece does not say what it does.
    """
    _check_target(folder, overwrite)
    for piece in network.row:
        _refuse_own_code(piece)
    with folder_at_once(folder) as new:
        plan = _Writer(network, new).plan() | {"images": images, "class_names": list(classes)}
        for place, name in zip(plan["places"].values(), places, strict=False):
            place["name"] = name
        shutil.copyfile(Path(__file__).with_name("driver.py"), new / DRIVER)
        (new / PLAN).write_text(json.dumps(plan, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        _check_target(folder, overwrite)  # again: another export may have ended meanwhile
    return sorted(folder.iterdir())


class _Writer:
    """Writes the files of one network into a folder."""

    def __init__(self, network: DynamicNetwork, folder: Path) -> None:
        self.network, self.folder = network, folder
        self.engine = _Recording(torch.device("cpu"))
        self.engine.threads = chosen_threads(None)
        self.compiled = CompiledNetwork(network, self.engine)
        for part, reason in self.compiled.in_torch.items():
            raise DynamizeError(f"{part} cannot be exported: {reason.rstrip('.')}. {_INSTEAD}")
        self.files: dict[Call, str] = {}

    def plan(self) -> dict[str, Any]:
        """What the driver reads; all files that it names have been written."""
        network = self.network
        settings = {point.name: setting_at(point) for point in network.operating_points or []}
        stated = {point.name: (point.macs_ratio, point.accuracy) for point in network.operating_points or []}
        here = network.operating_point.name if network.operating_point else None
        if here is None or settings.get(here) != network.setting:
            here = AS_SAVED
            settings = {here: network.setting, **settings}
        steps: list[dict[str, Any]] = []
        points = {}
        for name, setting in settings.items():
            macs_ratio, accuracy = stated.get(name, (None, None))
            points[name] = {
                "thresholds": {piece.name: _plainly(setting.thresholds.get(piece.name)) for piece in network.leaving},
                "offset": setting.offset,
                "combine": setting.combine,
                "runs": self._runs(setting, steps),
                "macs_ratio": macs_ratio,
                "accuracy": accuracy,
            }
        return {
            "input": list(network.input_shape),
            "classes": network.shapes[-1][0],
            "decisions": [decision.name for decision in network.decisions()],
            "places": self._places(),
            "operating_point": here,
            "operating_points": points,
            "steps": steps,
        }

    def _places(self) -> dict[str, dict[str, Any]]:
        """Where images are answered, and by what their logits are divided there; what ``joins`` has divided some."""
        scored = [(float(piece.temperature), piece.links) for piece in self.network.scored]
        names = [piece.name for piece in self.network.leaving]
        scored += [(1.0, False)] * (len(names) + 1 - len(scored))
        return {
            name: {"name": name, "temperature": temperature, "joins": joins}
            for name, (temperature, joins) in zip([*names, END], scored, strict=True)
        }

    def _runs(self, setting: Setting, steps: list[dict[str, Any]]) -> list[int]:
        """Numbers of the steps that run at a setting; new ones are added."""
        runs = []
        for piece, calls in self.compiled.called(setting):
            files = {part: self._file(piece, part, call) for part, call in calls.items() if call in self.engine.models}
            told = piece.instruct(files)
            step = {"do": told.do}
            step |= {one.name: self._data(piece, one.name, getattr(told, one.name)) for one in fields(told)}
            if step not in steps:
                steps.append(step)
            runs.append(steps.index(step))
        return runs

    def _file(self, piece: Piece, part: str, call: Call) -> str:
        """The file of a compiled part, which is written when it is first asked for."""
        if call not in self.files:
            name = f"{_plain(piece.name)}-{part}"
            variants = sum(file.startswith(f"{name}.") for file in self.files.values())
            self.files[call] = f"{name}.{variants + 1}.onnx" if variants else f"{name}.onnx"
            (self.folder / self.files[call]).write_bytes(self.engine.models[call])
        return self.files[call]

    def _data(self, piece: Piece, field: str, value: Any) -> Any:
        """A field of an instruction as JSON has it: modules are named by the files that they are in."""
        file = f"{_plain(piece.name)}-{field}"
        if isinstance(value, nn.Linear):
            weight, bias = (one.detach().numpy() for one in (value.weight, value.bias))
            np.savez(self.folder / f"{file}.npz", weight=weight.T, bias=bias)
            return f"{file}.npz"
        if isinstance(value, Rows):
            (self.folder / f"{file}.onnx").write_bytes(_rows_as_onnx(value, self.engine.threads))
            return f"{file}.onnx"
        return value


class _Recording(OnnxRuntime):
    """ONNX Runtime, with features in the layout that all machines have, and what each part was compiled of."""

    late_gates = False

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.models: dict[Call, bytes] = {}
        self._latest = b""

    def blocks(self, shape: tuple[int, ...]) -> bool:
        return False

    def load(self, model: bytes, channels: Mapping[str, int], overwrite: bool) -> Session:
        self._latest = model
        return super().load(model, channels, overwrite)

    def path(self, module: nn.Module, takes: Border, gives: Border, beside: int = 0) -> Call:
        return self._noted(super().path(module, takes, gives, beside))

    def gate(self, gate: nn.Module, takes: Border) -> Call:
        return self._noted(super().gate(gate, takes))

    def head(self, head: nn.Module, takes: Border, context: int) -> Call:
        return self._noted(super().head(head, takes, context))

    def both(self, path: nn.Module, head: nn.Module, takes: Border, gives: Border, context: int) -> Call:
        return self._noted(super().both(path, head, takes, gives, context))

    def _noted(self, call: Call) -> Call:
        self.models[call] = self._latest
        return call


@torch.inference_mode()
def _rows_as_onnx(rows: Rows, threads: Threads) -> bytes:
    """A small module as ONNX, which answers as it does."""
    inputs = [torch.randn(2, width, generator=torch.Generator().manual_seed(0)) for width in rows.takes.values()]
    model = as_onnx(rows.module, inputs, list(rows.takes), rows.gives)
    session = ort.InferenceSession(model, session_options(threads), providers=["CPUExecutionProvider"])
    found = session.run(list(rows.gives), {name: one.numpy() for name, one in zip(rows.takes, inputs, strict=True)})
    if not agree([torch.from_numpy(one) for one in found], listed(rows.module(*inputs)), OnnxRuntime.limit):
        raise DynamizeError(f"what decides cannot be exported: it differs in ONNX Runtime from PyTorch. {_INSTEAD}")
    return model


def _refuse_own_code(piece: Piece) -> None:
    """Refuse a piece whose class runs otherwise than the one that it has ``instruct`` from."""
    lineage = type(piece).__mro__
    first = {name: next((i for i, cls in enumerate(lineage) if name in vars(cls)), len(lineage)) for name in _RUNS}
    says = next(i for i, cls in enumerate(lineage) if "instruct" in vars(cls))
    if says > min(first.values()):
        raise DynamizeError(
            f"{piece.name} runs by code of its own and does not say in words what it does, so that no driver knows: "
            "give its class a method `instruct` beside `bind`, or use `dynamize predict`, or dz.compile_network in "
            "Python. Nothing was changed."
        )


def _check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a folder in which something would be lost."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    earlier = folder.is_dir() and (folder / PLAN).is_file() and all(_ours(file) for file in folder.iterdir())
    if not earlier:
        raise DynamizeError(f"{folder} is no empty folder: export to a new one. Nothing was changed.")
    if not overwrite:
        raise DynamizeError(
            f"{folder} holds an earlier export: add --overwrite to replace it (in Python: overwrite=True), or export "
            "to a new folder. Nothing was changed."
        )


def _plainly(threshold: float | None) -> float | None:
    """A threshold as JSON has it: None is out of reach, and the least number is reached by all scores."""
    if threshold is None or math.isnan(threshold) or threshold == math.inf:
        return None
    return max(threshold, -sys.float_info.max)


def _ours(file: Path) -> bool:
    return file.name in (PLAN, DRIVER, "__pycache__") or file.suffix in (".onnx", ".npz")


def _plain(name: str) -> str:
    """As part of a file's name."""
    return name.replace("/", ".").replace(" ", "_")
