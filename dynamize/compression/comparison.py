"""What a compressed network costs against the one before: MACs and time, with all gates open and all exits on, and
how many answers are others."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynamize.data import Images
from dynamize.measure.costs import exit_costs
from dynamize.measure.latency import Contender, interleave
from dynamize.nn.channels_last import images_for
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting
from dynamize.runtime.compiled import compile_network

_BATCH = 128


def whole_macs(network: DynamicNetwork) -> float:
    """MACs per image of everything: all segments, heads and gates."""
    return float(exit_costs(network).cumulative()[-1])


def points(share: float) -> str:
    """A share of images in words: "1.25 points"."""
    return f"{100 * share:.2f} points"


@dataclass(frozen=True)
class Answers:
    """What a network answers to calibration images at its end, as its exits and gates stand: (n,), and labels (n,), -1
    where there is none."""

    found: Tensor
    labels: Tensor

    @property
    def accuracy(self) -> float | None:
        """Over the images with labels; None where there are none."""
        known = self.labels >= 0
        return float((self.found == self.labels)[known].double().mean()) if bool(known.any()) else None

    def lost(self, after: "Answers") -> float:
        """What a step costs: accuracy, or the share of answers that are others where there are no labels."""
        if self.accuracy is None or after.accuracy is None:
            return 1 - self.agreement(after)
        return self.accuracy - after.accuracy

    def agreement(self, after: "Answers") -> float:
        """The share of images that are answered as before."""
        return float((self.found == after.found).double().mean())

    def note(self, after: "Answers") -> str:
        """Both, in words."""
        alike = f"{self.agreement(after):.1%} of {len(self.found)} calibration images are answered as before"
        if self.accuracy is None or after.accuracy is None:
            return f"{alike}; there are no labels to say which of them rightly"
        change = self.lost(after)
        verb = "lost" if change >= 0 else "gained"
        return (
            f"calibration accuracy {self.accuracy:.2%} -> {after.accuracy:.2%}, {points(abs(change))} {verb} by this "
            f"step; {alike}"
        )


def answers(network: DynamicNetwork, images: Images, device: torch.device) -> Answers:
    """Of a split under the test-time transform."""
    network.to(device).eval()
    found, labels = [], []
    with torch.no_grad():
        for batch, truth in images.batches(_BATCH, device):
            found.append(network(images_for(network, batch)).argmax(1).cpu())
            labels.append(truth.cpu())
    return Answers(torch.cat(found), torch.cat(labels))


class Stopwatch:
    """Compares changed copies of a network with itself on a backend, at batch 1."""

    def __init__(self, network: DynamicNetwork, backend: str, device: torch.device, seconds: float = 2.0) -> None:
        self.backend, self.device, self.seconds = backend, device, seconds
        self.image = torch.randn(1, *network.input_shape, generator=torch.Generator().manual_seed(0)).to(device)
        self.before = self._compiled(network)

    def ratio(self, changed: DynamicNetwork) -> float:
        """Time of ``changed`` as a share of the time of the network before."""
        contenders = {"before": self.before, "after": self._compiled(changed)}
        times = interleave(contenders, [self.image], self.device, self.seconds)
        return times.median_ms("after") / times.median_ms("before")

    def _compiled(self, network: DynamicNetwork) -> Contender:
        compiled, opened = compile_network(network, self.backend, self.device), Setting(offset=ALL_OPEN)
        return lambda images: compiled.run(images, opened)


def layer_ratio(
    layer: nn.Module, other: nn.Module, shape: Sequence[int], backend: str, device: torch.device, seconds: float = 0.3
) -> float:
    """Time of ``other`` as a share of that of ``layer``, each by itself on a backend.

    Args:
        shape: of the input for one image, batch included.
    """
    alone = [DynamicNetwork(nn.Sequential(copy.deepcopy(one)), input_shape=shape[1:]) for one in (layer, other)]
    before, after = (compile_network(one.eval(), backend, device) for one in alone)
    features = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(device)
    times = interleave({"before": before, "after": after}, [features], device, seconds)
    return times.median_ms("after") / times.median_ms("before")
