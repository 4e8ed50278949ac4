"""A compiled part that refuses, fails or answers wrongly is computed by torch, and that is said."""

from typing import Any

import pytest
import torch
from gated_networks import gated_resnet
from networks import SmallResNet, close, set_thresholds, split_at, with_exits
from torch import Tensor, nn

from dynamize.conversion import convert, wrap
from dynamize.errors import DynamizeError
from dynamize.runtime.compiled import compile_network
from dynamize.runtime.engine import RefusedPart
from dynamize.runtime.layout import from_blocks, to_blocks
from dynamize.runtime.onnxruntime import OnnxRuntime
from dynamize.transforms import Exits


def images(count: int) -> Tensor:
    return torch.randn(count, *SmallResNet.shape, generator=torch.Generator().manual_seed(count))


def spoil(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ONNX Runtime's sessions give, from the second one of a network on."""
    load, first = OnnxRuntime.load, {}

    def broken(self: OnnxRuntime, *given: Any) -> Any:
        session = load(self, *given)
        if first.setdefault(id(self), session) is session:
            return session
        if how == "refuses":
            raise RefusedPart("no such operator")

        def run(inputs: list[Tensor]) -> list[Tensor]:
            if how == "raises":
                raise RuntimeError("no memory\nat all")
            found = session(inputs)
            if how == "one value":
                found[0].view(-1)[-1] += found[0].std()
            elif how == "single images" and len(inputs[0]) == 1:
                found[0] *= 2
            elif how == "off by a hundredth":
                found[0] += 0.01 * found[0].std()
            elif how == "not finite":
                found[0].fill_(float("nan"))
            return found

        return run

    monkeypatch.setattr(OnnxRuntime, "load", broken)


HOW = ["refuses", "raises", "one value", "single images", "off by a hundredth", "not finite"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("network", [with_exits, lambda: with_exits(chain=True), lambda: gated_resnet({})])
@pytest.mark.fast(
    "with_exits-refuses",
    "with_exits-raises",
    "with_exits-one value",
    "with_exits-single images",
    "with_exits-off by a hundredth",
    "with_exits-not finite",
    "<lambda>0-single images",
    "<lambda>1-raises",
)
def test_right_answers_from_a_broken_backend(how: str, network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(how, monkeypatch)
    dynamic = network()
    compiled = compile_network(dynamic, "onnxruntime")
    assert compiled.notes
    split_at(dynamic, images(16), [0.4, 0.5])
    with torch.no_grad():
        wanted = dynamic.run(images(16))
    found = compiled.run(images(16))
    assert torch.equal(found.exits, wanted.exits)
    assert close(found.logits, wanted.logits, 2e-5)
    assert close(compiled(images(16)[:1]), wanted.logits[:1], 2e-5)


def test_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    dynamic = with_exits()
    assert compile_network(dynamic, "onnxruntime").notes == []
    spoil("raises", monkeypatch)
    notes = compile_network(dynamic, "onnxruntime").notes
    set_thresholds(dynamic, [None, None])
    assert all(
        note.startswith("backend onnxruntime: the ") and note.endswith("cannot run there: no memory") for note in notes
    )


def test_what_torch_computes_lies_between_sessions_in_their_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32))

        def forward(self, features: Tensor) -> Tensor:
            return features + self.body(features)

    spoil("refuses", monkeypatch)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), Block(), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 7)
    )
    dynamic = convert(net.eval(), [Exits(at=["1", "2"], share=0.9)], (3, 12, 12)).eval()
    compiled, batch = compile_network(dynamic, "onnxruntime"), torch.randn(5, 3, 12, 12)
    assert compiled.notes
    with torch.no_grad():
        assert close(compiled(batch), dynamic(batch), 2e-5)


def test_blocks_and_back() -> None:
    features = torch.randn(2, 32, 3, 5)
    assert torch.equal(from_blocks(to_blocks(features, "own"), "own"), features)
    assert not torch.equal(to_blocks(features, "own"), features)


def test_small_errors_of_rounding_are_none() -> None:
    """A network whose answers are tiny beside a constant."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4)).eval()
    with torch.no_grad():
        net[2].weight *= 1e-4
        net[2].bias += 100
    assert compile_network(wrap(net, (3, 8, 8)), "onnxruntime").notes == []


WRONG = {
    "one image": (lambda batch: batch[0], r"give it images\[None\]"),
    "channels": (lambda batch: batch[:, :1], "takes 3 channels, and these images have 1"),
    "channels last": (lambda batch: batch.movedim(1, -1), r"give it images.movedim\(-1, 1\)"),
    "size": (lambda batch: batch[..., 1:], r"was compiled for images \(N, 3, 16, 16\)"),
    "double": (lambda batch: batch.double(), r"takes float32.*give it images.to\(torch.float32\)"),
    "bytes": (lambda batch: batch.to(torch.uint8), "and normalise them"),
    "numpy": (lambda batch: batch.numpy(), r"give it torch.from_numpy\(images\)"),
    "a list": (lambda batch: list(batch), "this is a list: give it a torch.Tensor"),
    "nothing": (lambda batch: None, "this is a NoneType"),
    "another device": (lambda batch: batch.to("meta"), "was compiled for cpu, and these images are on meta"),
}


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.fast(
    "one image-eager",
    "channels-onnxruntime",
    "channels last-eager",
    "size-onnxruntime",
    "double-eager",
    "bytes-onnxruntime",
    "numpy-eager",
    "a list-eager",
    "nothing-eager",
    "another device-eager",
)
def test_images_that_do_not_fit_are_refused_in_words(kind: str, backend: str) -> None:
    compiled, (spoil, words) = compile_network(with_exits(), backend), WRONG[kind]
    with pytest.raises(DynamizeError, match=words):
        compiled(spoil(images(2)))
