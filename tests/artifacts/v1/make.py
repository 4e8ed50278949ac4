"""Makes the artifacts of manifest format 1 in this folder. Runs against the code of the commit named in README.md:

    OMP_NUM_THREADS=1 PYTHONPATH=OLD:OLD/tests python tests/artifacts/v1/make.py [NAME...|runs|verify]

OLD is a checkout of that commit; ``scatter`` comes from its tests. A tiny RegNet is trained on the
bundled digits (8x8, shown at 16x16) for a moment, converted with real data in the context, and saved.
"""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gated_networks import scatter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dynamize as dz
from dynamize.calibration import collect
from dynamize.data import DataSpec, Splits, load_data
from dynamize.nn.branches import BranchBlock
from dynamize.nn.gated import GatedSegment, Unit
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.quantized import Quantizer
from dynamize.recipe import load_recipe
from dynamize.run import Runner, run_recipe
from dynamize.training import state
from dynamize.transform import Context

HERE = Path(__file__).resolve().parent
NEEDED = 1e-3  # least distance of a decision from its border
# 9090 parameters; blocks s1.b1*, s2.b1*, s2.b2, s3.b1*, s4.b1*; those with a star have a projection shortcut
REGNET = (
    "timm:regnetx_002,depth=5,w0=8,wa=5,wm=1.3,bottle_ratio=0.5,group_size=64,stem_width=8,in_chans=1,num_classes=10,"
    "output_stride=8"
)
SHAPE = (1, 16, 16)
collect.exit_latency = partial(collect.exit_latency, seconds=0.1)  # type: ignore[attr-defined]


def splits(shape: tuple[int, int, int]) -> Splits:
    spec = DataSpec(source="digits", augment="none", normalize=((0.305,), (0.376,)), calibration=300)
    return load_data(spec, shape, 10)


def trained() -> nn.Module:
    torch.manual_seed(0)
    network = dz.source(REGNET).train()
    data = splits(SHAPE)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    loader = data.train.training_loader(64, 0)
    for _ in range(6):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(data.train.prepare(images)), labels).backward()
            optimizer.step()
    return network.eval().requires_grad_(True)


class Maker:
    """Converts the original network step by step."""

    def __init__(self, original: nn.Module, shape: tuple[int, int, int]) -> None:
        self.original, self.shape, self.data = original, shape, splits(shape)
        self.context = Context(data=self.data, teacher=original, backend="eager")
        calibration = torch.cat([images for images, _ in self.data.calibration.batches(256)])
        self.images = calibration[:128]
        self.pool = torch.cat([images for images, _ in self.data.test.batches(256)])[:300]

    def then(self, network: nn.Module, *steps: Any) -> DynamicNetwork:
        return dz.convert(network, list(steps), self.shape, self.context).eval()

    def scattered(self, network: DynamicNetwork) -> DynamicNetwork:
        """Random gates that send about half of the images each way."""
        torch.manual_seed(1)
        return scatter(network, self.images).eval()


def heads() -> Any:
    return dz.Distill(epochs=2, train="heads", batch_size=64, alpha=0.2, precision="float32")


def two_exits(**fields: Any) -> Any:
    return dz.Exits.model_validate({"at": ["s2.b1", "s3.b1"], "head": "conv", "share": 1.0, "size": [8, 8]} | fields)


def chained_exits(m: Maker) -> DynamicNetwork:
    return m.then(m.original, two_exits(chain=True), heads(), dz.Calibrate(macs_ratio=0.9, points=6))


def skip_gates(m: Maker) -> DynamicNetwork:
    network = m.then(m.original, two_exits(), dz.SkipGates(gate="linear", group=1, keep_first=False))
    return m.then(m.scattered(network), heads(), dz.Calibrate(macs_ratio=0.9, points=6))


def recurrent_gates(m: Maker) -> DynamicNetwork:
    exit_ = two_exits(at=["s2.b2"], size=[8])
    network = m.then(m.original, exit_, dz.SkipGates(gate="recurrent", group=1, keep_first=False))
    return m.then(m.scattered(network), heads(), dz.Calibrate(macs_ratio=0.9, points=6))


