"""Networks that nobody chose take what dynamize does to them, or refuse it in words."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import close
from random_networks import Drawn, random_anynet, random_network
from torch import Tensor, nn
from torch.nn import functional as F

from dynamize.artifact import load, save
from dynamize.conversion import convert
from dynamize.errors import DynamizeError
from dynamize.nn.flow import Flow
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Choose, Setting
from dynamize.runtime.compiled import compile_network
from dynamize.transform import Transform
from dynamize.transforms import ChannelGates, Exits, ExpandBranches, GlanceFocus, Prune, SkipGates, SpatialSampling

Drawing = Callable[[int], Drawn]
PRUNE = Prune(macs_ratio=0.7, statistics_images=0)


@pytest.mark.parametrize("seed", range(8))
def test_a_seed_is_one_network_that_answers_each_image_by_itself(seed: int) -> None:
    drawn, again = random_network(seed), random_network(seed)
    images = torch.randn(3, *drawn.input_shape)
    answers = drawn.network(images)
    assert torch.equal(answers, again.network(images))
    alone = torch.cat([drawn.network(image[None]) for image in images])
    assert answers.shape == (3, 7)
    assert torch.allclose(alone, answers, rtol=1e-3, atol=1e-4 * float(answers.detach().abs().max()))


def take(drawing: Drawing, seed: int, tmp_path: Path) -> None:
    """Exits and skip gates wherever there is something to cut or skip, and all that has to hold for them."""
    drawn = drawing(seed)
    images = torch.randn(4, *drawn.input_shape)
    wanted = drawn.network(images).detach()
    for steps in ([Exits(count=1, share=0.9)], *([[SkipGates(group=1, keep_first=False)]] if drawn.skippable else [])):
        dynamic = convert(drawn.network, steps, drawn.input_shape).eval()
        assert close(dynamic(images), wanted)
        choices = {unit.name: torch.tensor([0, 1, 0, 1]) for unit in dynamic.changing}
        assert len(choices) == (drawn.skippable if not dynamic.leaving else 0)
        with torch.no_grad():
            skipped = dynamic.run(images, Setting(forced=choices)).logits
            assert close(skipped, masked(dynamic, images, choices))
            save(dynamic, tmp_path / steps[0].pass_name)
            again = load(tmp_path / steps[0].pass_name, network=drawing(seed).network).eval()
            assert torch.equal(again.run(images, Setting(forced=choices)).logits, skipped)
        dynamic.train()
        dense = dynamic.dense(images)
        sum(logits.sum() for logits in dense.logits).backward()  # type: ignore[union-attr]


def masked(dynamic: DynamicNetwork, images: Tensor, choices: dict[str, Tensor]) -> Tensor:
    """What the dense forward of training says, with every layer in evaluation."""
    flow = Flow(images, everyone=True)
    flow.ahead = dynamic.exit_count
    choose = Forced(choices)
    for piece in dynamic.row:
        piece.dense(flow, choose)
    return flow.features


class Forced(Choose):
    def __init__(self, choices: dict[str, Tensor]) -> None:
        super().__init__()
        self.choices = choices

    def __call__(self, name: str, features: Tensor, scores_NP: Tensor) -> Tensor:
        return F.one_hot(self.choices[name], scores_NP.shape[1]).to(scores_NP)


@pytest.mark.parametrize("seed", [0, 1, 8, 38])
@pytest.mark.fast("1")
def test_a_few_take_exits_and_skip_gates(seed: int, tmp_path: Path) -> None:
    take(random_network, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_all_take_exits_and_skip_gates(seed: int, tmp_path: Path) -> None:
    take(random_network, seed, tmp_path)


def takes(drawn: Drawn, step: Transform) -> bool:
    """Whether the step is taken, or refused in words; if it is, the network is cheaper."""
    images = torch.randn(2, *drawn.input_shape)
    wanted = drawn.network(images).detach()
    try:
        dynamic = convert(drawn.network, [step], drawn.input_shape).eval()
    except DynamizeError:
        return False
    if isinstance(step, ChannelGates):
        assert close(dynamic(images), wanted)
        choices = {unit.name: torch.tensor([0, 1]) for unit in dynamic.changing}
        with torch.no_grad():
            assert close(dynamic.run(images, Setting(forced=choices)).logits, masked(dynamic, images, choices))
        assert all(unit.path_macs[0] < unit.path_macs[-1] for unit in dynamic.changing)
    return True


@pytest.mark.slow
def test_most_with_batch_norm_take_channel_gates() -> None:
    found = []
    for seed in range(60):
        taken = takes(random_network(seed), ChannelGates(groups=2, keep_first=False))
        if any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) for module in random_network(seed).network.modules()
        ):
            found.append(taken)
    assert sum(found) >= 0.9 * len(found)


@pytest.mark.slow
def test_most_can_be_pruned() -> None:
    assert sum(takes(random_network(seed), PRUNE) for seed in range(60)) >= 0.9 * 60


def anynet(seed: int, tmp_path: Path) -> None:
    """Every step that an AnyNet takes, and what a backend makes of it."""
    take(random_anynet, seed, tmp_path)
    drawn = random_anynet(seed)
    images = torch.randn(3, *drawn.input_shape)
    wanted = drawn.network(images).detach()
    for step in (
        ChannelGates(groups=2, keep_first=False),
        SpatialSampling(keep_first=False),
        GlanceFocus(glance=drawn.input_shape[1] // 2 + 4, crops=1),
        ExpandBranches(),
    ):
        try:
            dynamic = convert(random_anynet(seed).network, [step], drawn.input_shape).eval()
        except DynamizeError:
            assert not isinstance(step, GlanceFocus | ExpandBranches)
            continue
        assert close(dynamic(images), wanted)
        assert close(compile_network(dynamic)(images), wanted)
    takes(random_anynet(seed), PRUNE)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.fast("0")
def test_a_few_anynets_take_exits_and_skip_gates(seed: int, tmp_path: Path) -> None:
    take(random_anynet, seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_anynets_take_every_step(seed: int, tmp_path: Path) -> None:
    anynet(seed, tmp_path)
