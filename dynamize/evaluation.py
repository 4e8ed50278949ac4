"""One network against the untouched static one: accuracy, executed MACs and time, as a row of the ledger."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dynamize.calibration.intervals import wilson
from dynamize.calibration.temperature import answer_temperature
from dynamize.data import Images
from dynamize.measure.accuracy import routed_answers, top_answers
from dynamize.measure.costs import exit_costs
from dynamize.measure.latency import DISTURBED, LEAST_ROUNDS, Contender, Times, interleave
from dynamize.measure.memory import check_batches, peak_bytes, saved_bytes
from dynamize.nn.executor import exits_of
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Decision, Setting
from dynamize.report.ledger import Row, Timing
from dynamize.runtime.compiled import CompiledNetwork, compile_network
from dynamize.runtime.engine import engine_class
from dynamize.runtime.threads import Threads, chosen_threads
from dynamize.transform import Progress, quiet

_INPUTS, _FEWEST_INPUTS = 96, 8  # images timed in each round, at least one batch


@dataclass(frozen=True)
class Judgement:
    """What a network does on a split.

    Attributes:
        answers: (n,).
        labels: (n,).
        macs: executed, (n,).
        taken: by decision, the option of each image (n,); -1 where it was not reached.
        leaving: names of the decisions at which images leave, in order.
        sure: the probability of each answer, (n,), if it is known.
    """

    answers: Tensor
    labels: Tensor
    macs: Tensor
    taken: dict[str, Tensor] = field(default_factory=dict)
    leaving: tuple[str, ...] = ()
    sure: Tensor | None = None

    @property
    def exits(self) -> Tensor:
        """Number of the place at which each image left, (n,); the end is the last."""
        return exits_of(self.taken, self.leaving, len(self.labels))

    @property
    def accuracy(self) -> float:
        """Top-1."""
        return float((self.answers == self.labels).double().mean())

    def shares(self, count: int) -> list[float]:
        """Share of the images that left at each of ``count`` exits."""
        return (torch.bincount(self.exits, minlength=count).double() / len(self.exits)).tolist()

    def use(self, decision: Decision) -> list[float]:
        """Share of all images that took each option; those that did not come there took none."""
        options = self.taken[decision.name]
        taken = torch.bincount(options[options >= 0], minlength=len(decision.options))
        return (taken.double() / len(options)).tolist()


@dataclass(frozen=True)
class Contestant:
    """A network in a comparison of times, with what it does on the split at a setting; by default its own."""

    network: DynamicNetwork
    judged: Judgement
    setting: Setting | None = None


class Evaluator:
    """Judges networks on one split against one static network.

    Args:
        static: the untouched network, wrapped (:func:`dynamize.conversion.wrap`).
        images: the split, in practice test.
        device: where accuracy is measured and, if the backends allow, time.
        backends: what latency is measured on, the main one first.
        batches: batch sizes timed.
        seconds: how long each comparison of times takes.
        progress: wraps the loop over batch sizes.
        threads: of sessions, "own" or "shared" (:func:`dynamize.compile_network`).

    Raises:
        DynamizeError: an unknown backend, or a batch that memory cannot hold.
    """

    def __init__(
        self,
        static: DynamicNetwork,
        images: Images,
        device: torch.device,
        backends: Sequence[str],
        batches: Sequence[int] = (1, 64),
        seconds: float = 5.0,
        progress: Progress = quiet,
        threads: Threads | None = None,
    ) -> None:
        self.static, self.images, self.device, self.inputs = static, images, device, _INPUTS
        self.backends, self.batches, self.seconds = tuple(backends), tuple(batches), seconds
        self.progress, self.threads = progress, threads
        self.notes: list[str] = []  # what backends left to torch when networks were last timed
        self._compiled: dict[str, CompiledNetwork] = {}
        for backend in self.backends:
            engine_class(backend)  # an unknown one is refused before anything is timed
        chosen_threads(threads)
        check_batches(static, self.batches, device)

    @cached_property
    def reference(self) -> Judgement:
        """The static network on the split."""
        found, labels = top_answers(self.static, self.images, self.device)
        return Judgement(found, labels, torch.full((len(labels),), self.static_macs, dtype=torch.float64))

    @cached_property
    def static_macs(self) -> float:
        """MACs per image of the static network."""
        return float(exit_costs(self.static).cumulative()[-1])

    def hurry(self, seconds: float, image_seconds: float) -> None:
        """Keep each comparison of times to about so many seconds, with fewer images where one takes long.

        Args:
            image_seconds: for one image through the static network.
        """
        self.seconds = min(self.seconds, seconds)
        calls = 2 * LEAST_ROUNDS * max(image_seconds, 1e-9)  # two networks take turns
        self.inputs = min(_INPUTS, max(_FEWEST_INPUTS, int(seconds / calls)))

    def judge(self, network: DynamicNetwork, setting: Setting | None = None) -> Judgement:
        """Answers and routing of ``network`` at a setting, by default its own."""
        places = range(network.exit_count)
        temperatures = [answer_temperature(network, k, setting) for k in places]
        found, labels, sure, routing = routed_answers(network, self.images, self.device, setting, temperatures)
        taken = routing.taken
        macs = exit_costs(network).executed(taken, len(labels))
        return Judgement(found, labels, torch.from_numpy(macs), taken, routing.leaving, sure)

    def row(self, step: int, transform: str, network: DynamicNetwork, seconds: float, notes: Sequence[str]) -> Row:
        """A row of the ledger for the network as it stands."""
        judged = self.judge(network) if step else self.reference
        row = self.describe(step, transform, network, judged, seconds, notes)
        return self.timed(row, "dynamic" if step else "static", self.times(network, judged, alone=not step))

    def describe(
        self,
        step: int,
        transform: str,
        network: DynamicNetwork,
        judged: Judgement,
        seconds: float = 0.0,
        notes: Sequence[str] = (),
    ) -> Row:
        """A row without times."""
        return Row(
            step=step,
            transform=transform,
            params=sum(parameter.numel() for parameter in network.parameters()),
            seconds=round(seconds, 1),
            size=saved_bytes(network),
            peak_memory=peak_bytes(network),
            notes=list(notes),
            **self.figures(network, judged, network.setting),
        )

    def figures(self, network: DynamicNetwork, judged: Judgement, setting: Setting) -> dict[str, Any]:
        """Those fields of a row that depend on the setting at which the network was judged."""
        macs = float(judged.macs.mean())
        right = int((judged.answers == judged.labels).sum())
        return {
            "macs": macs,
            "macs_worst": float(max(exit_costs(network).cumulative(setting))),
            "macs_ratio": macs / self.static_macs,
            "accuracy": judged.accuracy,
            "accuracy_ci": wilson(right, len(judged.labels)),
            "accuracy_drop": self.reference.accuracy - judged.accuracy,
            "agreement": float((judged.answers == self.reference.answers).double().mean()),
            "decisions": {one.name: judged.use(one) for one in network.decisions()},
            "leaving": list(judged.leaving),
        }

    def timed(self, row: Row, name: str, times: Mapping[tuple[str, int], Times]) -> Row:
        """The row with the times of contender ``name`` in place of its own, and with what is to be told of them."""
        speedup = {} if name == "static" else speedup_table(times, name)
        told = [note for note in self.notes if note.startswith(("static: ", f"{name}: "))]
        notes = [*(note for note in row.notes if DISTURBED not in note), *told, *busy(times)]
        new = {"latency": latency_table(times, name), "speedup": speedup, "notes": list(dict.fromkeys(notes))}
        return row.model_copy(update=new)

    def times(self, network: DynamicNetwork, judged: Judgement, alone: bool = False) -> dict[tuple[str, int], Times]:
        """Interleaved times of the static network and ``network``, by backend and batch size."""
        return self.times_together({} if alone else {"dynamic": Contestant(network, judged)})

    def times_together(self, contestants: Mapping[str, Contestant]) -> dict[tuple[str, int], Times]:
        """Interleaved times of the static network and all these, by backend and batch size; each gets as much time as
        in a comparison of two.

        The images timed cost each as the whole split does, from the cheapest to the dearest: they are spread over the
        sum of what an image costs in all of them.
        """
        found: dict[tuple[str, int], Times] = {}
        self.notes = []
        costs = torch.stack([one.judged.macs for one in contestants.values()] or [self.reference.macs]).sum(0)
        chosen = representative(costs, max(self.inputs, *self.batches))
        images = gather(self.images, chosen, self.device)
        images = images[torch.arange(max(len(images), *self.batches)) % len(images)]
        seconds = self.seconds * max(1.0, (1 + len(contestants)) / 2)
        for backend in self.backends:
            compiled = self._compile([one.network for one in contestants.values()], backend)
            contenders: dict[str, Contender] = {"static": compiled[id(self.static)]}
            for name, one in contestants.items():
                contenders[name] = _at(compiled[id(one.network)], one.setting)
            for batch in self.progress(self.batches, f"timing on {backend}, batch by batch", len(self.batches)):
                most = max(self.inputs, batch)
                inputs = [images[i : i + batch] for i in range(0, min(most, len(images)) - batch + 1, batch)]
                found[backend, batch] = interleave(contenders, inputs, self.device, seconds)
            named = {"static": self.static} | {name: one.network for name, one in contestants.items()}
            self.notes += [f"{name}: {note}" for name, one in named.items() for note in compiled[id(one)].notes]
        return found

    def _compile(self, networks: Sequence[DynamicNetwork], backend: str) -> dict[int, CompiledNetwork]:
        """Each network once, by its id, and the static one."""
        if backend not in self._compiled:
            self._compiled[backend] = compile_network(self.static, backend, self.device, self.threads)
        found = {id(self.static): self._compiled[backend]}
        for network in networks:
            if id(network) not in found:
                found[id(network)] = compile_network(network, backend, self.device, self.threads)
        return found


def _at(compiled: CompiledNetwork, setting: Setting | None) -> Contender:
    """A contender that runs at a setting, whatever the others that share its network run at."""
    return compiled if setting is None else lambda images: compiled.run(images, setting)


def busy(times: Mapping[tuple[str, int], Times]) -> list[str]:
    """The gravest warning that the times come with, if there is one."""
    return max(times.values(), key=lambda one: one.busy_elsewhere).warnings() if times else []


def latency_table(times: Mapping[tuple[str, int], Times], name: str = "dynamic") -> dict[str, dict[str, Timing]]:
    """The ledger's ``latency`` of a contender."""
    table: dict[str, dict[str, Timing]] = {}
    for (backend, batch), one in times.items():
        timing = Timing(median_ms=one.median_ms(name), p95_ms=one.p95_ms(name))
        table.setdefault(backend, {})[str(batch)] = timing
    return table


