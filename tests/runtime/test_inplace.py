"""Blocks that ONNX Runtime adds to their input where it lies: the same numbers, in the input's memory."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import onnxruntime as ort
import pytest
import torch
from gated_networks import masked, scatter
from networks import Residual, close, dense, excite_heads, force, randomise_norms, split_at, torchvision_network
from torch import Tensor, nn

from dynamize.conversion import convert
from dynamize.nn.piece import Setting
from dynamize.runtime import inplace, onnxruntime
from dynamize.runtime.compiled import compile_network
from dynamize.runtime.engine import Border
from dynamize.runtime.inplace import InPlace, can_write_over
from dynamize.runtime.layout import blocks, exchange_blocked
from dynamize.runtime.onnx import export_onnx
from dynamize.runtime.session import session_options
from dynamize.transforms import Exits, SkipGates

pytestmark = pytest.mark.skipif(
    not blocks((16, 4, 4), "own"), reason="ONNX Runtime computes in no blocks on this machine"
)

CHANNELS = 32


class Linear(nn.Module):
    """A block whose sum nothing follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.conv(features.relu())


class Alone(Linear):
    """One convolution that reads what it would add to."""

    def forward(self, features: Tensor) -> Tensor:
        return features + self.conv(features)


class ReadLater(Linear):
    """The input is read again once the sum is there."""

    def forward(self, features: Tensor) -> Tensor:
        added = features + self.conv(features.relu())
        return added * features


class NoShortcut(Linear):
    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.conv(features))


class WithMeans(nn.Module):
    def __init__(self, block: nn.Module, of_input: bool = False) -> None:
        super().__init__()
        self.block, self.of_input = block, of_input

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        found = self.block(features)
        read = found * features if self.of_input else found
        return found, nn.functional.adaptive_avg_pool2d(read, 1)


def optimised(module: nn.Module, outputs: int) -> bytes:
    exported = export_onnx(module, Border((CHANNELS, 8, 8)), outputs=["next_features", "means"][:outputs], blocks=True)
    return exchange_blocked(exported, dict.fromkeys(("features", "next_features"), CHANNELS), "own")


def session(model: bytes) -> ort.InferenceSession:
    options = session_options("own")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def unused(_: list[Tensor]) -> list[Tensor]:
    raise AssertionError


@pytest.fixture(autouse=True)
def small_features_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace, "_WORTH", 1)


def test_small_features_are_not_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inplace, "_WORTH", 4 * 3 * CHANNELS * 64)
    in_place = InPlace(session(optimised(Linear().eval(), 1)), lambda given: [2 * given[0]])
    for count, doubled in ((0, True), (2, True), (3, False)):
        features = torch.randn(count, CHANNELS, 8, 8)
        before = features.clone()
        assert torch.equal(in_place([features])[0], 2 * before) is doubled


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(
    ("make", "outputs"),
    [(Linear, 1), (lambda: Residual(CHANNELS, CHANNELS), 1), (lambda: WithMeans(Residual(CHANNELS, CHANNELS)), 2)],
)
def test_written_over_the_input(make: Callable[[], nn.Module], outputs: int, count: int) -> None:
    torch.manual_seed(0)
    model = optimised(randomise_norms(make()).eval(), outputs)
    assert can_write_over(model, "features", "next_features")
    plain, in_place, features = session(model), InPlace(session(model), unused), torch.randn(count, CHANNELS, 8, 8)
    wanted = plain.run(None, {"features": features.numpy()})
    found = in_place([features])
    assert found[0].data_ptr() == features.data_ptr()
    assert len(found) == outputs
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, torch.from_numpy(other).reshape(one.shape))


