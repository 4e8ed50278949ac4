"""`fuse_branches`: one convolution for each block, for foreign ones too; the same answers, in another process too."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from digits import SHAPE, digit_splits
from gated_networks import gated_resnet
from networks import SmallResNet, close, conv_block, randomise_norms, small_resnet, with_exits
from torch import Tensor, nn

from dynamize import artifact
from dynamize.conversion import apply, convert, replay, wrap
from dynamize.errors import DynamizeError
from dynamize.graph.macs import count_macs
from dynamize.models import create
from dynamize.nn.branches import BranchBlock, Form
from dynamize.nn.network import DynamicNetwork
from dynamize.sources import SourceSpec
from dynamize.transform import Context, check_order
from dynamize.transforms import Distill, Exits, ExpandBranches, FuseBranches, SkipGates

FORMS = get_args(Form)


class RepBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.large = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.small = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.same = nn.BatchNorm2d(outputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x) + self.small(x)
        return torch.relu(y if self.same is None else y + self.same(x))


class RepNet(nn.Module):
    """Made by a user: a stem, four blocks of branches and a residual sum over the last."""

    shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(3, 8)
        self.a, self.b, self.c, self.d = RepBlock(8, 8), RepBlock(8, 12, 2), RepBlock(12, 12), RepBlock(12, 12)
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(self.stem(x))))
        return self.linear((x + self.d(x)).mean((2, 3)))


def rep_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise_norms(RepNet(), seed).eval()


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


def trained(network: DynamicNetwork) -> DynamicNetwork:
    """As training would leave it: every parameter of the blocks moved, all statistics used."""
    randomise_norms(network)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, BranchBlock):
                for parameter in module.branches.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


def count(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


class TestExpandedBlocks:
    @pytest.mark.parametrize("form", FORMS)
    def test_the_structure_of_the_original_comes_back(self, form: Form) -> None:
        network = small_resnet()
        expanded = trained(convert(network, [ExpandBranches(form=form)], SmallResNet.shape))
        wanted = expanded(images()).detach()
        assert not close(wanted, network(images()), 1e-2)
        fused, notes = apply(expanded, FuseBranches(), Context())
        assert count(fused, BranchBlock) == count(fused, nn.BatchNorm2d) == 0
        assert count(fused, nn.Conv2d) == count(network, nn.Conv2d)
        with torch.no_grad():
            assert close(fused(images()), wanted)
        blank = torch.zeros(1, *SmallResNet.shape)
        assert count_macs(fused, blank) == count_macs(network, blank)
        assert sum(node.meta["macs"] for node in fused.plain.graph.nodes) == count_macs(network, blank)
        assert notes[0].startswith("13 blocks of branches are one convolution each: ")
        assert fused.history[-1] == {"pass": "fuse_branches", "version": 1, "sums": []}

    def test_in_networks_with_exits(self) -> None:
        network = trained(apply(with_exits(), ExpandBranches(), Context())[0])
        wanted = [one.detach() for one in network.all_exits(images())]
        fused, _ = apply(network, FuseBranches(), Context())
        assert count(fused, BranchBlock) == 0
        with torch.no_grad():
            assert all(close(*pair) for pair in zip(fused.all_exits(images()), wanted, strict=True))

    def test_in_heads_that_are_copies_of_layers(self) -> None:
        steps = [ExpandBranches(form="acnet"), Exits(at=["layer1"], head="tail", size=[0], share=1.0)]
        network = trained(convert(small_resnet(), steps, SmallResNet.shape))
        assert count(nn.ModuleList(network.leaving), BranchBlock) > 0
        fused, _ = apply(network, FuseBranches(), Context())
        assert count(fused, BranchBlock) == 0

    def test_in_networks_with_gates_whose_costs_are_counted_anew(self) -> None:
        network = gated_resnet(keep_first=False)
        macs = [unit.path_macs for unit in network.changing]
        expanded = trained(apply(copy.deepcopy(network), ExpandBranches(form="acnet"), Context())[0])
        wanted = expanded(images()).detach()
        fused, _ = apply(expanded, FuseBranches(), Context())
        assert [unit.path_macs for unit in fused.changing] == macs
        with torch.no_grad():
            assert close(fused(images()), wanted)


class TestForeignBlocks:
    def test_a_users_network(self) -> None:
        network = rep_net()
        fused = convert(network, [FuseBranches()], RepNet.shape)
        assert count(fused, nn.Conv2d) == 5
        assert count(fused, nn.BatchNorm2d) == 1
        with torch.no_grad():
            assert close(fused(images()), network(images()))
        again = replay(rep_net(1), fused.history, RepNet.shape)
        again.load_state_dict(fused.state_dict())
        assert torch.equal(again(images()), fused(images()))

    def test_some_of_them(self) -> None:
        every = convert(rep_net(), [FuseBranches()], RepNet.shape).history[0]["sums"]
        assert len(every) == 4
        fused = convert(rep_net(), [FuseBranches(sums=every[:1])], RepNet.shape)
        assert count(fused, nn.Conv2d) == 1 + 1 + 3 * 2
        with pytest.raises(DynamizeError, match="`ad` is no sum of parallel linear branches"):
            convert(rep_net(), [FuseBranches(sums=["ad"])], RepNet.shape)

    def test_between_exits(self) -> None:
        network = convert(rep_net(), [Exits(at=["a", "b"], share=1.0, size=[8, 8])], RepNet.shape)
        wanted = [one.detach() for one in network.all_exits(images())]
        fused, _ = apply(network, FuseBranches(), Context())
        assert count(fused.nets, nn.Conv2d) == 5
        assert [piece.effect for piece in fused.row] == [None, "leaves", None, "leaves", None]
        with torch.no_grad():
            assert all(close(*pair) for pair in zip(fused.all_exits(images()), wanted, strict=True))

    def test_inside_of_gated_blocks_they_stay(self) -> None:
        gated = convert(rep_net(), [SkipGates(group=1, keep_first=False)], RepNet.shape)
        inside = [unit.label for unit in gated.changing]
        assert inside
        fused, notes = apply(gated, FuseBranches(), Context())
        assert "inside of a block with a gate: fuse before the step that puts gates" in " ".join(notes)
        assert all(count(unit.paths()[-1], nn.BatchNorm2d) for unit in fused.changing)

    @pytest.mark.parametrize(
        ("name", "blocks"), [("repvgg_a0", 22), pytest.param("mobileone_s0", 43, marks=pytest.mark.slow)]
    )
    @pytest.mark.fast("repvgg_a0-22")
    def test_timm(self, name: str, blocks: int) -> None:
        timm = pytest.importorskip("timm", reason="needs timm, for networks that others re-parameterise")
        network = randomise_norms(timm.create_model(name, num_classes=5)).eval()
        fused, notes = apply(wrap(network, (3, 32, 32)), FuseBranches(), Context())
        assert notes[0].startswith(f"{blocks} blocks")
        assert count(fused, nn.BatchNorm2d) == 0
        batch = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert close(fused(batch), network(batch))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DynamizeError, match="no parallel linear branches to fuse"):
        convert(small_resnet(), [FuseBranches()], SmallResNet.shape)
    check_order([ExpandBranches(), Distill(), FuseBranches()])
    right = BranchBlock.fuse

    def wrong(block: BranchBlock) -> nn.Conv2d:
        conv = right(block)
        with torch.no_grad():
            conv.bias.add_(1e-3)
        return conv

    monkeypatch.setattr(BranchBlock, "fuse", wrong)
    with pytest.raises(DynamizeError, match=r"`\S+` cannot be replaced: the new layer differs from it by"):
        convert(small_resnet(), [ExpandBranches(), FuseBranches()], SmallResNet.shape)


@pytest.mark.slow
def test_expand_distill_fuse_and_back_from_an_artifact(tmp_path: Path) -> None:
    """The whole chain, loaded by a process of its own."""
    torch.manual_seed(0)
    original = create("digits_resnet").eval()
    context = Context(data=digit_splits(128), teacher=original)
    network = wrap(original, SHAPE)
    steps = [
        ExpandBranches(form="dbb", layers=["layer1.0.conv1", "layer2.0.conv1"]),
        Distill(epochs=1, batch_size=64, precision="float32"),
        FuseBranches(),
    ]
    for step in steps:
        network, _ = apply(network, step, context)
    batch = torch.randn(6, *SHAPE)
    wanted = network.eval()(batch).detach()
    artifact.save(network, tmp_path / "out", source=SourceSpec(source="dynamize:digits_resnet"))
    torch.save(batch, tmp_path / "images.pt")
    code = (
        "import torch, dynamize as dz\n"
        "torch.set_num_threads(1)\n"
        "torch.save(dz.load('out')(torch.load('images.pt')).detach(), 'answers.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "answers.pt"), wanted)
    assert sum(p.numel() for p in network.parameters()) <= sum(p.numel() for p in original.parameters())
