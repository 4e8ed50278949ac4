"""What a run keeps in ``OUT/steps/N`` after each step, so that one that was stopped goes on from there."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dynamize.calibration.operating import OperatingPoint, OperatingPoints
from dynamize.checkpoints import load_into, read_state_dict, save_state_dict
from dynamize.errors import DynamizeError
from dynamize.files import write_text
from dynamize.folders import METRICS, STATE, STEPS, WEIGHTS
from dynamize.nn.network import DynamicNetwork
from dynamize.plan import longest_timing
from dynamize.recipe import Settings
from dynamize.report import Row
from dynamize.subject import Subject
from dynamize.transform import Transform
from dynamize.upgrade import upgraded

_OF_NO_STEP = {"expect", "description", "code", "compare"}  # settings that no step depends on, or not by their names


class StepState(BaseModel):
    """``OUT/steps/N/state.json``: enough, with the weights beside it, to go on after this step."""

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    history: list[dict[str, Any]]
    operating_points: OperatingPoints | None
    operating_point: OperatingPoint | None
    row: Row
    metrics: list[dict[str, Any]]


class KeptSteps:
    """The steps of a run in its folder.

    Args:
        out: the folder.
        fingerprint: of everything that the outcome of step N depends on, later steps not among it.
    """

    def __init__(self, out: Path, fingerprint: Callable[[int], str]) -> None:
        self.out, self._fingerprint = out, fingerprint

    def folder(self, index: int) -> Path:
        """Of one step; 0 is the untouched network."""
        return self.out / STEPS / str(index)

    def finished(self) -> list[StepState]:
        """Those that a run with the same fingerprints can go on from.

        Raises:
            DynamizeError: they are damaged, or the folder holds another run.
        """
        states: list[StepState] = []
        while (file := self.folder(len(states)) / STATE).exists():
            try:
                state = StepState.model_validate_json(file.read_text(encoding="utf-8"))
            except (ValidationError, UnicodeDecodeError) as error:
                raise DynamizeError(f"{file} is damaged: delete {self.out / STEPS} or run without --resume") from error
            if state.fingerprint != self._fingerprint(len(states)):
                break
            states.append(state)
        if not states and (self.folder(0) / STATE).exists():
            raise DynamizeError(
                f"{self.out} holds a run of another network or other images: give another --out, or --overwrite to "
                "start anew (in Python: out=..., overwrite=True)"
            )
        return states

    def open(self, index: int) -> None:
        """Clear what an earlier run with other settings left of a step, so that training never goes on from it."""
        folder, fingerprint = self.folder(index), self._fingerprint(index)
        mark = folder / "fingerprint"
        if mark.exists() and mark.read_text() != fingerprint:
            shutil.rmtree(folder)
        write_text(mark, fingerprint)

    def keep(self, index: int, network: DynamicNetwork, row: Row, metrics: Sequence[dict[str, Any]]) -> None:
        """Write what a step left; ``metrics`` are those of all steps so far."""
        folder = self.folder(index)
        folder.mkdir(parents=True, exist_ok=True)
        state = StepState(
            fingerprint=self._fingerprint(index),
            history=network.history,
            operating_points=network.operating_points,
            operating_point=network.operating_point,
            row=row,
            metrics=list(metrics),
        )
        save_state_dict(network.state_dict(), folder / WEIGHTS)
        write_text(folder / STATE, state.model_dump_json())
        for checkpoint in folder.rglob("checkpoint.pt"):  # steps that train in rounds have one for each
            checkpoint.unlink()

    def fill(self, network: DynamicNetwork, state: StepState) -> DynamicNetwork:
        """The network, of the structure that the state's history gives, as the step left it."""
        weights = self.folder(state.row.step) / WEIGHTS
        load_into(network, upgraded(read_state_dict(weights), network), "the network of this run", weights)
        network.operating_points = state.operating_points
        network.set_operating_point(state.operating_point)
        return network

    def metrics(self, index: int, members: Sequence[str]) -> list[dict[str, Any]]:
        """What a step wrote while it trained; each row with the ``member`` of a row of networks that it is of."""
        own = _lines(self.folder(index) / METRICS)
        return own + [
            {"member": name, **line} for name in members for line in _lines(self.folder(index) / name / METRICS)
        ]


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def fingerprint(settings: Settings, subject: Subject, index: int) -> str:
    """Of everything that the outcome of step ``index`` depends on, later steps not among it."""
    parts = settings.model_dump(mode="json", by_alias=True, exclude=_OF_NO_STEP)
    parts["steps"] = list(map(_counted, settings.steps[:index]))
    parts["timing_seconds"] = longest_timing(settings)
    return hashlib.sha256(json.dumps(parts | subject.identity(), sort_keys=True).encode()).hexdigest()


def _counted(step: Transform) -> dict[str, Any]:
    """A step as plain data, without what it got since and does not use."""
    plain = step.model_dump(mode="json", by_alias=True)
    fields = type(step).model_fields
    new = [name for name in step.added if getattr(step, name) == fields[name].get_default(call_default_factory=True)]
    return {name: value for name, value in plain.items() if name not in new}
