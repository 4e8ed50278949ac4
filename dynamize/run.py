"""Running a recipe: steps in order, a ledger row after each, an artifact and a report in the end.

After each step its outcome is kept in ``OUT/steps/N``, so that a run that was killed goes on from there.
"""

import copy
import hashlib
import json
import logging
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import BaseModel, ConfigDict, ValidationError

from dynamize import artifact
from dynamize.calibration.operating import OperatingPoint, OperatingPoints
from dynamize.checkpoints import load_into, read_state_dict, save_state_dict
from dynamize.conversion import apply, replay, wrap
from dynamize.data import Splits, load_data
from dynamize.devices import choose_device
from dynamize.errors import DynamizeError, InfeasibleError
from dynamize.evaluation import Evaluator
from dynamize.files import write_json_lines, write_text
from dynamize.folders import (
    LEDGER,
    METRICS,
    REPORT_DATA,
    REPORT_PAGE,
    REPORT_TEXT,
    STATE,
    STEPS,
    WEIGHTS,
    check_folder,
    check_space,
    clear,
)
from dynamize.measure.accuracy import judgeable
from dynamize.measure.memory import saved_bytes
from dynamize.nn.network import DynamicNetwork
from dynamize.plan import Plan, Planner, longest_timing
from dynamize.recipe import Bound, Recipe
from dynamize.rehearsal import Rehearsed, told
from dynamize.report import Ledger, ReportData, Rival, Row, html, markdown
from dynamize.report.folder import OF_OTHER_FILES
from dynamize.rivals import Rivals
from dynamize.runtime.engine import default_backend
from dynamize.sources import load_source
from dynamize.transform import Context, Progress, Transform, quiet
from dynamize.upgrade import upgraded
from dynamize.verbs.pictures import report_data

log = logging.getLogger("dynamize")

_COPIES = 6  # of the weights, beside one for each step: the artifact, and a checkpoint with its optimizer


