"""Features handed on in ONNX Runtime's blocked layout: the same numbers, without the steps in between."""

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from networks import Residual, close, randomise_norms, set_thresholds, torchvision_network
from torch import Tensor, nn

from dynamize.conversion import convert
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.piece import Setting
from dynamize.runtime import layout, onnxruntime
from dynamize.runtime.compiled import compile_network
from dynamize.runtime.engine import Border
from dynamize.runtime.layout import blocks, exchange_blocked
from dynamize.runtime.onnx import export_onnx
from dynamize.runtime.session import session_options
from dynamize.transform import Transform
from dynamize.transforms import Exits, SkipGates

pytestmark = pytest.mark.skipif(
    not blocks((16, 4, 4), "own"), reason="ONNX Runtime computes in no blocks on this machine"
)

CHANNELS = 32


class WithMeans(nn.Module):
    """A block and, as gates read them, the channel means of what it gives."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        features = self.block(features)
        return features, torch.nn.functional.adaptive_avg_pool2d(features, 1).flatten(1)


class WithSum(nn.Module):
    """A sum over channels, for which features have to be plain, beside a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        found = self.conv(features)
        return found, (found.cumsum(1) + features.cumsum(1)).mean((2, 3))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: WithMeans(Residual(CHANNELS, CHANNELS)),
    "projection": lambda: WithMeans(Residual(CHANNELS, 2 * CHANNELS, 2)),
    "plain inside": WithSum,
    "no convolution": lambda: WithMeans(nn.Sigmoid()),
}


def exported(name: str) -> tuple[nn.Module, bytes]:
    torch.manual_seed(0)
    module = randomise_norms(BLOCKS[name]()).eval()
    return module, export_onnx(module, Border((CHANNELS, 8, 8)), outputs=["next_features", "means"], blocks=True)


def run(model: bytes, features: Tensor) -> list[Tensor]:
    options = session_options("own")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {"features": features.numpy()})]


def block_size(channels: int = CHANNELS) -> int:
    """Found from where the values of the second pixel lie."""
    module = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
    nn.init.ones_(module.weight)
    model = exchange_blocked(
        export_onnx(module, Border((channels, 2, 2)), outputs=["next_features"], blocks=True),
        {"next_features": channels},
        "own",
    )
    pixels = torch.arange(4.0).view(1, 1, 2, 2).expand(1, channels, 2, 2).contiguous()
    return int(np.flatnonzero(run(model, pixels)[0].flatten().numpy() == 1)[0])


def to_blocks(features: Tensor) -> Tensor:
    size, (n, c, h, w) = block_size(), features.shape
    return features.view(n, c // size, size, h, w).permute(0, 1, 3, 4, 2).reshape(n, c, h, w).contiguous()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("ends", [("features",), ("next_features",), ("features", "next_features")], ids="-".join)
def test_the_same_numbers_in_another_order(name: str, ends: tuple[str, ...]) -> None:
    module, model = exported(name)
    features = torch.randn(3, CHANNELS, 8, 8)
    with torch.no_grad():
        wanted, means = module(features)
    channels = {"features": CHANNELS, "next_features": wanted.shape[1]}
    changed = exchange_blocked(model, {end: channels[end] for end in ends}, "own")
    found = run(changed, to_blocks(features) if "features" in ends else features)
    assert torch.allclose(found[0], to_blocks(wanted) if "next_features" in ends else wanted, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found[1], means, rtol=1e-4, atol=1e-5)


def test_no_step_is_left_between_two_residual_blocks() -> None:
    changed = onnx.load_from_string(
        exchange_blocked(exported("residual")[1], dict.fromkeys(("features", "next_features"), CHANNELS), "own")
    )
    kinds = [node.op_type for node in changed.graph.node]
    assert kinds.count("Conv") == 2
    assert "ReorderInput" not in kinds
    assert "MaxPool" not in kinds  # of one pixel, which `export_onnx` puts before to enter the layout
    assert kinds.count("ReorderOutput") == 1  # of the means
    assert changed.graph.node[kinds.index("ReorderOutput")].input[0] not in ("features", "next_features")


@pytest.mark.parametrize(("shape", "found"), [((24, 4, 4), False), ((48, 4, 4), True), ((16,), False)])
def test_whole_blocks_of_channels_only(shape: tuple[int, ...], found: bool) -> None:
    assert blocks(shape, "own") is found


def test_a_machine_without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_machine_has_blocks", lambda threads: False)
    assert not blocks((48, 4, 4), "own")


@pytest.mark.parametrize(
    "step", [Exits(at=["layer1.0", "layer2.0"], share=0.3), SkipGates(group=1)], ids=["exits", "gates"]
)
@pytest.mark.fast("gates")
def test_parts_of_a_network_hand_each_other_blocks(step: Transform, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the images, which come plain, and the logits."""
    exchanged: list[set[str]] = []
    kept = onnxruntime.exchange_blocked
    monkeypatch.setattr(
        onnxruntime,
        "exchange_blocked",
        lambda model, channels, threads: (exchanged.append(set(channels)), kept(model, channels, threads))[1],
    )
    dynamic = convert(torchvision_network("resnet18"), [step], (3, 64, 64))
    set_thresholds(dynamic, [float("inf")] * len(dynamic.leaving))
    compiled, batch = compile_network(dynamic, "onnxruntime"), torch.randn(3, 3, 64, 64)
    borders = [(part.before, part.after) for part in compiled._frozen.parts() if part.role == "path"]
    both = sum(before > 0 and dynamic.shapes[after] != (10,) for before, after in borders)
    assert both >= 1
    found = compiled.run(batch, Setting(dynamic.setting.thresholds, ALL_OPEN))
    assert sum({"features", "next_features"} <= ends for ends in exchanged) >= both
    assert {"next_features"} in [ends - {"next_means"} for ends in exchanged]  # the first part
    assert {"features"} in exchanged  # the last one
    with torch.no_grad():
        assert close(found.logits, torchvision_network("resnet18")(batch), 2e-5)
