"""An earlier run of the same steps, which a run is compared with, and what a run is worth by its expectations."""

from dataclasses import dataclass
from pathlib import Path

from dynamize.errors import DynamizeError
from dynamize.expect import Expect
from dynamize.folders import LEDGER
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.recipe import Settings
from dynamize.report.changes import Finding, Verdict, changes
from dynamize.report.ledger import Ledger, Row

_DIGITS = 9  # of a figure that count: 90 - 89.5 % is half a point, and not a little more
_ALIKE = 5e-4  # in accuracy of the static network: less comes from rounding on another machine


@dataclass(frozen=True)
class Baseline:
    """The ledger of an earlier run, and where it was read from."""

    ledger: Ledger
    file: Path

    @classmethod
    def of(cls, settings: Settings, out: Path, backend: str) -> "Baseline | None":
        """What the settings of a run into ``out`` name, its main backend being ``backend``; None where they name none.

        Raises:
            DynamizeError: it cannot be read, is of other steps, lacks the times that are to be compared, or lies where
                the run writes.
        """
        given = settings.expect.baseline
        if given is None:
            return None
        file = given / LEDGER if given.is_dir() else given
        if file.resolve().is_relative_to(out.resolve()):
            raise DynamizeError(
                f"expect.baseline: {file} lies in the folder that this run writes, so that a worse run would become "
                "its own baseline: copy it elsewhere, or give another --out"
            )
        try:
            found = cls(Ledger.read(file), file)
        except DynamizeError as error:
            raise DynamizeError(
                f"expect.baseline: {error} The first run has none yet: take `baseline` and what needs it out, and keep "
                "the ledger.json that it writes."
            ) from error
        found._check_steps(settings)
        if settings.expect.slowdown is not None:
            found._check_times(settings, backend)
        return found

    def _check_steps(self, settings: Settings) -> None:
        here = [step.pass_name for step in settings.steps]
        there = [row.transform for row in self.ledger.rows[1:]]
        if not self.ledger.rows or here != there:
            raise DynamizeError(
                f"expect.baseline: {self.file} is of another recipe: its steps are {_named(there)}, and here they are "
                f"{_named(here)}. Name the ledger of a run of these steps, or make it anew with this recipe."
            )

    def _check_times(self, settings: Settings, backend: str) -> None:
        timed = self.ledger.rows[-1].speedup
        if not {*map(str, settings.batches)} & {*timed.get(backend, {})}:
            there = ", ".join(f"{name} (batch {', '.join(found)})" for name, found in timed.items()) or "nothing"
            raise DynamizeError(
                f"expect.slowdown: {self.file} timed {there}, and this run times {backend} (batch "
                f"{', '.join(map(str, settings.batches))}): give both the same backends and batches"
            )

    def check_network(self, network: DynamicNetwork) -> None:
        """Refuse a baseline that began with another network than this one.

        Raises:
            DynamizeError: it did.
        """
        static = self.ledger.rows[0]
        params = sum(parameter.numel() for parameter in network.parameters())
        macs = float(exit_costs(network).cumulative()[-1])
        if (static.params, round(static.macs)) != (params, round(macs)):
            raise DynamizeError(
                f"expect.baseline: {self.file} is of another network, of {static.params:,} parameters and "
                f"{static.macs:,.0f} MACs; this one has {params:,} and {macs:,.0f}. Make the baseline anew."
            )

    def doubts(self, static: Row) -> list[str]:
        """Why the comparison with it may not be one of the conversions alone."""
        here, there = static.accuracy, self.ledger.rows[0].accuracy
        if abs(here - there) < _ALIKE:
            return []
        return [
            f"the original network answers {100 * here:.2f} % right here and {100 * there:.2f} % in the baseline: "
            "another checkpoint, or other test images"
        ]


def judged(expect: Expect, ledger: Ledger, baseline: Baseline | None) -> Verdict:
    """Whether the last row is what was expected, and what changed since the baseline."""
    last, backend = ledger.rows[-1], ledger.backend
    before = baseline.ledger.rows[-1] if baseline else None
    speedups = last.speedup.get(backend, {})
    values = {
        "accuracy": 100 * last.accuracy,
        "accuracy_drop": 100 * (last.accuracy_drop if before is None else before.accuracy - last.accuracy),
        "macs_ratio": last.macs_ratio,
        "speedup": min(speedups.values()) if speedups else 1.0,
        "agreement": 100 * last.agreement,
    }
    if before is not None:
        earlier = before.speedup.get(backend, {})
        values["slowdown"] = max((earlier[batch] / speedups[batch] for batch in earlier.keys() & speedups), default=1.0)
        values["macs_growth"] = last.macs / before.macs if before.macs else 1.0
    against = dict.fromkeys(("accuracy_drop", "macs_ratio", "speedup", "agreement"), "original network")
    if before is not None:
        against |= dict.fromkeys(("accuracy_drop", "slowdown", "macs_growth"), "baseline")
    return Verdict(
        findings=[
            Finding(name, round(values[name], _DIGITS), bound.min, bound.max, against.get(name, ""))
            for name, bound in expect.bounds().items()
        ],
        changes=[] if baseline is None else changes(baseline.ledger, ledger),
        notes=[] if baseline is None else baseline.doubts(ledger.rows[0]),
    )


def _named(steps: list[str]) -> str:
    return ", ".join(steps) or "none"