def speedup_table(times: Mapping[tuple[str, int], Times], name: str = "dynamic") -> dict[str, dict[str, float]]:
    """The ledger's ``speedup`` of a contender over "static"."""
    table: dict[str, dict[str, float]] = {}
    for (backend, batch), one in times.items():
        table.setdefault(backend, {})[str(batch)] = one.speedup("static", name)
    return table


def representative(costs_N: Tensor, count: int) -> Tensor:
    """Indexes of about ``count`` images whose costs (or exits) are spread as those of all images, evenly mixed.

    Sorted by cost and taken at even steps, then dealt out so that every batch sees all of them.
    """
    by_cost = torch.argsort(costs_N, stable=True)
    count = min(count, len(by_cost))
    picked = by_cost[(torch.arange(count, dtype=torch.float64) * len(by_cost) / count).long()]
    return picked[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


def gather(images: Images, index_N: Tensor, device: torch.device) -> Tensor:
    """The images at these places of a split, under the test-time transform, (N, C, H, W)."""
    wanted = {int(index): place for place, index in enumerate(index_N)}
    found: list[Tensor | None] = [None] * len(index_N)
    start, missing = 0, len(index_N)
    for batch, _ in images.batches(256, device):
        for offset in range(len(batch)):
            place = wanted.get(start + offset)
            if place is not None:
                found[place], missing = batch[offset], missing - 1
        start += len(batch)
        if not missing:
            break
    return torch.stack([one for one in found if one is not None])
