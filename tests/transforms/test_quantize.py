"""`quantize`: bytes in every part, ranges from the images that reach it, and back from an artifact."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import needs_openvino
from digits import SHAPE, DigitNet, digit_network, digit_splits
from gated_digits import gated_digits, set_scores
from networks import exit_scores, set_thresholds, thresholds
from random_blocks import SamePadding
from random_networks import random_network
from torch import Tensor, nn

import dynamize as dz
from dynamize import artifact
from dynamize.calibration import collect
from dynamize.calibration.table import EVERYONE
from dynamize.compression.neural_compressor import chosen_steps
from dynamize.compression.quantization import sample
from dynamize.compression.rounding import prepare
from dynamize.conversion import apply, convert, wrap
from dynamize.data import Splits
from dynamize.errors import DynamizeError
from dynamize.measure.accuracy import exit_accuracies
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork, record_routing
from dynamize.nn.quantized import QuantizedConv2d, QuantizedLinear, Quantizer, quantized_layer
from dynamize.runtime.compiled import compile_network
from dynamize.runtime.export import export
from dynamize.runtime.session import session_options
from dynamize.transform import Context, check_order, parse_step, registered
from dynamize.transforms import Calibrate, ChannelGates, Distill, Quantize, quantize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> Splits:
    return digit_splits(None)


@pytest.fixture(scope="module")
def trained(data: Splits) -> DynamicNetwork:
    torch.manual_seed(0)
    context = Context(data=data, teacher=DigitNet().eval())
    network, _ = apply(digit_network(), Distill(epochs=6, batch_size=32, lr=0.2, alpha=0.0), context)
    return network.eval()


def context(data: Splits) -> Context:
    return Context(data=data, teacher=DigitNet().eval())


def images(data: Splits) -> Tensor:
    return next(iter(data.test.batches(100)))[0]


def quantizers(module: nn.Module) -> list[tuple[float, int]]:
    found = [one for one in module.modules() if isinstance(one, Quantizer)]
    return [(float(one.scale), int(one.zero_point)) for one in found]


def static(network: DynamicNetwork) -> list[nn.Module]:
    """What lies between the exits."""
    return [piece.module for piece in network.row if piece.effect is None]


def test_accuracy_costs_and_size(trained: DynamicNetwork, data: Splits) -> None:
    network, notes = apply(copy.deepcopy(trained), Quantize(), context(data))
    kinds = [type(one) for one in network.modules()]
    assert kinds.count(QuantizedConv2d) == 3 + 3  # of the network, and of the heads
    assert kinds.count(QuantizedLinear) == 1
    assert nn.Conv2d not in kinds
    before, after = (exit_accuracies(one, data.test, CPU) for one in (trained, network))
    assert min(before) > 0.6
    assert max(abs(old - new) for old, new in zip(before, after, strict=True)) <= 0.03
    assert exit_costs(network).cumulative().tolist() == exit_costs(trained).cumulative().tolist()
    assert notes[0].startswith("7 of 7 layers compute in bytes, with ranges by mse from ")
    assert notes[1].startswith("calibration accuracy, evaluated again in bytes: exit 1 ")
    assert notes[2].startswith("parts in bytes differ by at most 0.0")
    assert notes[3].startswith("least exact layers, signal to noise in dB: ")
    weights = [tensor for name, tensor in network.state_dict().items() if name.endswith(".weight") and tensor.ndim == 4]
    assert {tensor.dtype for tensor in weights} == {torch.int8}
    first, second, _ = static(network)
    assert quantizers(first)[-1] == quantizers(second)[0]  # one scale at a border
    assert quantizers(first)[-1] == quantizers(network.leaving[0])[0]


def test_backends_agree(trained: DynamicNetwork, data: Splits) -> None:
    network, _ = apply(copy.deepcopy(trained), Quantize(), context(data))
    batch = images(data)
    for values in ([None, None], [0.6, 0.6]):
        set_thresholds(network, values)
        with torch.no_grad():
            wanted = network(batch)
        for backend in ("eager", "onnxruntime"):
            found = compile_network(network, backend)(batch)
            assert (found.argmax(1) == wanted.argmax(1)).double().mean() >= 0.97
            off = (found - wanted).abs().amax(1)
            assert float(off.median()) < 0.02 * float(wanted.abs().max())


def test_one_stage_is_within_a_step(trained: DynamicNetwork, data: Splits, tmp_path: Path) -> None:
    """ONNX Runtime adds whole numbers, PyTorch floats: a tie may fall the other way, not more in one layer."""
    import onnxruntime as ort

    network, _ = apply(copy.deepcopy(trained), Quantize(max_drop=None), context(data))
    export(network, tmp_path / "deploy")
    first = json.loads((tmp_path / "deploy" / "routing.json").read_text())["steps"][0]["part"]
    session = ort.InferenceSession(tmp_path / "deploy" / first, session_options("own"))
    batch = images(data)
    scale, zero = quantizers(static(network)[0])[-1]
    steps = torch.from_numpy(session.run(["next_features"], {"features": batch.numpy()})[0])
    assert steps.dtype == torch.uint8
    found = scale * (steps.float() - zero)
    with torch.no_grad():
        wanted = static(network)[0](batch)
    assert ((found - wanted).abs() / scale).round().max() <= 1
    assert ((found - wanted).abs() < scale / 2).double().mean() > 0.99


def executed(network: DynamicNetwork, folder: Path) -> list[list[str]]:
    """The operators that ONNX Runtime executes, part by part."""
    onnx = pytest.importorskip("onnx")
    import onnxruntime as ort

    export(network, folder / "deploy")
    found = []
    for part in sorted((folder / "deploy").glob("*.onnx")):
        options = session_options("own")
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        ort.InferenceSession(part, options)
        found.append([node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node])
    return found


def test_onnx_runtime_computes_in_bytes(trained: DynamicNetwork, data: Splits, tmp_path: Path) -> None:
    network, _ = apply(copy.deepcopy(trained), Quantize(max_drop=None), context(data))
    set_thresholds(network, [0.6, 0.6])
    stages = executed(network, tmp_path)
    assert len(stages) == 3
    for kinds in stages:
        assert "QLinearConv" in kinds
        assert not {"Conv", "FusedConv"} & set(kinds)


def test_each_part_has_ranges_of_the_images_that_reach_it(trained: DynamicNetwork, data: Splits) -> None:
    """What reaches the second static piece depends on the first threshold; what reaches the first does not."""
    found = []
    with torch.no_grad():
        scores = torch.cat(
            [exit_scores(trained, trained.all_exits(batch)[0], 0) for batch, _ in data.calibration.batches(256)]
        )
    for threshold in (None, float(scores.quantile(0.1))):
        network = copy.deepcopy(trained)
        set_thresholds(network, [threshold, None])
        found.append(apply(network, Quantize(ranges="minmax", max_drop=None), Context(data=data))[0])
    everyone, hard = (static(one) for one in found)
    assert quantizers(everyone[0])[:-1] == quantizers(hard[0])[:-1]
    later = [quantizers(one[1]) + quantizers(one[2]) for one in (everyone, hard)]
    assert later[0] != later[1]
    pairs = zip(*later, strict=True)
    assert all(one[0] >= other[0] for one, other in pairs)  # of fewer images the range is no wider


def test_parts_that_nobody_reaches_are_shown_all(trained: DynamicNetwork, data: Splits) -> None:
    network = copy.deepcopy(trained)
    set_thresholds(network, [EVERYONE, None])
    found, notes = apply(network, Quantize(max_drop=None), Context(data=data))
    assert notes[1] == "3 parts that fewer than 16 of these images reach have their ranges from all of them"
    assert all(scale != 1.0 for scale, _ in quantizers(found))


def test_layers_stay_in_float_as_asked(trained: DynamicNetwork, data: Splits) -> None:
    network, notes = apply(copy.deepcopy(trained), Quantize(keep_float=["b", "pieces.exit__1.head"]), context(data))
    graphs = [(part.prefix, part.graph) for part in network.parts() if part.graph is not None]
    floats = [prefix + name for prefix, graph in graphs for name, one in graph.named_modules()
              if isinstance(one, nn.Conv2d)]  # fmt: skip
    assert floats == ["pieces.exit__1.head.body.0", "pieces.exit__1.head.body.3", "b.0"]
    assert sum(isinstance(one, nn.Conv2d) for one in network.modules()) == 3
    assert "4 of 7 layers" in notes[0]
    assert network.history[-1]["float_layers"] == ["b", "pieces.exit__1.head"]
    assert torch.allclose(static(network)[1].get_submodule("b.0").weight, _folded_weight(trained), rtol=1e-6)
    with pytest.raises(DynamizeError, match=r"keep_float has 'c.9', which is no layer .* Did you mean"):
        apply(copy.deepcopy(trained), Quantize(keep_float=["c.9"]), context(data))


def _folded_weight(network: DynamicNetwork) -> Tensor:
    conv, norm = (network.plain.get_submodule(name) for name in ("b.0", "b.1"))
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return (conv.weight.double() * scale[:, None, None, None]).float()


def test_the_least_exact_layer_falls_back(
    trained: DynamicNetwork, data: Splits, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One layer's weights are spoilt by a channel whose bytes are far too coarse: it alone falls back."""

    def coarse(layer: nn.Module, scale: float) -> nn.Module:
        found = quantized_layer(layer, scale)
        if layer.weight.shape[:2] == (12, 8):  # `b` and nothing else
            found.weight.zero_()
        return found

    for module in ("dynamize.compression.quantization", "dynamize.compression.fidelity"):
        monkeypatch.setattr(f"{module}.quantized_layer", coarse)
    given = Context(data=data, teacher=DigitNet().eval(), work=tmp_path)
    network, notes = apply(copy.deepcopy(trained), Quantize(max_drop=5), given)
    assert network.history[-1]["float_layers"] == ["b.0"]
    fallen = next(note for note in notes if "fell back" in note)
    assert fallen.startswith("1 layers fell back to float (b.0): without, an exit loses ")
    assert notes[-1].startswith("least exact layers, signal to noise in dB: b.0 ")
    kept = json.loads((tmp_path / quantize.LAYERS).read_text())
    assert kept["float"] == ["b.0"]
    assert len(kept["decibels"]) == 7
    spoilt, notes = apply(copy.deepcopy(trained), Quantize(max_drop=None), given)
    assert spoilt.history[-1]["float_layers"] == []


