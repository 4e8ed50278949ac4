"""Every transform before and after every other: what comes out is saved, loaded in a fresh process and the same.

The pairs are made from the registry, so a new transform is among them as soon as it has settings here.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import exit_scores
from torch import Tensor

from dynamize import artifact
from dynamize.calibration.operating import OperatingPoint, OperatingPoints
from dynamize.conversion import apply, wrap
from dynamize.data import DataSpec, load_data
from dynamize.errors import DynamizeError
from dynamize.graph.macs import count_macs
from dynamize.measure.costs import exit_costs
from dynamize.nn.network import DynamicNetwork, record_routing
from dynamize.rewrite.exchange import exit_answers
from dynamize.sources import SourceSpec, build
from dynamize.transform import Context, Transform, check_order, of_kind, parse_step, registered

SHAPE = (1, 8, 8)
TRAINED = SourceSpec(source="dynamize:digits_resnet", kwargs={"pretrained": True})
TRAINING: dict[str, Any] = {"epochs": 1, "batch_size": 50, "lr": 0.01, "precision": "float32"}

SETTINGS: dict[str, dict[str, Any]] = {  # the smallest that do something
    "calibrate": {"max_drop": 60, "points": 2},
    "channel_gates": {"blocks": ["layer1.2", "layer3.1", "layer3.2"], "multiple": 4},
    "distill": TRAINING,
    "exits": {"at": ["layer1.2", "layer2.2"], "size": [8, 8], "share": 1.0},
    "expand_branches": {"layers": ["layer1.0.conv1", "layer3.0.conv1"]},
    "factorize": {"layers": ["layer2.1.conv1", "layer3.0.conv2"], "energy": 0.5, "round_to": 4, "timed": False},
    "fold_batchnorm": {},
    "fuse_branches": {},
    "fuse_gates": {"time": False, "share": 0.9, "tolerance": 100},
    "hybrid_gates": TRAINING,
    "prune": {"ratio": 0.4, "round_to": 8, "statistics_images": 50},
    "q_gates": {"rounds": 1, "gate_epochs": 1, "network_epochs": 1, "batch_size": 50, "precision": "float32"},
    "quantize": {"images": 50, "max_drop": None},
    "recalibrate": {"images": 50},
    "skip_gates": {"blocks": [["layer1.1"], ["layer2.0"], ["layer2.1", "layer2.2"]]},
    "spatial_sampling": {"blocks": [["layer1.0"]]},
}
WITH_GATES = {"distill": {"gate_budget": 0.9}}  # fields besides, for networks with gates
GATES = ("skip_gates", "channel_gates", "spatial_sampling")
ELSEWHERE = {"cascade", "glance_focus"}  # make rows of several networks: see transforms/test_cascade.py and its like
NEEDS = {  # where the digits network would give a step nothing to do, or less than elsewhere
    "fuse_branches": ("expand_branches",),
    "recalibrate": ("channel_gates", "skip_gates"),
}
REFUSED = {  # what the second says where the rules allow a pair that cannot be
    ("channel_gates", "quantize"): "narrower paths slice weights while the network runs",
    ("expand_branches", "expand_branches"): "is no square convolution of odd size above 1",
    ("factorize", "factorize"): "is no linear layer and no convolution with groups=1",
    ("fold_batchnorm", "fold_batchnorm"): "no convolution or linear layer whose output only a batch norm",
    ("fuse_branches", "fuse_branches"): "the network has no parallel linear branches to fuse",
}

Names = tuple[str, ...]


def parsed(names: Iterable[str]) -> list[Transform]:
    steps: list[Transform] = []
    for name in names:
        gated = any(step.pass_name in GATES for step in steps)
        fields = SETTINGS.get(name, {}) | (WITH_GATES.get(name, {}) if gated else {})
        steps.append(parse_step({"pass": name, **fields}))
    return steps


def allowed(names: Names) -> bool:
    """Whether the rules allow this order, and each step has something to do."""
    try:
        check_order(parsed(names))
    except DynamizeError:
        return False
    return all(set(NEEDS.get(name, names)) & set(names[:i] or names) for i, name in enumerate(names))


def chain(first: str, second: str) -> Names | None:
    """The two, after what they need; None if the rules forbid this order."""
    needed = [
        [name for name in one if name in SETTINGS]
        for step in (first, second)
        if (one := NEEDS.get(step) or of_kind(registered()[step].needs))
    ]
    for before in ((), *product(*needed)):
        names = (*dict.fromkeys(before), first, second)
        others = set(combinations(names, 2)) - {(first, second)}
        if allowed(names) and not others & REFUSED.keys():
            return names
    return None


CHAINS = {
    (first, second): names
    for first in registered()
    for second in registered()
    if {first, second} <= SETTINGS.keys() and (names := chain(first, second)) is not None
}
STRUCTURE = ("exits", "skip_gates", "channel_gates")
QUICK = [pair for pair in CHAINS if set(CHAINS[pair]) <= set(STRUCTURE)]


Found = dict[str, Tensor]


def found(network: DynamicNetwork, images: Tensor) -> Found:
    """What a network does with images, what that costs by its own account, and what it executes."""
    with torch.no_grad(), record_routing(network.eval()) as routing:
        logits = network(images)
    costs = exit_costs(network).executed(routing.taken, routing.images)
    return {
        "logits": logits,
        "exits": routing.exits,
        "choices": routing.choices,
        "ledger": torch.tensor(costs.sum()),
        "executed": torch.tensor(count_macs(network, images), dtype=torch.float64),
        "params": torch.tensor(sum(parameter.numel() for parameter in network.parameters())),
    }


def context() -> Context:
    spec = DataSpec(
        source="digits", augment="crop", calibration=100, train_limit=100, test_limit=50, normalize=((0.305,), (0.376,))
    )
    teacher = build(TRAINED, trust_code=False).eval().requires_grad_(False)
    return Context(data=load_data(spec, SHAPE, 10), teacher=teacher, backend="eager")


def undecided(network: DynamicNetwork, images: Tensor) -> DynamicNetwork:
    """A copy whose gates and exits send images different ways, if no step has solved for that."""
    network = copy.deepcopy(network).eval()
    if network.operating_point is not None:
        return network
    torch.manual_seed(0)
    with torch.no_grad():
        for unit in network.changing:
            unit.gate.linear.weight.normal_(0, 2)
        logits = network.all_exits(images)
    thresholds = {one.name: float(exit_scores(network, logits[k], k).median()) for k, one in enumerate(network.leaving)}
    point = OperatingPoint(
        name="here", thresholds=thresholds, accuracy=0.5, accuracy_ci=(0, 1), accuracy_drop=0.0,
        accuracy_drop_ci=(0, 0), macs=1.0, macs_ci=(1, 1), macs_ratio=0.5, exits=[1.0] * network.exit_count,
    )  # fmt: skip
    network.operating_points = OperatingPoints((point,))
    network.set_operating_point(point)
    return network


class Maker:
    """Converts step by step; chains that begin alike share what they have in common."""

    def __init__(self) -> None:
        self.context = context()
        assert self.context.data is not None
        self.images = next(iter(self.context.data.test.batches(50)))[0]
        self.made: dict[Names, DynamicNetwork] = {}

    def network(self, names: Names) -> DynamicNetwork:
        if not names:
            return wrap(build(TRAINED, trust_code=False).eval(), SHAPE)
        if names not in self.made:
            torch.manual_seed(0)
            before, step = self.network(names[:-1]), parsed(names)[-1]
            network = apply(copy.deepcopy(before), step, self.context)[0]
            if step.exact:
                pairs = zip(exit_answers(network)[-1:], exit_answers(before)[-1:], strict=True)
                assert all(torch.equal(*pair) for pair in pairs), f"{names[-1]} is not exact after {names[:-1]}"
            self.made[names] = network
        return self.made[names]


LOAD_ALL = """
import sys, torch, dynamize as dz
from pathlib import Path
from test_pairs import found
torch.set_num_threads(1)
images = torch.load("images.pt")
folders = [file.parent for file in sorted(Path().glob("*/manifest.json"))]
torch.save({folder.name: found(dz.load(folder), images) for folder in folders}, "found.pt")
"""

Outcomes = dict[tuple[str, str], tuple[Found, Found] | DynamizeError]


def outcomes(pairs: Iterable[tuple[str, str]], folder: Path) -> Outcomes:
    """What each chain does before it is saved, and after one fresh process has loaded all of them; or its refusal."""
    torch.set_num_threads(1)
    maker, before, refused = Maker(), dict[tuple[str, str], Found](), dict[tuple[str, str], DynamizeError]()
    for pair in pairs:
        try:
            network = undecided(maker.network(CHAINS[pair]), maker.images)
        except DynamizeError as error:
            refused[pair] = error
            continue
        artifact.save(network, folder / "-".join(pair), source=TRAINED)
        before[pair] = found(network, maker.images)
    torch.save(maker.images, folder / "images.pt")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", LOAD_ALL], cwd=folder, env=environment, check=True)
    after = torch.load(folder / "found.pt")
    return {pair: (one, after["-".join(pair)]) for pair, one in before.items()} | refused


def check(pair: tuple[str, str], outcome: tuple[Found, Found] | DynamizeError) -> None:
    if pair in REFUSED:
        assert REFUSED[pair] in str(outcome)
        return
    if isinstance(outcome, DynamizeError):
        raise outcome
    before, after = outcome
    assert before["executed"] == before["ledger"]
    different = [name for name in before if not torch.equal(before[name], after[name])]
    assert not different


def test_every_transform_has_settings() -> None:
    missing = sorted(set(registered()) - set(SETTINGS) - ELSEWHERE)
    assert not missing, f"give {missing} in tests/test_pairs.py the smallest settings with which they do something"
    assert set(REFUSED) <= set(CHAINS)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return outcomes(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.mark.parametrize("pair", QUICK, ids="-".join)
def test_structure(pair: tuple[str, str], quick: Outcomes) -> None:
    check(pair, quick[pair])


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return outcomes([pair for pair in CHAINS if pair not in QUICK], tmp_path_factory.mktemp("slow"))


@pytest.mark.slow
@pytest.mark.parametrize("pair", [pair for pair in CHAINS if pair not in QUICK], ids="-".join)
def test_all(pair: tuple[str, str], slow: Outcomes) -> None:
    check(pair, slow[pair])


def test_images_take_different_ways(quick: Outcomes) -> None:
    """Or the routing compared above would say little."""
    for pair in (("exits", "skip_gates"), ("skip_gates", "channel_gates"), ("channel_gates", "exits")):
        before = quick[pair][0]  # type: ignore[index]
        assert len(before["exits"].unique()) == (3 if "exits" in pair else 1)
        assert len(before["choices"].unique(dim=0)) > 2