def channel_gates(m: Maker) -> DynamicNetwork:
    network = m.then(m.original, dz.ChannelGates(groups=4, multiple=4, keep_first=False))
    recalibrate = dz.Recalibrate(statistics="widths", images=512)
    network = m.then(m.scattered(network), recalibrate, dz.Calibrate(macs_ratio=0.9, points=6))
    assert all(unit.has_own for unit in network.units)
    return network


def pruned(m: Maker) -> DynamicNetwork:
    prune = dz.Prune(macs_ratio=0.25, round_to=4)
    at = two_exits(at=["layer1.2", "layer2.1"], size=[16, 16], share=1.0)
    network = m.then(m.original, at, heads(), prune, heads(), dz.Calibrate(macs_ratio=0.22, points=6))
    assert any(name.startswith("exits.0") for name in _step(network, "prune")["widths"])
    return network


def pruned_gates(m: Maker) -> DynamicNetwork:
    gates = dz.SkipGates(gate="conv", group=1, keep_first=False)
    network = m.scattered(m.then(m.original, two_exits(), gates))
    network = m.scattered(m.then(network, dz.Prune(macs_ratio=0.6, round_to=2)))
    assert any(name.startswith("gates.0") for name in _step(network, "prune")["widths"])
    return m.then(network, heads(), dz.Calibrate(macs_ratio=0.6, points=6))


def factorized(m: Maker) -> DynamicNetwork:
    factorize = dz.Factorize(energy=0.8, round_to=2, timed=False)
    return m.then(m.original, two_exits(), heads(), factorize, heads(), dz.Calibrate(macs_ratio=0.7, points=6))


def _branched(m: Maker, form: str, layers: list[str]) -> DynamicNetwork:
    """With branches that do something; they start at zero."""
    network = m.then(m.original, two_exits(), dz.ExpandBranches(form=form, layers=layers))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for block in (module for module in network.modules() if isinstance(module, BranchBlock)):
            for branch in block.branches:
                for tensor in branch.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return network


def expanded(m: Maker) -> DynamicNetwork:
    network = _branched(m, "acnet", ["stem.conv", "s2.b2.conv2.conv", "s4.b1.conv2.conv"])
    return m.then(network, heads(), dz.Calibrate(macs_ratio=0.9, points=6))


def fused(m: Maker) -> DynamicNetwork:
    network = _branched(m, "dbb", ["stem.conv", "s2.b2.conv2.conv", "s3.b1.conv2.conv", "s4.b1.conv2.conv"])
    recover = dz.Distill(epochs=3, batch_size=64, alpha=0.2, precision="float32")
    return m.then(network, recover, dz.FuseBranches(), dz.Calibrate(macs_ratio=0.9, points=6))


def fused_gates(m: Maker) -> DynamicNetwork:
    network = m.then(m.original, dz.SkipGates(gate="linear", group=1, keep_first=False))
    labels = {unit.label: unit.region[1] for unit in network.units}
    # always its projection alone; never there; always whole. s2.b1 and s4.b1 keep their gates
    paths = {labels["s1.b1"]: 0, labels["s2.b2"]: 0, labels["s3.b1"]: 1}
    network = m.then(m.scattered(network), dz.FuseGates(paths=paths))
    assert len(network.units) == 2
    return m.then(m.scattered(network), dz.Calibrate(macs_ratio=0.6, points=6))


def folded(m: Maker) -> DynamicNetwork:
    return m.then(m.original, two_exits(), heads(), dz.FoldBatchnorm(), dz.Calibrate(macs_ratio=0.9, points=6))


def quantized(m: Maker) -> DynamicNetwork:
    quantize = dz.Quantize(images=128, max_drop=None)
    return m.then(m.original, two_exits(), heads(), dz.Calibrate(macs_ratio=0.9, points=6), quantize)


def quantized_gates(m: Maker) -> DynamicNetwork:
    gates = dz.SkipGates(gate="linear", group=1, keep_first=False)
    network = m.scattered(m.then(m.original, two_exits(), gates))
    quantize = dz.Quantize(images=128, max_drop=None, keep_float=["s3.b1"])
    return m.then(network, heads(), dz.Calibrate(macs_ratio=0.9, points=6), quantize)


