"""Networks that see how a tensor lies in memory go through everything that lays images channels last."""

import copy
from pathlib import Path

import pytest
import torch
from backends import FLOAT32
from commandline import Cli, call
from digits import digit_splits
from layout_networks import NETWORKS, SHAPE, Flattening, Fourier, Standard, build
from networks import close
from torch import nn

from dynamize.conversion import apply, convert, wrap
from dynamize.measure.accuracy import top_answers
from dynamize.nn.channels_last import images_for, lay_out
from dynamize.nn.network import DynamicNetwork
from dynamize.runtime.compiled import compile_network
from dynamize.training.objectives import MultiExitLoss
from dynamize.transform import Context
from dynamize.transforms import Calibrate, Distill, Exits, Quantize

EVERY = pytest.mark.parametrize("kind", NETWORKS)
IMAGES = torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(0))
LAST = IMAGES.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def with_exit(network: nn.Module) -> DynamicNetwork:
    return convert(network, [Exits(at=["body.0"], share=1.0, size=[8])], SHAPE)


@EVERY
def test_a_traced_network_gives_the_same_answers_in_any_memory(kind: type[Flattening]) -> None:
    network = build(kind)
    fast = lay_out(wrap(network, SHAPE))
    with torch.no_grad():
        assert close(fast(images_for(fast, IMAGES)), network(IMAGES))


@EVERY
@pytest.mark.parametrize("backend", FLOAT32)
@pytest.mark.fast(
    "eager-Flattening", "eager-ByStride", "eager-Fourier", "onnxruntime-Flattening", "onnxruntime-BySizeKeyword"
)
def test_backends(kind: type[Flattening], backend: str) -> None:
    network = build(kind)
    if backend != "eager" and kind.__name__ in ("ByStride", "ByBytes", "ComplexMap", "Fourier"):
        pytest.skip("no ONNX operator")
    with torch.no_grad():
        assert close(compile_network(with_exit(network), backend)(IMAGES), network(IMAGES))


@EVERY
@pytest.mark.fast("Flattening", "ByStride", "Fourier")
def test_learning_from_a_module_and_measuring_it(kind: type[Flattening]) -> None:
    network, splits = build(kind), digit_splits(96)
    context = Context(data=splits, teacher=copy.deepcopy(network), backend="eager")
    step = Distill(epochs=1, batch_size=32, precision="float32", features=0.5)
    trained, _ = apply(with_exit(network), step, context)
    calibrated, _ = apply(trained, Calibrate(macs_ratio=0.9), context)
    assert calibrated.operating_points
    found, _ = top_answers(network, splits.test, torch.device("cpu"))
    images = torch.cat([batch for batch, _ in splits.test.batches(100)])
    with torch.no_grad():
        assert torch.equal(found, network(images).argmax(1))
        loss = MultiExitLoss(network, alpha=1.0)
        assert float(loss(network(images), images.contiguous(memory_format=torch.channels_last), found)) < 1e-6


@pytest.mark.parametrize("kind", [Flattening, Fourier])
@pytest.mark.fast("Flattening")
def test_quantize(kind: type[Flattening]) -> None:
    network, splits = build(kind), digit_splits(96)
    quantized, _ = apply(with_exit(network), Quantize(), Context(data=splits, teacher=network))
    images = next(iter(splits.calibration.batches(50)))[0]
    with torch.no_grad():
        assert close(quantized(images), network(images), 0.1)


def test_only_plain_convolutions_are_laid_out() -> None:
    for kind in (Fourier, Standard):
        network = lay_out(wrap(build(kind), SHAPE))
        last = {name for name, one in network.named_parameters() if one.dim() == 4 and not one.is_contiguous()}
        wanted = {"nets.main.body.0.0.weight", "nets.main.body.1.0.weight", "nets.main.body.2.0.weight"}
        unlike = {"nets.main.body.1.0.weight"} if kind is Standard else set()
        assert last == wanted - unlike - {"nets.main.body.0.0.weight"}  # one input channel lies either way


def test_a_module_is_handed_contiguous_images() -> None:
    assert images_for(build(Flattening), LAST).is_contiguous()
    assert images_for(wrap(build(Flattening), SHAPE), LAST).is_contiguous(memory_format=torch.channels_last)


def test_a_run_from_the_users_file(tmp_path: Path) -> None:
    cli: Cli = call
    source = Path(__file__).parents[1] / "layout_networks.py"
    (tmp_path / "own.py").write_text(f"import sys; sys.path.insert(0, {str(source.parent)!r})\n" + source.read_text())
    options = [
        f"--model={tmp_path / 'own.py'}:Flattening",
        "--set=model.kwargs={}",
        "--set=steps.0.at=[body.0]",
        "--set=steps.0.share=1.0",
        "--set=steps.0.size=[8]",
        "--set=steps.1.epochs=1",
        "--set=steps.1.features=0.5",
        "--set=steps.2.max_drop=null",
        "--set=steps.2.macs_ratio=0.9",
        "--set=expect={}",
        "--set=data.train_limit=96",
        "--set=data.test_limit=100",
        "--set=backends=[eager, onnxruntime]",
        "--set=batches=[32]",
        "--set=timing_seconds=0.01",
        "--quiet",
    ]
    result = cli("run", "digits_exits", "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