def test_what_is_bound_serves_all_features_in_that_place_and_means_are_their_own() -> None:
    torch.manual_seed(0)
    model = optimised(WithMeans(randomise_norms(Residual(CHANNELS, CHANNELS))).eval(), 2)
    plain, in_place, place = session(model), InPlace(session(model), unused), torch.empty(3, CHANNELS, 8, 8)

    def wanted(features: Tensor) -> Tensor:
        return torch.from_numpy(plain.run(None, {"features": features.numpy()})[1]).flatten(1)

    given = [torch.randn(count, CHANNELS, 8, 8) for count in (3, 3, 2, 3)]
    found = [in_place([place[: len(one)].copy_(one)])[1] for one in given]
    assert all(torch.equal(one, wanted(features)) for one, features in zip(found, given, strict=True))
    elsewhere = [torch.randn(1, CHANNELS, 8, 8) for _ in range(2 * inplace._KEPT)]
    assert all(torch.equal(wanted(one.clone()), in_place([one.clone()])[1]) for one in elsewhere)
    with ThreadPoolExecutor(4) as threads:
        many = [torch.randn(1, CHANNELS, 8, 8) for _ in range(40)]
        means = threads.map(lambda one: in_place([one.clone()])[1], many)
        assert all(torch.equal(one, wanted(features)) for one, features in zip(means, many, strict=True))


def test_rows_of_a_batch() -> None:
    model = optimised(Linear().eval(), 1)
    batch = torch.randn(4, CHANNELS, 8, 8)
    before, (wanted,) = batch.clone(), session(model).run(None, {"features": batch.numpy()})
    InPlace(session(model), unused)([batch[1:3]])
    assert torch.equal(batch[1:3], torch.from_numpy(wanted[1:3]))
    assert torch.equal(batch[[0, 3]], before[[0, 3]])


@pytest.mark.parametrize(
    ("module", "outputs"),
    [(Alone(), 1), (ReadLater(), 1), (NoShortcut(), 1), (WithMeans(Linear(), of_input=True), 2), (nn.Sigmoid(), 1)],
    ids=["alone", "read later", "no shortcut", "means of the input", "no convolution"],
)
def test_left_alone(module: nn.Module, outputs: int) -> None:
    assert not can_write_over(optimised(module.eval(), outputs), "features", "next_features")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
@pytest.mark.fast("mobilenet_v3_small")
def test_a_gated_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[InPlace] = []
    monkeypatch.setattr(onnxruntime, "InPlace", lambda *given: made.append(InPlace(*given)) or made[-1])
    network, batch = torchvision_network(name), torch.randn(6, 3, 64, 64)
    dynamic = scatter(convert(network, [SkipGates(group=1)], (3, 64, 64)), torch.randn(32, 3, 64, 64))
    compiled, wanted = compile_network(dynamic, "onnxruntime"), masked(dynamic, batch)
    assert made
    kept = batch.clone()
    for images in (batch, batch[:1]):
        forced = force(dynamic, wanted.choices_NU[: len(images)])
        found = compiled.run(images, Setting(forced=forced))
        assert close(found.logits, wanted.answers_NC[: len(images)], 1e-4)
    assert torch.equal(batch, kept)


@pytest.mark.parametrize("chain", [False, True])
def test_blocks_between_exits_are_one_session_with_the_head_behind_them(chain: bool) -> None:
    """Such a session takes a context and gives logits and a score too: it is run as any other."""
    stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 5))
    network = nn.Sequential(stem, *(Residual(CHANNELS, CHANNELS) for _ in range(3)), head)
    exits = Exits(at=["1", "2"], head="linear", share=1.0, chain=chain)
    dynamic, batch = convert(randomise_norms(network).eval(), [exits], (3, 64, 64)), torch.randn(8, 3, 64, 64)
    assert batch[0, 0].numel() * CHANNELS * batch.element_size() >= inplace._WORTH
    excite_heads(dynamic)
    split_at(dynamic, batch, [0.3, 0.5])
    compiled, wanted = compile_network(dynamic, "onnxruntime"), dense(dynamic, batch)
    assert len(wanted.exits_N.unique()) == 3
    for images in (batch, batch[:1]):
        found = compiled.run(images)
        assert torch.equal(found.exits, wanted.exits_N[: len(images)])
        assert close(found.logits, wanted.answers_NC[: len(images)], 1e-4)