MAKERS = [
    chained_exits, skip_gates, recurrent_gates, channel_gates, pruned, pruned_gates, factorized, expanded, fused,
    fused_gates, folded, quantized, quantized_gates,
]  # fmt: skip


def _step(network: DynamicNetwork, name: str) -> dict[str, Any]:
    return next(step for step in network.history if step["pass"] == name)


def answers(network: DynamicNetwork, images: Tensor) -> dict[str, Tensor]:
    """What an artifact has to answer, in eval mode at the network's operating point."""
    network.eval()
    with torch.no_grad(), dz.record_routing(network) as routing:
        logits = network(images)
    with torch.no_grad():
        every = torch.stack(network.all_exits(images))
    return {"logits": logits, "all_exits": every, "exits": routing.exits, "choices": routing.choices}


def margins(network: DynamicNetwork, images: Tensor, found: dict[str, Tensor]) -> Tensor:
    """Distance of each image's closest decision from its border, (N,); those count too that it would take later on."""
    least = torch.full((len(images),), float("inf"))
    for k, threshold in enumerate(network.thresholds):
        if threshold is not None:
            least = torch.minimum(least, (network.scores(found["all_exits"][k], k) - threshold).abs())
    choices = []
    features = images
    with torch.no_grad():
        for segment in network.segments:
            if not isinstance(segment, GatedSegment):
                features = segment(features.clone())
                continue
            memory = None
            for piece in segment.pieces:
                if not isinstance(piece, Unit):
                    features = piece(features.clone())
                    continue
                scores, memory = piece.gate.decide(piece.gate.describe(features), memory)
                best = (scores + network.gate_offset * piece.path_costs).topk(2)
                least = torch.minimum(least, best.values[:, 0] - best.values[:, 1])
                choices.append(best.indices[:, 0])
                ways = [features.clone() if way is None else way(features.clone()) for way in piece.paths()]
                features = torch.stack(ways)[choices[-1], torch.arange(len(images))]
    seen = found["choices"] >= 0  # of images that left before, -1
    if choices:
        assert torch.equal(torch.stack(choices, 1)[seen], found["choices"][seen])
    return least


def choose_point(network: DynamicNetwork, pool: Tensor) -> None:
    """Stand at the operating point under which images differ most; with gates, at one with an offset."""

    def variety(point: Any) -> float:
        network.set_operating_point(point)
        found = answers(network, pool)
        splits = [torch.bincount(found["exits"], minlength=network.exit_count)]
        splits += [torch.bincount(one[one >= 0], minlength=2) for one in found["choices"].T]
        shares = [split / split.sum().clamp(min=1) for split in splits]
        return float(sum(-(share * share.clamp(min=1e-9).log()).sum() for share in shares))

    points = [one for one in network.operating_points if not network.units or 0 < abs(one.gate_offset or 0) < 100]
    assert points, [one.gate_offset for one in network.operating_points]
    network.set_operating_point(max(points, key=variety))


def select(network: DynamicNetwork, pool: Tensor) -> Tensor:
    """Eight images of clear decisions, as different from each other as can be; each is stable alone and in a batch."""
    found = answers(network, pool)
    clear = margins(network, pool, found) > (3 * NEEDED)
    seen: set[tuple[int, ...]] = set()
    columns: set[tuple[int, int]] = set()
    rows: list[int] = []
    signatures = [(int(e), *map(int, c)) for e, c in zip(found["exits"], found["choices"], strict=True)]
    candidates = [n for n in range(len(pool)) if clear[n] and _stable(network, pool[n], found, n)]

    def worth(n: int) -> tuple[int, int]:
        return len(set(enumerate(signatures[n])) - columns), signatures[n] not in seen

    while len(rows) < 8:
        n = max((n for n in candidates if n not in rows), key=worth)
        rows.append(n)
        seen.add(signatures[n])
        columns |= set(enumerate(signatures[n]))
    return pool[sorted(rows)].clone()


def _stable(network: DynamicNetwork, image: Tensor, found: dict[str, Tensor], n: int) -> bool:
    """Whether the image gets the same answers alone: in bytes rounding may differ by a step."""
    if not any(isinstance(module, Quantizer) for module in network.modules()):
        return True
    alone = answers(network, image[None])
    with torch.backends.mkldnn.flags(enabled=False):
        other = answers(network, image[None])
    return all(
        torch.allclose(one["all_exits"][:, 0], found["all_exits"][:, n], atol=1e-4)
        and torch.equal(one["choices"][0], found["choices"][n])
        for one in (alone, other)
    )


