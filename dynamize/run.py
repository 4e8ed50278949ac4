"""Running steps in order, from a recipe or a script: a ledger row after each, an artifact and a report in the end."""

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from dynamize import artifact
from dynamize.baseline import Baseline, judged
from dynamize.conversion import apply, replay, wrap
from dynamize.data import Splits
from dynamize.devices import choose_device, machine_name
from dynamize.errors import InfeasibleError
from dynamize.evaluation import Evaluator
from dynamize.files import write_json_lines, write_text
from dynamize.final import measure
from dynamize.folders import (
    LEDGER,
    METRICS,
    REPORT_DATA,
    REPORT_PAGE,
    REPORT_TEXT,
    VERDICT,
    check_folder,
    check_space,
    clear,
)
from dynamize.kept import KeptSteps, StepState, fingerprint
from dynamize.measure.accuracy import judgeable
from dynamize.measure.memory import saved_bytes
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import MAIN
from dynamize.plan import Plan, Planner, longest_timing
from dynamize.recipe import Recipe, Settings, as_yaml
from dynamize.rehearsal import Rehearsed, told
from dynamize.report import Ledger, ReportData, Row, changes, html, markdown, terminal
from dynamize.report.changes import Finding, Verdict
from dynamize.report.folder import OF_OTHER_FILES
from dynamize.rivals import Rivals
from dynamize.runtime.engine import default_backend
from dynamize.subject import Named, Subject
from dynamize.transform import Context, Progress, Transform, quiet
from dynamize.verbs.telling import report_data

log = logging.getLogger("dynamize")

