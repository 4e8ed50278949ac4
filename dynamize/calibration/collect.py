"""Filling tables: one pass over the images, and one timing of the exits and paths."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dynamize.calibration.table import ConfidenceTable
from dynamize.calibration.temperature import fit_temperature
from dynamize.conversion import wrap
from dynamize.data import Images
from dynamize.measure.accuracy import answers, everything
from dynamize.measure.costs import ExitCosts, exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.runtime.profile import exit_latency, path_latency

Seen = tuple[list[Tensor], Tensor, Tensor]  # logits of every exit, labels and paths


class TableMaker:
    """Makes tables of one network, at several gate offsets; what does not depend on the offset is found once.

    Its exits are timed on ``backend``, and their temperatures fitted on ``images`` at the offset at which the network
    stands.
    """

    def __init__(
        self,
        network: DynamicNetwork,
        images: Images,
        teacher: nn.Module,
        device: torch.device,
        backend: str,
        latency_batch: int = 1,
    ) -> None:
        self.network, self.teacher, self.images, self.device = network, teacher, images, device
        self.reference = answers(teacher, images, device)[0].numpy()
        static = wrap(teacher, network.input_shape)
        milliseconds, static_ms = exit_latency(network, static, backend, device, latency_batch)
        self.costs, self.milliseconds = exit_costs(network), milliseconds
        self.static_cost = {"macs": float(exit_costs(static).cumulative()[-1]), "ms": static_ms}
        self.saved_ms: list[NDArray[np.float64]] = []
        if network.units:
            paths, _, _ = path_latency(network, backend, device)
            self.saved_ms = [costs[-1] - np.array(costs) for costs in paths]
        logits, labels = everything(network, images, device)[:2]
        for k in range(len(network.heads)):
            network.temperatures[k] = fit_temperature(logits[k].numpy(), labels.numpy())

    def table(self, others: Images | None = None) -> ConfidenceTable:
        """The table at the network's gate offset: of the images whose temperatures it has, or of others to judge on."""
        seen = everything(self.network, self.images if others is None else others, self.device)
        reference = self.reference if others is None else answers(self.teacher, others, self.device)[0].numpy()
        saved = {"macs": self.costs.savings, "ms": lambda choices: _lookup(self.saved_ms, choices)}
        costs = {"macs": self.costs.cumulative(), "ms": self.milliseconds}
        return _table(self.network, seen, reference, self.costs, costs, saved, self.static_cost)


def macs_table(network: DynamicNetwork, seen: Seen, reference: Tensor, static_macs: float) -> ConfidenceTable:
    """The table of images whose answers are known, with costs in MACs only: nothing is timed or fitted.

    Args:
        network: as it stood when it gave them.
        seen: what :func:`dynamize.measure.accuracy.everything` gave.
        reference: the static network's answers (n,).
        static_macs: what it costs.
    """
    costs = exit_costs(network)
    given, saved = {"macs": costs.cumulative()}, {"macs": costs.savings}
    return _table(network, seen, reference.numpy(), costs, given, saved, {"macs": static_macs})


def exit_scores(network: DynamicNetwork, logits: Sequence[Tensor]) -> NDArray[np.float64]:
    """Confidences (K, n) of logits on the CPU, K tensors (n, classes); zeros at the last exit, where none decides."""
    device = network.temperatures.device
    scores = [network.scores(one.to(device), k).cpu() for k, one in enumerate(logits[:-1])]
    found: NDArray[np.float64] = torch.stack([*scores, torch.zeros(len(logits[-1]))]).double().numpy()
    return found


def _table(
    network: DynamicNetwork,
    seen: Seen,
    reference: NDArray[np.int64],
    exits: ExitCosts,
    costs: Mapping[str, NDArray[np.float64]],
    saved: Mapping[str, Callable[[NDArray[np.int64]], NDArray[np.float64]]],
    static_cost: Mapping[str, float],
) -> ConfidenceTable:
    logits, labels, choices = seen
    image_costs = {}
    if network.units:
        image_costs = {name: _for_each(cost, saved[name](choices.numpy()), exits) for name, cost in costs.items()}
        costs = {name: cost.mean(axis=1) for name, cost in image_costs.items()}
    return ConfidenceTable(
        scores=exit_scores(network, logits),
        answers=np.stack([one.argmax(1).numpy() for one in logits]),
        labels=labels.numpy(),
        reference=reference,
        costs=costs,
        static_cost=static_cost,
        head_costs={} if exits.chained else {"macs": exits.heads[:-1]},
        image_costs=image_costs,
    )


def _for_each(open_K: NDArray[np.float64], saved_NU: NDArray[np.float64], costs: ExitCosts) -> NDArray[np.float64]:
    """Cost (K, n) of each image at each exit: that with all gates open less what its gates up to there save."""
    stages = np.array(costs.stages)
    saved = np.stack([saved_NU[:, stages <= k].sum(axis=1) for k in range(len(open_K))])
    found: NDArray[np.float64] = np.maximum(open_K[:, None] - saved, 1e-3 * open_K[:, None])
    return found


def _lookup(saved: Sequence[NDArray[np.float64]], choices_NU: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.stack([one[choices_NU[:, u]] for u, one in enumerate(saved)], axis=1)