def make(name: str, network: DynamicNetwork, maker: Maker) -> None:
    choose_point(network, maker.pool)
    images = select(network, maker.pool)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    dz.save(network, folder, data=maker.data.spec, classes=list(maker.data.classes))
    expected = {"images": images, **answers(network, images)}
    save_file({key: tensor.contiguous() for key, tensor in expected.items()}, folder / "expected.safetensors")
    (folder / "expected.safetensors").chmod(0o644)
    verify(name)


def verify(name: str) -> None:
    """Load with the code at hand and compare."""
    network = dz.load(HERE / name)
    expected = load_file(HERE / name / "expected.safetensors")
    found = answers(network, expected["images"])
    for key in ("exits", "choices"):
        assert torch.equal(found[key], expected[key]), (name, key)
    worst = max(float((found[k] - expected[k]).abs().max()) for k in ("logits", "all_exits"))
    margin = float(margins(network, expected["images"], found).min())
    assert margin > NEEDED
    assert worst < 1e-5
    point = network.operating_point
    size = sum(f.stat().st_size for f in (HERE / name).iterdir())
    temperatures = [round(t, 3) for t in network.temperatures.tolist()]
    print(
        f"{name}: {size} bytes, {network.source.source}, point {point.name} thresholds {point.thresholds} "
        f"offset {point.gate_offset}, temperatures {temperatures}, exits {expected['exits'].tolist()}, "
        f"choices {expected['choices'].tolist()}, margin {margin:.4f}, worst {worst:.1e}, "
        f"steps {[step['pass'] for step in network.history]}",
        flush=True,
    )


class Killed(BaseException):
    """The run dies here."""


def runs() -> None:
    """Two runs that were stopped, and what today's code makes of them on ``--resume``."""
    measure = Runner._measure

    def stop(self: Runner, index: int, *rest: Any) -> Any:
        if index == 3:  # after `calibrate` has been computed and before any of it was kept
            raise Killed
        return measure(self, index, *rest)

    Runner._measure = stop  # type: ignore[method-assign]
    _stopped("half_run")
    Runner._measure = measure  # type: ignore[method-assign]

    def progress(items: Any, label: str, total: int) -> Any:
        for done, item in enumerate(items):
            if label.startswith("distill: epoch 2") and done == 30:
                raise Killed
            yield item

    state._SECONDS_BETWEEN = 0.0  # type: ignore[misc]  # a checkpoint every 20 steps, and at the end of each epoch
    _stopped("half_run_training", progress=progress)


def _stopped(name: str, **options: Any) -> None:
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    try:
        run_recipe(load_recipe(HERE / f"{name}.yaml"), out, device="cpu", **options)
    except Killed:
        pass
    else:
        raise AssertionError("the run was not stopped")
    copy = Path("/tmp/v1w") / name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(out, copy)
    command = [sys.executable, "-m", "dynamize", "run", str(HERE / f"{name}.yaml"), "--out", str(copy), "--resume"]
    subprocess.run(command, check=True)
    row = json.loads((copy / "ledger.json").read_text())[-1]
    kept = {k: row[k] for k in ("step", "transform", "accuracy", "macs", "macs_ratio", "exits", "params")}
    (HERE / f"{name}_expected.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(name, kept, flush=True)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    if names == ["verify"]:  # loads what lies here and compares, makes nothing
        for one in MAKERS:
            verify(one.__name__)
        return
    chosen = [one for one in MAKERS if not names or one.__name__ in names]
    regnet = Maker(trained(), SHAPE) if any(one is not pruned for one in chosen) else None
    for one in chosen:
        maker = Maker(dz.source("dynamize:digits_resnet,pretrained=true"), (1, 8, 8)) if one is pruned else regnet
        assert maker is not None
        make(one.__name__, one(maker), maker)
    if not names or "runs" in names:
        runs()


if __name__ == "__main__":
    main(sys.argv[1:])