_COPIES = 6  # of the weights, beside one for each step: the artifact, and a checkpoint with its optimizer


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: the network, what a report shows, what came of the expectations, and what else to be told.

    Printed, it is the report as text.
    """

    network: DynamicNetwork
    report: ReportData
    verdict: Verdict
    warnings: list[str]

    @property
    def ledger(self) -> Ledger:
        """A row for each step; drops are fractions."""
        return self.report.ledger

    @property
    def failures(self) -> list[Finding]:
        """Expectations that do not hold."""
        return self.verdict.failures

    def __str__(self) -> str:
        return terminal.text(self.report)


class Runner:
    """One run into a folder.

    Args:
        settings: its steps, and how they are measured.
        subject: the network and the images.
        out: folder of the artifact.
        device: auto, cpu, cuda or mps.
        resume: go on from the steps that are finished in ``out``.
        overwrite: replace a run that ``out`` holds already; refused otherwise.
        progress: wraps long loops.
        command: what the user typed, for the report.
    """

    def __init__(
        self,
        settings: Settings,
        subject: Subject,
        out: Path,
        *,
        device: str = "auto",
        resume: bool = False,
        overwrite: bool = False,
        progress: Progress = quiet,
        command: str = "",
    ) -> None:
        self.settings, self.subject, self.out, self.resume, self.command = settings, subject, out, resume, command
        self.kept = KeptSteps(out, partial(fingerprint, settings, subject))
        self.device = choose_device(device)
        self.state = PartialState(cpu=self.device.type == "cpu")
        self.backends: list[str] = list(settings.backends) or [default_backend(self.device)]
        self.progress = progress if self.state.is_main_process else quiet
        if self.state.is_main_process:
            check_folder(out, resume=resume, overwrite=overwrite)
        self.baseline = Baseline.of(settings, out, self.backends[0])
        torch.manual_seed(settings.seed)  # a source without a checkpoint is the same network again after --resume
        self.teacher = subject.network().to(self.device).requires_grad_(False)
        self.static = self._untouched()
        if self.baseline is not None:
            self.baseline.check_network(self.static)
        check_space(out, (len(settings.steps) + _COPIES) * saved_bytes(self.static))
        self.data = self._load_data()
        self.evaluator = Evaluator(
            self.static,
            self.data.test,
            self.device,
            self.backends,
            settings.batches,
            longest_timing(settings),
            self.progress,
        )
        self.rivals = self._rivals()
        self.planner = Planner(settings, subject, self.teacher, self.data, self.evaluator)

    def run(self) -> Outcome | None:
        """All steps; None in every process but the main one."""
        finished = self.kept.finished() if self.resume else []
        rehearsed, warnings = self._rehearse(finished), self.planner.warnings()
        for warning in warnings:
            log.warning("%s", warning)
        if not self.resume and self.state.is_main_process:
            clear(self.out)
        torch.manual_seed(self.settings.seed)
        steps, network = self.settings.transforms(), self._start(finished)
        rows = [state.row for state in finished]
        metrics = finished[-1].metrics if finished else []
        for index in range(len(finished), len(steps) + 1):
            transform = steps[index - 1] if index else None
            if self.state.is_main_process:
                self.kept.open(index)
            self.state.wait_for_everyone()
            network, notes, seconds = self._apply(index, transform, network, rehearsed.get(index))
            notes = [*notes, *([] if index else warnings)]
            metrics = metrics + self.kept.metrics(index, [*network.members, MAIN])
            if self.state.is_main_process:
                rows.append(self._measure(index, transform, network, notes, seconds))
                self.kept.keep(index, network, rows[-1], metrics)
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
        return self.planner.plan(self._untouched(), self._context())

    def _untouched(self) -> DynamicNetwork:
        return wrap(self.teacher, self.subject.input_shape)

    def _start(self, finished: Sequence[StepState]) -> DynamicNetwork:
        """The network that the next step finds."""
        if finished:
            given = Context(members=self.subject.members, trust_code=self.subject.trust_code)
            network = replay(self.teacher, finished[-1].history, self.subject.input_shape, given)
            self.kept.fill(network, finished[-1])
        else:
            network = self._untouched()
        return network.requires_grad_(True)  # it was copied from the frozen teacher

    def _rehearse(self, finished: Sequence[StepState]) -> dict[int, Rehearsed]:
        """The steps that are left, by number."""
        first = max(1, len(finished))
        steps = self.planner.rehearse(self._start(finished), self._context(), first)
        return dict(enumerate(steps, start=first))

    def _load_data(self) -> Splits:
        with torch.no_grad():
            classes = self.teacher(torch.zeros(1, *self.subject.input_shape, device=self.device)).shape[1]
        return judgeable(self.subject.images(classes, self.settings.seed), self.teacher, self.device)

    def _rivals(self) -> Rivals | None:
        if not self.settings.compare:
            return None
        context = replace(self._context(), members=self.subject.rivals)
        return Rivals(self.settings.compare, self.teacher, self.subject.input_shape, context)

    def _context(self, work: Path | None = None) -> Context:
        return Context(
            data=self.data,
            teacher=self.teacher,
            members=self.subject.members,
            trust_code=self.subject.trust_code,
            device=self.device,
            seed=self.settings.seed,
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
            network, notes = apply(network, transform, self._context(self.kept.folder(index)))
        except InfeasibleError as error:
            raise InfeasibleError(told(error, index, transform, trained=True), error.nearest) from error
        return network, notes, time.monotonic() - started

    def _measure(
        self, index: int, transform: Transform | None, network: DynamicNetwork, notes: Sequence[str], seconds: float
    ) -> Row:
        name = transform.pass_name if transform else "static"
        return self.evaluator.row(index, name, network, seconds, notes)

    def _finish(self, network: DynamicNetwork, rows: list[Row], metrics: list[dict[str, Any]]) -> Outcome:
        settings, out = self.settings, self.out
        final = measure(network, rows, self.evaluator, self.rivals, settings.steps)
        ledger = Ledger(
            rows=final.rows,
            rivals=final.rivals,
            title=settings.description or f"{self.subject.name}, converted",
            model=self.subject.name,
            command=self.command,
            backend=self.backends[0],
            machine=machine_name(self.device),
        )
        report = report_data(ledger, final, network, self.evaluator, self.data)
        report.recipe, report.versions = as_yaml(settings), artifact.versions()
        report.metrics, report.folder = metrics, str(out)
        about = {"recipe": settings.model_dump(mode="json", by_alias=True), "seed": settings.seed}
        about |= {"ledger": ledger.model_dump(exclude={"rows"})}
        artifact.save(
            copy.deepcopy(network).cpu(),
            out,
            source=self.subject.source,
            data=self.data.spec,
            classes=list(self.data.classes),
            about=about,
            code=self.subject.code,
        )
        ledger.write(out / LEDGER)
        write_json_lines(out / METRICS, metrics)
        write_text(out / REPORT_DATA, report.model_dump_json(exclude=OF_OTHER_FILES))
        write_text(out / REPORT_PAGE, html.render(report))
        write_text(out / REPORT_TEXT, markdown.render(report))
        verdict = judged(settings.expect, ledger, self.baseline)
        if verdict.findings or verdict.changes:
            write_text(out / VERDICT, changes.markdown(verdict, ledger.title))
        else:
            (out / VERDICT).unlink(missing_ok=True)  # of an earlier run that this one went on with
        return Outcome(network, report, verdict, self.planner.warnings())


def run_recipe(recipe: Recipe, out: Path, *, trust_code: bool | None = False, **options: Any) -> Outcome | None:
    """Run a recipe; see :class:`Runner` for the options and :class:`~dynamize.subject.Named` for ``trust_code``."""
    return Runner(recipe, Named(recipe, trust_code), out, **options).run()


def plan_recipe(recipe: Recipe, out: Path, *, trust_code: bool | None = False, **options: Any) -> Plan:
    """What :func:`run_recipe` would do; nothing is trained or written."""
    return Runner(recipe, Named(recipe, trust_code), out, **options).plan()


def describe(row: Row) -> str:
    """A row as one plain line."""
    exits = f", exits {' '.join(f'{share:.0%}' for share in row.exits)}" if row.exits else ""
    return (
        f"step {row.step} {row.transform}: accuracy {row.accuracy:.2%}, {row.macs / 1e6:.1f} MMACs "
        f"({row.macs_ratio:.3f}){exits}, {row.seconds:.0f} s"
    )
