"""Pairs of torchvision networks, each with its own size, crop and normalisation: nothing changes until asked, skipped
is not executed, what is saved comes back, and ONNX Runtime answers alike."""

from pathlib import Path

import pytest
import torch
from networks import close
from torch import Tensor
from torch.nn import functional

import dynamize as dz
from dynamize.graph.macs import count_macs
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting

SHAPE = (3, 96, 96)
SCALE, SHIFT = (0.8, 0.9, 1.1), (0.1, -0.2, 0.0)
PAIRS = [
    ("mobilenet_v3_small", "resnet18", 64, 1.0),
    ("squeezenet1_1", "mobilenet_v3_large", 48, 0.9),
    ("shufflenet_v2_x0_5", "mobilenet_v2", 96, 0.75),
    ("mnasnet0_5", "efficientnet_b0", 72, 1.0),
    ("regnet_y_400mf", "resnet50", 80, 0.8),
    ("mobilenet_v2", "densenet121", 128, 1.0),
    ("resnet18", "vgg11_bn", 64, 1.0),
    ("shufflenet_v2_x1_0", "regnet_x_800mf", 96, 0.6),
    ("efficientnet_b0", "convnext_tiny", 112, 0.9),
    ("mobilenet_v3_large", "resnext50_32x4d", 96, 1.0),
    ("regnet_x_400mf", "wide_resnet50_2", 56, 1.0),
    ("mnasnet1_0", "efficientnet_v2_s", 64, 0.7),
]


def by_hand(images: Tensor, size: int, share: float) -> Tensor:
    """The small network's images."""
    kept = round(SHAPE[1] * share)
    start = (SHAPE[1] - kept) // 2
    cropped = images[:, :, start : start + kept, start : start + kept]
    resized = functional.interpolate(cropped, size=(size, size), mode="bilinear", antialias=True)
    return resized * torch.tensor(SCALE)[:, None, None] + torch.tensor(SHIFT)[:, None, None]


def executed_macs(network: DynamicNetwork, images: Tensor, setting: Setting) -> float:
    before, network.setting = network.setting, setting
    try:
        return count_macs(network, images)
    finally:
        network.setting = before


@pytest.mark.parametrize(
    ("small", "big", "size", "share"),
    [pytest.param(*pair, id="-".join(pair[:2])) for pair in PAIRS],
)
@pytest.mark.slow
def test_pair(small: str, big: str, size: int, share: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    alone = {name: dz.source(f"torchvision:{name},num_classes=10").eval() for name in (small, big)}
    torch.save(alone[small].state_dict(), tmp_path / "small.pt")
    first = {
        "source": f"torchvision:{small},num_classes=10",
        "checkpoint": tmp_path / "small.pt",
        "preprocess": {"size": (size, size), "share": share, "scale": SCALE, "shift": SHIFT},
        "name": "small",
    }
    images = torch.randn(6, *SHAPE)
    with torch.no_grad():
        network = dz.convert(alone[big], [dz.Cascade(first=[first], confidence="margin")], SHAPE).eval()
        wanted = alone[big](images)
        assert torch.equal(network(images), wanted)
        assert count_macs(network, images[:1]) == count_macs(alone[big], images[:1])

        quick = alone[small](by_hand(images, size, share))
        best = quick.topk(2, dim=1).values
        margins, _ = (best[:, 0] - best[:, 1]).sort()
        threshold = float(margins[2] + margins[3]) / 2
        setting = Setting({"small": threshold})
        leaves = best[:, 0] - best[:, 1] >= threshold
        assert int(leaves.sum()) == 3
        routed = network.run(images, setting)
        assert torch.equal(routed.exits == 0, leaves)
        assert close(routed.logits, torch.where(leaves[:, None], quick, wanted))
        expected = exit_costs(network).executed(routed.taken, len(images)).sum()
        assert executed_macs(network, images, setting) == pytest.approx(float(expected))

        dz.save(network, tmp_path / "saved")
        again = dz.load(tmp_path / "saved").run(images, setting)
        assert torch.equal(again.logits, routed.logits)
        compiled = dz.compile_network(network, "onnxruntime").run(images, setting)
        assert torch.equal(compiled.exits, routed.exits)
        assert close(compiled.logits, routed.logits, 1e-3)
