"""Filling tables: one pass over the images, and one timing of the exits and paths."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dynamize.calibration.asking import EVERYONE_ASKED, Asking
from dynamize.calibration.table import LARGEST, ConfidenceTable
from dynamize.calibration.temperature import fit_temperature
from dynamize.conversion import wrap
from dynamize.data import Images
from dynamize.measure.accuracy import Seen, everything, top_answers
from dynamize.measure.costs import Costs, exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.runtime.profile import exit_latency, option_latency

_LEAST = 1e-3  # of the whole: what leaving costs at least, for an exit may have no products


class TableMaker:
    """Makes tables of one network, at several offsets; what does not depend on the offset is found once.

    Its exits are timed on ``backend``, and their temperatures fitted on ``images`` at the offset at which the network
    stands: on those in ``fitted_on``, all by default; on none, they are 1. Where the images are not ``labelled``, the
    teacher's answers take the place of labels.
    """

    def __init__(
        self,
        network: DynamicNetwork,
        images: Images,
        teacher: nn.Module,
        device: torch.device,
        backend: str,
        latency_batch: int = 1,
        labelled: bool = True,
        fitted_on: NDArray[np.intp] | None = None,
    ) -> None:
        self.labelled = labelled
        self._seen: dict[float, Seen] = {}
        self.network, self.teacher, self.images, self.device = network, teacher, images, device
        self.reference = top_answers(teacher, images, device)[0].numpy()
        static = wrap(teacher, network.input_shape)
        milliseconds, static_ms = exit_latency(network, static, backend, device, latency_batch)
        self.costs, self.milliseconds = exit_costs(network), milliseconds
        self.static_cost = {"macs": float(exit_costs(static).cumulative()[-1]), "ms": static_ms}
        self.saved_ms: dict[str, NDArray[np.float64]] = {}
        if network.changing:
            times = option_latency(network, backend, device)
            self.saved_ms = {name: costs[-1] - np.array(costs) for name, costs in times.options.items()}
        self._fit_temperatures(np.arange(len(self.reference)) if fitted_on is None else fitted_on)

    def table(self, offset: float, others: Images | None = None, asking: Asking = EVERYONE_ASKED) -> ConfidenceTable:
        """The table at an offset of what changes: of the images whose temperatures it has, or of others to judge on."""
        seen = self._everything(offset) if others is None else self._run(others, offset)
        reference = self.reference if others is None else top_answers(self.teacher, others, self.device)[0].numpy()
        costs = {"macs": self.costs.cumulative(), "ms": self.milliseconds}
        seen = seen if self.labelled else replace(seen, labels=torch.from_numpy(reference))
        saved = {"macs": self.costs.savings(seen.taken), "ms": _looked_up(self.saved_ms, seen.taken)}
        table = _table(self.network, seen, reference, self.costs, costs, saved, self.static_cost, asking)
        return table if self.labelled else replace(table, labelled=False)

    def _everything(self, offset: float) -> Seen:
        """Of the calibration images, which several tables are made of."""
        if offset not in self._seen:
            self._seen[offset] = self._run(self.images, offset)
        return self._seen[offset]

    def _run(self, images: Images, offset: float) -> Seen:
        return everything(self.network, images, self.device, Setting(offset=offset))

    def _fit_temperatures(self, chosen: NDArray[np.intp]) -> None:
        if not len(chosen):
            for piece in self.network.scored:
                piece.temperature.fill_(1.0)
            return
        seen = everything(self.network, self.images, self.device)
        labels = seen.labels.numpy() if self.labelled else self.reference
        for piece, logits in zip(self.network.scored, seen.logits, strict=False):
            piece.temperature.fill_(fit_temperature(logits.numpy()[chosen], labels[chosen]))


def macs_table(network: DynamicNetwork, seen: Seen, reference: Tensor, static_macs: float) -> ConfidenceTable:
    """The table of images whose answers are known, with costs in MACs only: nothing is timed or fitted.

    Args:
        network: as it stood when it gave them.
        seen: what :func:`dynamize.measure.accuracy.everything` gave.
        reference: the static network's answers (n,).
        static_macs: what it costs.
    """
    costs = exit_costs(network)
    given, saved = {"macs": costs.cumulative()}, {"macs": costs.savings(seen.taken)}
    asking = Asking.at(network, network.setting)
    return _table(network, seen, reference.numpy(), costs, given, saved, {"macs": static_macs}, asking)


def confidences(seen: Seen) -> NDArray[np.float64]:
    """Scores (K, n); zeros at the last exit, where none decides."""
    found: NDArray[np.float64] = torch.stack([*seen.scores, torch.zeros(len(seen.labels))]).double().numpy()
    return found


def _table(
    network: DynamicNetwork,
    seen: Seen,
    reference: NDArray[np.int64],
    pieces: Costs,
    costs: Mapping[str, NDArray[np.float64]],
    saved: Mapping[str, Mapping[str, NDArray[np.float64]]],
    static_cost: Mapping[str, float],
    asking: Asking,
) -> ConfidenceTable:
    seen = asking.seen(network, seen)
    costs = {measure: asking.costs(network, cost) for measure, cost in costs.items()}
    costs = {measure: np.maximum(cost, _LEAST * cost[-1]) for measure, cost in costs.items()}
    image_costs: dict[str, NDArray[np.float64]] = {}
    if seen.taken:
        less = {measure: asking.savings(each) for measure, each in saved.items()}
        image_costs = {measure: _for_each(cost, pieces.up_to_exits(less[measure])) for measure, cost in costs.items()}
        costs = {measure: cost.mean(axis=1) for measure, cost in image_costs.items()}
    leaving = pieces.leaving
    kept = asking.kept([one.name for one in leaving])
    heads = [one.always if one.name in pieces.switchable else 0.0 for one in leaving]
    joins = len(asking.off) < len(network.members)  # then a network whose place to leave is not used runs all the same
    return ConfidenceTable(
        scores=confidences(seen)[kept],
        answers=np.stack([seen.logits[k].argmax(1).numpy() for k in kept]),
        labels=seen.labels.numpy(),
        reference=reference,
        costs={measure: cost[kept] for measure, cost in costs.items()},
        static_cost=static_cost,
        head_costs={"macs": np.array(heads)[kept[:-1]]},
        image_costs={measure: cost[kept] for measure, cost in image_costs.items()},
        names=tuple(leaving[k].name for k in kept[:-1]),
        never=LARGEST if joins else None,
    )


def _for_each(open_K: NDArray[np.float64], saved_KN: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Cost (K, n) of each image at each exit: that with everything dearest less what is saved up to there."""
    saved = np.stack(np.broadcast_arrays(*saved_KN))
    found: NDArray[np.float64] = np.maximum(open_K[:, None] - saved, _LEAST * open_K[:, None])
    return found


def _looked_up(saved: Mapping[str, NDArray[np.float64]], taken: Mapping[str, Tensor]) -> dict[str, NDArray[np.float64]]:
    return {name: each[taken[name].numpy()] for name, each in saved.items()}