def test_what_differs_too_much_from_float_stays_in_float(
    trained: DynamicNetwork, data: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that change without a loss of accuracy, and parts that differ however the answers are."""
    for limit, value in (("_AGREEMENT", 1.1), ("_PART_ERROR", 0.0)):
        with monkeypatch.context() as patch:
            patch.setattr(quantize, limit, value)
            network, notes = apply(copy.deepcopy(trained), Quantize(max_drop=100), context(data))
        assert len(network.history[-1]["float_layers"]) == 7
        assert not any(isinstance(module, QuantizedConv2d | QuantizedLinear) for module in network.modules())
        assert any(note.startswith("7 layers fell back to float") for note in notes)
        with torch.no_grad():
            assert torch.allclose(network(images(data)), trained(images(data)), atol=1e-4)


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_pools_over_borders_are_the_same_everywhere(backend: str, data: Splits) -> None:
    torch.manual_seed(0)
    pools = [nn.AvgPool2d(3, 2, padding=1), nn.AvgPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 1, 1, divisor_override=5)]
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), *pools, nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(32, 10)
    ).eval()
    network, _ = apply(wrap(net, SHAPE), Quantize(max_drop=None), Context(data=data))
    compiled, batch = compile_network(network, backend), images(data)
    assert compiled.notes == []
    with torch.no_grad():
        wanted = net(batch)
        assert (compiled(batch) - wanted).square().mean().sqrt() < 0.1 * wanted.std()


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_convolutions_that_pad_by_themselves(backend: str, data: Splits) -> None:
    torch.manual_seed(0)
    layers = [SamePadding(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU6(), SamePadding(8, 8, 3, 2, groups=8), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Conv2d(8, 8, 2, padding="same"), nn.Flatten(), nn.Linear(32, 10)).eval()
    network, _ = apply(wrap(net, SHAPE), Quantize(max_drop=None), Context(data=data))
    assert sum(isinstance(one, QuantizedConv2d) for one in network.modules()) == 3
    compiled, batch = compile_network(network, backend), images(data)
    assert compiled.notes == []
    with torch.no_grad():
        wanted = net(batch)
        assert (compiled(batch) - wanted).square().mean().sqrt() < 0.1 * wanted.std()


class PadsByHand(nn.Conv2d):
    """With zeros behind the map whose value is not written out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


def test_zeros_are_read_with_the_map_in_onnx_runtime(data: Splits, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [PadsByHand(1, 8, 3, 2), nn.ReLU6(), nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 8, 3, 2, groups=8)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 10)).eval()
    network, _ = apply(wrap(net, SHAPE), Quantize(max_drop=None), Context(data=data))
    (kinds,) = executed(network, tmp_path)
    assert kinds.count("QLinearConv") == 2
    assert kinds.count("QuantizeLinear") == 1  # of the images
    assert not {"Pad", "Conv", "FusedConv"} & set(kinds)