@dataclass(frozen=True)
class Failure:
    """A figure of the last row, in the unit of the recipe, that is not between ``least`` and ``most``."""

    figure: str
    value: float
    least: float | None
    most: float | None


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: the network, what a report shows, which expectations failed, and what else to be told."""

    network: DynamicNetwork
    report: ReportData
    failures: list[Failure]
    warnings: list[str]


class StepState(BaseModel):
    """``OUT/steps/N/state.json``: enough, with the weights beside it, to go on after this step."""

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    history: list[dict[str, Any]]
    operating_points: OperatingPoints | None
    operating_point: OperatingPoint | None
    row: Row
    metrics: list[dict[str, Any]]


class Runner:
    """One run of a recipe into a folder.

    Args:
        recipe: checked.
        out: folder of the artifact.
        device: auto, cpu, cuda or mps.
        resume: go on from the steps that are finished in ``out``.
        overwrite: replace a run that ``out`` holds already; refused otherwise.
        trust_code: True runs the code that source and checkpoint name, None that of the source only, False none.
        progress: wraps long loops.
        command: what the user typed, for the report.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        *,
        device: str = "auto",
        resume: bool = False,
        overwrite: bool = False,
        trust_code: bool | None = False,
        progress: Progress = quiet,
        command: str = "",
    ) -> None:
        self.recipe, self.out, self.resume, self.command = recipe, out, resume, command
        self.trust_code = trust_code
        self.device = choose_device(device)
        self.state = PartialState(cpu=self.device.type == "cpu")
        self.backends: list[str] = list(recipe.backends) or [default_backend(self.device)]
        self.progress = progress if self.state.is_main_process else quiet
        if self.state.is_main_process:
            check_folder(out, resume=resume, overwrite=overwrite)
        torch.manual_seed(recipe.seed)  # a source without a checkpoint is the same network again after --resume
        self.teacher = load_source(recipe.model.spec(), trust_code).to(self.device).requires_grad_(False)
        self.static = wrap(self.teacher, recipe.model.input)
        check_space(out, (len(recipe.steps) + _COPIES) * saved_bytes(self.static))
        self.data = self._load_data()
        self.evaluator = Evaluator(
            self.static,
            self.data.test,
            self.device,
            self.backends,
            recipe.batches,
            longest_timing(recipe),
            self.progress,
        )
        self.rivals = self._rivals()
        self.planner = Planner(recipe, self.teacher, self.data, self.evaluator)

    def run(self) -> Outcome | None:
        """All steps; None in every process but the main one."""
        finished = self._finished()
        rehearsed, warnings = self._rehearse(finished), self.planner.warnings()
        for warning in warnings:
            log.warning("%s", warning)
        if not self.resume and self.state.is_main_process:
            clear(self.out)
        torch.manual_seed(self.recipe.seed)
        steps = self.recipe.transforms()
        network = self._restore(finished[-1]) if finished else wrap(self.teacher, self.recipe.model.input)
        network.requires_grad_(True)  # both were copied from the frozen teacher
        rows = [state.row for state in finished]
        metrics = finished[-1].metrics if finished else []
        for index in range(len(finished), len(steps) + 1):
            transform = steps[index - 1] if index else None
            self._open_step(index)
            network, notes, seconds = self._apply(index, transform, network, rehearsed.get(index))
            notes = [*notes, *([] if index else warnings)]
            metrics = metrics + self._step_metrics(index)
            if self.state.is_main_process:
                rows.append(self._measure(index, transform, network, notes, seconds))
                self._keep(index, network, rows[-1], metrics)
                log.info("%s", describe(rows[-1]))
            self.state.wait_for_everyone()
        if not self.state.is_main_process:
            return None
        return self._finish(network, rows, metrics)

    def plan(self) -> Plan:
        """What :meth:`run` would do; nothing is trained or written.

        Raises:
            DynamizeError: it cannot work.
        """
        return self.planner.plan(wrap(self.teacher, self.recipe.model.input), self._context())

    def _rehearse(self, finished: Sequence[StepState]) -> dict[int, Rehearsed]:
        """The steps that are left, by number."""
        network = self._restore(finished[-1]) if finished else wrap(self.teacher, self.recipe.model.input)
        network.requires_grad_(True)  # it was copied from the frozen teacher
        first = max(1, len(finished))
        steps = self.planner.rehearse(network, self._context(), first)
        return dict(enumerate(steps, start=first))

    def _load_data(self) -> Splits:
        recipe = self.recipe
        with torch.no_grad():
            classes = self.teacher(torch.zeros(1, *recipe.model.input, device=self.device)).shape[1]
        data = load_data(
            recipe.data.model_copy(update={"seed": recipe.data.seed or recipe.seed}), recipe.model.input, classes
        )
        return judgeable(data, self.teacher, self.device)

    def _rivals(self) -> Rivals | None:
        recipe = self.recipe
        return Rivals(recipe.compare, self.teacher, recipe.model.input, self._context()) if recipe.compare else None

    def _context(self, work: Path | None = None) -> Context:
        return Context(
            data=self.data,
            teacher=self.teacher,
            trust_code=bool(self.trust_code),
            device=self.device,
            seed=self.recipe.seed,
            backend=self.backends[0],
            work=work,
            resume=self.resume,
            progress=self.progress,
        )

    def _apply(
        self, index: int, transform: Transform | None, network: DynamicNetwork, rehearsed: Rehearsed | None
    ) -> tuple[DynamicNetwork, list[str], float]:
        if transform is None or not (self.state.is_main_process or transform.collective):
            return network, [], 0.0
        if rehearsed is not None and rehearsed.network is not None:
            return rehearsed.network, rehearsed.notes, rehearsed.seconds
        started = time.monotonic()
        try:
            network, notes = apply(network, transform, self._context(self.out / STEPS / str(index)))
        except InfeasibleError as error:
            raise InfeasibleError(told(error, index, transform, trained=True), error.nearest) from error
        return network, notes, time.monotonic() - started

    def _measure(
        self, index: int, transform: Transform | None, network: DynamicNetwork, notes: Sequence[str], seconds: float
    ) -> Row:
        name = transform.pass_name if transform else "static"
        return self.evaluator.row(index, name, network, seconds, notes)

    def _keep(self, index: int, network: DynamicNetwork, row: Row, metrics: list[dict[str, Any]]) -> None:
        folder = self.out / STEPS / str(index)
        folder.mkdir(parents=True, exist_ok=True)
        state = StepState(
            fingerprint=self._fingerprint(index),
            history=network.history,
            operating_points=network.operating_points,
            operating_point=network.operating_point,
            row=row,
            metrics=metrics,
        )
        save_state_dict(network.state_dict(), folder / WEIGHTS)
        write_text(folder / STATE, state.model_dump_json())
        for checkpoint in folder.rglob("checkpoint.pt"):  # steps that train in rounds have one for each
            checkpoint.unlink()

    def _fingerprint(self, index: int) -> str:
        """Of everything that the outcome of step ``index`` depends on, later steps not among it."""
        parts = self.recipe.model_dump(mode="json", by_alias=True, exclude={"expect", "description", "code", "compare"})
        parts["steps"] = list(map(_counted, self.recipe.steps[:index]))
        parts["timing_seconds"] = longest_timing(self.recipe)
        if self.recipe.code:
            parts["code"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in self.recipe.code]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _open_step(self, index: int) -> None:
        """Clear what an earlier run with other settings left of this step, so that training never goes on from it."""
        if self.state.is_main_process:
            folder = self.out / STEPS / str(index)
            mark = folder / "fingerprint"
            if mark.exists() and mark.read_text() != self._fingerprint(index):
                shutil.rmtree(folder)
            write_text(mark, self._fingerprint(index))
        self.state.wait_for_everyone()

    def _finished(self) -> list[StepState]:
        states: list[StepState] = []
        while self.resume:
            file = self.out / STEPS / str(len(states)) / STATE
            if not file.exists():
                break
            try:
                states.append(StepState.model_validate_json(file.read_text(encoding="utf-8")))
            except (ValidationError, UnicodeDecodeError) as error:
                raise DynamizeError(f"{file} is damaged: delete {self.out / STEPS} or run without --resume") from error
            if states[-1].fingerprint != self._fingerprint(len(states) - 1):
                states.pop()
                break
        if self.resume and not states and (self.out / STEPS / "0" / STATE).exists():
            raise DynamizeError(
                f"{self.out} holds a run of another network or other images: give another --out, or --overwrite to "
                "start anew"
            )
        return states

    def _restore(self, state: StepState) -> DynamicNetwork:
        weights = self.out / STEPS / str(state.row.step) / WEIGHTS
        trusting = Context(trust_code=bool(self.trust_code))
        network = replay(self.teacher, state.history, self.recipe.model.input, trusting)
        load_into(network, upgraded(read_state_dict(weights), network), "the network of this run", weights)
        network.operating_points = state.operating_points
        network.set_operating_point(state.operating_point)
        return network

    def _step_metrics(self, index: int) -> list[dict[str, Any]]:
        file = self.out / STEPS / str(index) / METRICS
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def _finish(self, network: DynamicNetwork, rows: list[Row], metrics: list[dict[str, Any]]) -> Outcome:
        recipe, out = self.recipe, self.out
        rivals: list[Rival] = []
        if self.rivals is not None:
            last, rivals = self.rivals.rows(network, rows[-1], self.evaluator, recipe.steps)
            rows = [*rows[:-1], last]
        ledger = Ledger(
            rows=rows,
            rivals=rivals,
            title=recipe.description or f"{recipe.model.source}, converted",
            model=recipe.model.source,
            command=self.command,
            backend=self.backends[0],
            machine=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        )
        report = report_data(ledger, network, self.evaluator, self.data)
        about = {"recipe": recipe.model_dump(mode="json", by_alias=True), "seed": recipe.seed}
        about |= {"ledger": ledger.model_dump(exclude={"rows"})}
        artifact.save(
            copy.deepcopy(network).cpu(),
            out,
            source=recipe.model.spec(),
            data=self.data.spec,
            classes=list(self.data.classes),
            about=about,
            code=recipe.code,
        )
        ledger.write(out / LEDGER)
        write_json_lines(out / METRICS, metrics)
        write_text(out / REPORT_DATA, report.model_dump_json(exclude=OF_OTHER_FILES))
        write_text(out / REPORT_PAGE, html.render(report))
        write_text(out / REPORT_TEXT, markdown.render(report))
        return Outcome(network, report, failures(recipe, rows[-1], self.backends[0]), self.planner.warnings())


