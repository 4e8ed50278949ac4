"""Temperature scaling of an exit's logits (Guo et al. 2017, sec. 4.2)."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting

WIDEST = 20.0


def fit_temperature(logits_NC: NDArray[np.floating], labels_N: NDArray[np.integer]) -> float:
    """The T in 1/20 .. 20 that minimises the cross entropy of softmax(logits / T) on calibration images."""
    logits = logits_NC.astype(np.float64)
    rows = np.arange(len(labels_N))

    def cross_entropy(log_temperature: float) -> float:
        return float(-log_softmax(logits / np.exp(log_temperature), axis=1)[rows, labels_N].mean())

    bound = float(np.log(WIDEST))
    found = minimize_scalar(cross_entropy, bounds=(-bound, bound), method="bounded")
    return float(np.exp(found.x))


def answer_temperature(network: DynamicNetwork, index: int, setting: Setting | None = None) -> float:
    """What the logits of an image that left at place ``index`` (the end comes last) are still to be divided by, so that
    their softmax is a probability: joined answers have been. By default at the network's own setting."""
    combine = (network.setting if setting is None else setting).combine
    if index >= len(network.scored):
        return 1.0
    piece = network.scored[index]
    return 1.0 if piece.links and combine != "last" else float(piece.temperature)