def test_calibrated_again_by_itself(trained: DynamicNetwork, data: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "exit_latency", lambda *_: (np.array([1.0, 2.0, 3.0]), 3.0))
    teacher = DigitNet().eval()
    given = Context(data=data, teacher=teacher, backend="eager")
    calibrated, _ = apply(copy.deepcopy(trained), Calibrate(macs_ratio=0.8, points=4), given)
    network, notes = apply(copy.deepcopy(calibrated), Quantize(), given)
    assert "calibrated again, as `calibrate` was before" in notes
    assert notes[-1].startswith("expected at this operating point: 0.")
    assert network.operating_point is not None
    assert thresholds(network) != thresholds(calibrated)
    assert [step["pass"] for step in network.history] == ["exits", "distill", "calibrate", "quantize"]
    without, notes = apply(calibrated, Quantize(), Context(data=data))
    assert "add a `calibrate` step behind" in notes[-1]
    assert without.operating_points is None


def test_gates_choose_among_paths_of_bytes(data: Splits) -> None:
    torch.manual_seed(0)
    network = gated_digits()
    set_scores(network, [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    quantized, notes = apply(copy.deepcopy(network), Quantize(max_drop=None), Context(data=data))
    assert "1 parts that fewer than 16" in notes[1]  # the block that nobody takes
    assert nn.Conv2d not in {type(one) for one in quantized.modules()}
    batch = images(data)
    found = []
    for run in (quantized, compile_network(quantized, "onnxruntime"), compile_network(quantized, "eager")):
        with torch.no_grad(), record_routing(quantized) as routing:
            found.append(run(batch))
        if run is quantized:
            assert routing.choices.unique(dim=0).tolist() == [[1, 0, 1]]
    assert all(float((one - found[0]).abs().max()) < 0.1 * float(found[0].abs().max()) for one in found)
    borders = {quantizers(way)[-1] for unit in quantized.changing for way in unit.paths() if way is not None}
    assert len(borders) == 1  # who skips a block lies on the same steps as who takes it


FRESH = """
import sys, numpy as np, torch
import dynamize as dz
from digits import DigitNet
from dynamize.graph.tracer import NetworkTracer
NetworkTracer()  # imports timm, which makes classes of its own with pickle
def no_pickle(*_, **__):
    raise AssertionError("an artifact needs no pickle")
import pickle
pickle.load = pickle.loads = pickle.Unpickler = no_pickle
torch.set_num_threads(1)
network = dz.load(sys.argv[1], network=DigitNet())
batch = torch.from_numpy(np.load(sys.argv[2]))
with torch.no_grad():
    np.save(sys.argv[3], np.stack([one.numpy() for one in network.all_exits(batch)]))
"""


@pytest.mark.slow
def test_comes_back_in_another_process(trained: DynamicNetwork, data: Splits, tmp_path: Path) -> None:
    network, _ = apply(copy.deepcopy(trained), Quantize(keep_float=["a"]), context(data))
    artifact.save(network, tmp_path / "artifact")
    np.save(tmp_path / "images.npy", images(data).numpy())
    arguments = [str(tmp_path / name) for name in ("artifact", "images.npy", "logits.npy")]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True, cwd=Path(__file__).parents[1])
    with torch.no_grad():
        wanted = [one.numpy() for one in network.all_exits(images(data))]
    assert np.array_equal(np.load(tmp_path / "logits.npy"), np.stack(wanted))
    sizes = [(tmp_path / "artifact" / "weights.safetensors").stat().st_size]
    artifact.save(trained, tmp_path / "float")
    sizes.append((tmp_path / "float" / "weights.safetensors").stat().st_size)
    assert sizes[0] < 0.7 * sizes[1]  # small layers: names and scales take their share


def test_what_would_change_weights_comes_before() -> None:
    changing = {"prune", "factorize", "expand_branches", "fuse_branches", "fold_batchnorm", "distill", "exits"}
    changing |= {"skip_gates", "channel_gates", "recalibrate", "fuse_gates", "hybrid_gates", "q_gates"}
    assert changing <= set(registered())
    for name in changing:
        with pytest.raises(DynamizeError, match=f"move `{name}` above `quantize`"):
            check_order([parse_step({"pass": name})], done=["skip_gates", "quantize"])
    with pytest.raises(DynamizeError, match="`distill` comes after step 2 `quantize`, .* move `distill` above"):
        check_order([parse_step({"pass": name}) for name in ("exits", "quantize", "distill")])
    with pytest.raises(DynamizeError, match="second `quantize`"):
        check_order([Quantize(), Quantize()])
    check_order([parse_step({"pass": name}) for name in ("exits", "distill", "calibrate", "quantize")])
    check_order([parse_step({"pass": name}) for name in ("exits", "distill", "quantize", "calibrate")])


def test_channel_gates_are_refused(data: Splits) -> None:
    from networks import SmallResNet, small_resnet

    network = convert(small_resnet(), [ChannelGates(multiple=4)], SmallResNet.shape)
    with pytest.raises(DynamizeError, match=r"channel gates, .*leave `channel_gates` out"):
        apply(network, Quantize(), Context(data=data))


def test_needs_images() -> None:
    with pytest.raises(DynamizeError, match="`quantize` needs images"):
        convert(DigitNet().eval(), [Quantize()], SHAPE)


@pytest.mark.slow
def test_neural_compressor(trained: DynamicNetwork, data: Splits) -> None:
    """Of one batch it takes the least and largest values, as `minmax` does; of several a moving average."""
    prepared = prepare(trained)
    theirs = chosen_steps(prepared, sample(data.calibration, 64, CPU))
    assert len(theirs) == 5  # the image, two borders, and what one head and the classifier read inside
    network, _ = apply(
        copy.deepcopy(trained), Quantize(ranges="neural-compressor", max_drop=None, images=64), context(data)
    )
    ours, _ = apply(copy.deepcopy(trained), Quantize(ranges="minmax", max_drop=None, images=64), context(data))
    found, wanted = quantizers(network), quantizers(ours)
    assert len(found) == 12
    ratios = [one[0] / other[0] for one, other in zip(found, wanted, strict=True)]
    assert sum(ratio == pytest.approx(1, rel=0.02) for ratio in ratios) >= 11
    assert min(ratios) > 0.98
    assert all(any(one.scale == pytest.approx(scale) for scale, _ in found) for one in theirs.values())
    before, after = (exit_accuracies(one, data.test, CPU) for one in (trained, network))
    assert max(abs(old - new) for old, new in zip(before, after, strict=True)) <= 0.03


@pytest.mark.parametrize("seed", [0, 1])  # norms called as functions, a mean to a learnt power; weight norm, a grid
@pytest.mark.fast("1")
def test_networks_of_strangers_compute_in_bytes(seed: int, tmp_path: Path) -> None:
    drawn = random_network(seed)
    images = torch.randn(96, *drawn.input_shape)
    batches = [[(part, drawn.network(part).argmax(1))] for part in images.split(32)]
    data = dz.splits(train=batches[0], calibration=batches[1], test=batches[2])
    context = Context(data=data, teacher=drawn.network)
    network = convert(drawn.network, [Quantize(images=32)], drawn.input_shape, context).eval()
    assert any(isinstance(module, QuantizedConv2d) for module in network.modules())
    dz.save(network, tmp_path / "out")
    again = dz.load(tmp_path / "out", network=random_network(seed).network).eval()
    assert torch.equal(again(images), network(images))
