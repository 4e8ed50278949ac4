"""The ways through a residual block: what is left of it without its branch, and both mixed for training."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from networks import close
from residual_networks import POINTWISE, Forward, Pieces, net_of, network_of, only_block, silence, skipped, traced_net
from torch import Tensor, nn
from torch.nn import functional as F

from dynamize.errors import DynamizeError
from dynamize.graph.extract import extract
from dynamize.graph.fold import folded
from dynamize.graph.residual import bypass, keeping_input, masked, residual_blocks
from dynamize.graph.trace import trace


class TestBypass:
    @pytest.mark.parametrize(
        ("forward", "wanted", "macs"),
        [
            (lambda m, x: m.relu(m.f(x) + m.pointwise(x)), lambda m, x: F.relu(m.pointwise(x)), POINTWISE),
            (lambda m, x: m.relu(m.pointwise(x) + m.f(x)), lambda m, x: F.relu(m.pointwise(x)), POINTWISE),
            (lambda m, x: (m.pointwise(x) + m.f(x)).add_(m.g(m.f(x))), lambda m, x: m.pointwise(x), POINTWISE),
            (lambda m, x: m.silu(m.f(x) + x), lambda m, x: F.silu(x), 0),
            (lambda m, x: m.silu(m.nothing(m.f(x).add_(x.clone()))), lambda m, x: F.silu(x), 0),
            (lambda m, x: m.norm(m.f(x) + x), lambda m, x: m.norm(x), 0),
            (lambda m, x: F.max_pool2d(m.f(x) + x, 2), lambda m, x: F.max_pool2d(x, 2), 0),
            (lambda m, x: m.norm(x) + m.f(x), lambda m, x: m.norm(x), 0),
            (lambda m, x: m.f(x)[:, :, 1:] + x[:, :, 1:], lambda m, x: x[:, :, 1:], 0),
            (lambda m, x: m.silu(m.f(x)[:, :, 1:] + x[:, :, 1:]), lambda m, x: F.silu(x[:, :, 1:]), 0),
            (lambda m, x: m.f(x) + x + m.scale, lambda m, x: x + m.scale, 0),
            (lambda m, x: x * m.scale + m.f(x), lambda m, x: x * m.scale, 0),
        ],
    )  # fmt: skip
    def test_is_the_shortcut_and_what_follows_the_sum(self, forward: Forward, wanted: Forward, macs: float) -> None:
        network = net_of(forward)
        traced = trace(network, (3, 8, 8))
        block = only_block(traced)
        assert (block.identity, block.bypass_macs) == (False, macs)
        path = bypass(traced, block)
        assert path is not None
        assert sum(node.meta["macs"] for node in path.graph.nodes if node.op != "output") == macs
        x = torch.randn(2, 8, 8, 8)
        held = x.clone()
        with torch.no_grad():
            assert torch.equal(path(x), wanted(network.get_submodule("block"), held.clone()))
        assert torch.equal(x, held)

    def test_an_activation_written_out_may_follow_the_sum(self) -> None:
        def forward(m: Pieces, x: Tensor) -> Tensor:
            y = m.f(x) + x
            return y * F.relu6(y + 3) / 6

        traced = traced_net(forward)
        x = torch.randn(2, 8, 8, 8)
        assert close(skipped(traced, only_block(traced), x), F.hardswish(x))

    def test_shares_only_its_own_modules_and_leaves_the_network_as_it_was(self) -> None:
        network = net_of(lambda m, x: m.silu(m.norm(m.f(x) * m.scale + m.pointwise(x))))
        traced = trace(network, (3, 8, 8))
        before = str(traced.graph)
        path = bypass(traced, only_block(traced))
        assert path is not None
        assert str(traced.graph) == before
        assert not any(module.training for module in path.modules())
        assert {name.rsplit(".", 1)[0] for name in path.state_dict()} == {"block.pointwise", "block.norm"}
        original = dict(traced.named_parameters())
        assert all(value is original[name] for name, value in path.named_parameters())
        images = torch.randn(2, 3, 8, 8)
        assert torch.equal(traced(images), network(images))

    def test_trains(self) -> None:
        traced = traced_net(lambda m, x: m.silu(m.f(x) + m.norm(x))).train()
        path = bypass(traced, only_block(traced))
        assert path is not None
        assert path.training
        x = torch.randn(2, 8, 8, 8, requires_grad=True)
        norm = nn.BatchNorm2d(8)
        norm.load_state_dict(traced.get_submodule("block.norm").state_dict())
        assert close(path(x), F.silu(norm(x)))
        path(x).sum().backward()
        assert x.grad is not None
        assert traced.get_submodule("block.norm").weight.grad is not None

    def test_of_another_network_is_refused(self) -> None:
        block = only_block(traced_net(lambda m, x: m.silu(m.f(x) + x)))
        other = traced_net(lambda m, x: m.f(x) + x)
        with pytest.raises(DynamizeError, match="'block' from `stem_2` to `block_silu` is no residual block of this"):
            bypass(other, block)


PROJECTIONS: list[Forward] = [
    lambda m, x: m.relu(m.f(x) + m.pointwise(x)),
    lambda m, x: (m.pointwise(x) + m.f(x)).add_(m.g(m.f(x))),
    lambda m, x: m.silu(m.nothing(m.f(x).add_(x.clone()))),
    lambda m, x: m.silu(x.add_(m.f(x))),
    lambda m, x: m.norm(m.nothing(m.f(x)) + x),
    lambda m, x: F.max_pool2d(m.f(x) + x, 2),
    lambda m, x: m.silu(m.f(x)[:, :, 1:] + x[:, :, 1:]),
    lambda m, x: m.f(x).add(other=m.pointwise(x) * m.scale) + m.scale,
    lambda m, x: m.pointwise(x) + (m.f(x) + F.adaptive_avg_pool2d(m.f(x), 1)),
    lambda m, x: (m.f(x).permute(0, 2, 3, 1) + x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    lambda m, x: (m.f(x).flatten(2) + x.flatten(2)).unflatten(2, (8, 8)),
]


def calls(module: nn.Module, run: Callable[[], Tensor]) -> Counter[str]:
    """How often each layer of ``module`` is called."""
    counted: Counter[str] = Counter()
    hooks = [
        one.register_forward_hook(lambda *_, name=name: counted.update([name])) for name, one in module.named_modules()
    ]
    run()
    for hook in hooks:
        hook.remove()
    return counted - Counter([""])


class TestMasked:
    @pytest.mark.parametrize("forward", PROJECTIONS)
    def test_is_the_block_or_its_bypass_for_each_image(self, forward: Forward) -> None:
        traced = traced_net(forward)
        block = only_block(traced)
        assert not block.identity
        x = torch.randn(4, 8, 8, 8)
        held, mix = x.clone(), masked(traced, block)
        with torch.no_grad():
            whole, without = extract(traced, block.after, block.upto)(x.clone()), skipped(traced, block, x)
            assert torch.equal(mix(x, torch.ones(4)), whole)
            assert close(mix(x, torch.zeros(4)), without)
            found = mix(x, torch.tensor([1.0, 0.0, 0.0, 1.0]))
        assert close(found, torch.stack([whole[0], without[1], without[2], whole[3]]))
        assert not torch.allclose(whole, without)
        assert torch.equal(x, held)

    @pytest.mark.parametrize("forward", PROJECTIONS)
    def test_runs_every_layer_once(self, forward: Forward) -> None:
        traced = traced_net(forward).train()
        block = only_block(traced)
        body, mix = extract(traced, block.after, block.upto), masked(traced, block)
        shared = dict(body.named_parameters())
        assert mix.training
        assert dict(mix.named_parameters()).keys() == shared.keys()
        assert all(value is shared[name] for name, value in mix.named_parameters())
        x = torch.randn(2, 8, 8, 8)
        in_body, in_mix = calls(body, lambda: body(x.clone())), calls(body, lambda: mix(x, torch.ones(2)))
        assert in_body
        assert in_mix == in_body

    def test_gradients_of_decisions_are_what_the_branch_adds(self) -> None:
        network = net_of(lambda m, x: m.pointwise(x) + m.f(x))
        traced = trace(network, (3, 8, 8))
        x, runs = torch.randn(3, 8, 8, 8), torch.tensor([1.0, 0.0, 1.0], requires_grad=True)
        masked(traced, only_block(traced))(x, runs).sum().backward()
        assert runs.grad is not None
        assert torch.allclose(runs.grad, network.get_submodule("block.f")(x).sum((1, 2, 3)), rtol=1e-4)

    def test_of_another_network_is_refused(self) -> None:
        block = only_block(traced_net(lambda m, x: m.silu(m.f(x) + x)))
        with pytest.raises(DynamizeError, match="is no residual block of this network"):
            masked(traced_net(lambda m, x: m.f(x) + x), block)


class TestKeepingInput:
    @pytest.mark.parametrize(
        "forward",
        [
            lambda m, x: x.clone() + m.f(F.relu(x, inplace=True)),
            lambda m, x: x.add_(m.f(x)),
            lambda m, x: F.pad(x[:, :, ::2, ::2], (2, 2, 2, 2)) + m.f(x.mul_(2)),
        ],
    )
    def test_copies_what_a_block_would_overwrite(self, forward: Forward) -> None:
        traced = traced_net(forward, nn.Identity())
        block = only_block(traced)
        body = extract(traced, block.after, block.upto)
        x = torch.randn(2, 8, 8, 8)
        held, overwritten = x.clone(), x.clone()
        with torch.no_grad():
            wanted = body(overwritten)
            assert not torch.equal(overwritten, held)
            assert torch.equal(keeping_input(body, block.shape)(x), wanted)
            assert torch.equal(x, held)

    def test_leaves_others_alone(self) -> None:
        traced = traced_net(lambda m, x: m.relu(m.f(x) + x))
        block = only_block(traced)
        body = extract(traced, block.after, block.upto)
        before = str(body.graph)
        assert keeping_input(body, block.shape) is body
        assert str(body.graph) == before


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("torchvision:resnet18", "layer2.0.bn2 layer2.1.bn2 layer4.0.bn2"),
        ("torchvision:mobilenet_v2", "features.3.conv.3 features.15.conv.3"),
        ("torchvision:convnext_tiny", "features.1.0 features.1.2"),
        ("dynamize:cifar_resnet20", "layer1.0.bn2 layer3.0.bn2"),
        ("timm:resnetv2_50", "stages.0.blocks.0.conv3 stages.0.blocks.1.conv3 stages.1.blocks.3.conv3"),
    ],
)
@pytest.mark.fast(
    "torchvision:mobilenet_v2-features.3.conv.3 features.15.conv.3", "dynamize:cifar_resnet20-layer1.0.bn2 layer3.0.bn2"
)
def test_a_block_with_a_silent_branch_is_its_bypass(name: str, last: str) -> None:
    network = network_of(name)
    for path in last.split():
        silence(network.get_submodule(path))
    traced = trace(network, (3, 64, 64))
    wanted = {path.split(".conv")[0].split(".bn")[0] for path in last.split()}
    blocks = [block for block in residual_blocks(traced) if block.module in wanted]
    assert len(blocks) == len(wanted)
    for block in blocks:
        with torch.no_grad():
            x = extract(traced, None, block.after)(torch.randn(2, 3, 64, 64))
            assert close(skipped(traced, block, x.clone()), extract(traced, block.after, block.upto)(x))


def test_a_gain_that_timm_multiplies_in_place_stays_in_the_branch() -> None:
    nfnet = pytest.importorskip("timm.models.nfnet", reason="needs timm, whose leaf list keeps this block whole")
    block = nfnet.NormFreeBlock(8, 8, alpha=0.2, beta=0.5, skipinit=True, act_layer=nn.SiLU)
    nn.init.constant_(block.skipinit_gain, 0.7)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), block, nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    traced = trace(network, (3, 8, 8))
    (found,) = residual_blocks(traced)
    assert (found.module, found.identity, found.bypass_macs) == ("1", True, 0)
    body, x = extract(traced, found.after, found.upto), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert torch.equal(body(x), block(x))
        assert torch.equal(folded(body)(x), block(x))
        assert close(masked(traced, found)(x, torch.tensor([1.0, 0.0])), torch.stack([block(x)[0], x[1]]))
        block.skipinit_gain.zero_()
        assert torch.equal(block(x), x)