def _counted(step: Transform) -> dict[str, Any]:
    """A step as plain data, without what it got since and does not use."""
    plain = step.model_dump(mode="json", by_alias=True)
    fields = type(step).model_fields
    new = [name for name in step.added if getattr(step, name) == fields[name].get_default(call_default_factory=True)]
    return {name: value for name, value in plain.items() if name not in new}


def run_recipe(recipe: Recipe, out: Path, **options: Any) -> Outcome | None:
    """Run a recipe; see :class:`Runner` for the options."""
    return Runner(recipe, out, **options).run()


def failures(recipe: Recipe, row: Row, backend: str) -> list[Failure]:
    """Which expectations the last row does not meet."""
    speedups = row.speedup.get(backend, {})
    found = {
        "accuracy": 100 * row.accuracy,
        "accuracy_drop": 100 * row.accuracy_drop,
        "macs_ratio": row.macs_ratio,
        "speedup": min(speedups.values()) if speedups else 1.0,
        "agreement": 100 * row.agreement,
    }
    failed = []
    for name, value in found.items():
        bound: Bound = getattr(recipe.expect, name) or Bound()
        too_small = bound.min is not None and value < bound.min
        too_large = bound.max is not None and value > bound.max
        if too_small or too_large:
            failed.append(Failure(name, value, bound.min, bound.max))
    return failed


def describe(row: Row) -> str:
    """A row as one plain line."""
    exits = f", exits {' '.join(f'{share:.0%}' for share in row.exits)}" if row.exits else ""
    return (
        f"step {row.step} {row.transform}: accuracy {row.accuracy:.2%}, {row.macs / 1e6:.1f} MMACs "
        f"({row.macs_ratio:.3f}){exits}, {row.seconds:.0f} s"
    )
