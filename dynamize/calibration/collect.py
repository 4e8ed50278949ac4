"""Filling the table: one pass over the calibration images, and one timing of the exits."""

from typing import Any

import numpy as np
import torch
from torch import nn

from dynamize.calibration.points import OperatingPoints, operating_points
from dynamize.calibration.table import ConfidenceTable
from dynamize.calibration.temperature import fit_temperature
from dynamize.conversion import wrap
from dynamize.data import Images, LoaderSet
from dynamize.measure.accuracy import answers, exit_logits
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.runtime.compiled import default_backend
from dynamize.runtime.profile import exit_latency


def calibrate(
    network: DynamicNetwork, loader: Any, teacher: nn.Module, *, count: int = 20, seed: int = 0
) -> OperatingPoints:
    """Operating points of ``network`` along its whole curve, also kept on it; which one it stands at is not changed.

    Args:
        network: trained, with exits; their temperatures are fitted here.
        loader: calibration images that ``teacher`` was not trained on, under the test-time transform: an iterable of
            (images (N, C, H, W), labels (N,)).
        teacher: the original network, which accuracy drops refer to.
        count: how many points.
        seed: of the cross-fitting folds.
    """
    device = next(network.parameters()).device
    images = loader if hasattr(loader, "batches") else LoaderSet("calibration", loader)
    table = confidence_table(network, images, teacher=teacher, device=device, backend=default_backend(device))
    network.operating_points = operating_points(table, count, seed=seed)
    return network.operating_points


def confidence_table(
    network: DynamicNetwork,
    images: Images,
    *,
    teacher: nn.Module,
    device: torch.device,
    backend: str,
    latency_batch: int = 1,
) -> ConfidenceTable:
    """Run all exits over ``images`` once, fit the temperatures of ``network``, and time each exit on ``backend``."""
    logits, labels_N = exit_logits(network, images, device)
    labels = labels_N.numpy()
    for k in range(len(network.heads)):
        network.temperatures[k] = fit_temperature(logits[k].numpy(), labels)
    scores = [network.scores(one.to(device), k).cpu() for k, one in enumerate(logits[:-1])]
    static = wrap(teacher, network.input_shape)
    milliseconds, static_ms = exit_latency(network, static, backend, device, latency_batch)
    costs = exit_costs(network)
    return ConfidenceTable(
        scores=torch.stack([*scores, torch.zeros(len(labels))]).double().numpy(),
        answers=np.stack([one.argmax(1).numpy() for one in logits]),
        labels=labels,
        reference=answers(teacher, images, device)[0].numpy(),
        costs={"macs": costs.cumulative(), "ms": milliseconds},
        static_cost={"macs": float(exit_costs(static).cumulative()[-1]), "ms": static_ms},
        head_costs={} if costs.chained else {"macs": costs.heads[:-1]},
    )
