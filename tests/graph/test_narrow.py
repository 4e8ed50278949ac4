"""Fewer channels: a narrowed region answers like the masked one, also behind batch norms with biases."""

import copy
from collections.abc import Callable

import pytest
import torch
from networks import close, randomise_norms, torchvision_network
from test_chains import SHAPE, SQUEEZES, Affine, Net, conv, small_vgg
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from dynamize.errors import DynamizeError
from dynamize.graph.chains import private_chains
from dynamize.graph.cuts import cut_points
from dynamize.graph.extract import extract
from dynamize.graph.macs import count_macs
from dynamize.graph.narrow import importance, mask_points, narrow, reorder
from dynamize.graph.trace import trace
from dynamize.models import create


def masked(region: fx.GraphModule, widths: dict[str, int]) -> fx.GraphModule:
    """The region at full width with multiplications by zeros and ones at its mask points."""
    region = copy.deepcopy(region)
    nodes = {node.name: node for node in region.graph.nodes}
    chains = [chain for chain in private_chains(region) if chain.name in widths]
    points = mask_points(region, chains)
    for chain in chains:
        for i, point in enumerate(points[chain.name]):
            node = nodes[point]
            mask = (torch.arange(chain.units) < widths[chain.name] // chain.together).float()
            mask = mask.repeat_interleave(node.meta["shape"][1] // chain.units)
            name = f"mask_{chain.name}_{i}"
            region.register_buffer(name, mask.reshape(1, -1, *[1] * (len(node.meta["shape"]) - 2)))
            with region.graph.inserting_after(node):
                value = region.graph.get_attr(name)
            with region.graph.inserting_after(value):
                product = region.graph.call_function(torch.mul, (node, value))
            node.replace_all_uses_with(product, lambda user, own=product: user is not own)
    region.recompile()
    return region


def assert_narrow_is_masked(region: fx.GraphModule, shape: tuple[int, ...], widths: dict[str, int]) -> fx.GraphModule:
    images = torch.randn(2, *shape)
    narrowed = narrow(region, widths)
    with torch.no_grad():
        wanted, whole = masked(region, widths)(images), region(images)
        assert close(narrowed(images), wanted, 1e-5)
        assert not close(whole, wanted, 1e-4)
    return narrowed


def halves(region: fx.GraphModule) -> dict[str, int]:
    return {chain.name: chain.units // 2 * chain.together for chain in private_chains(region)}


def shuffled(region: fx.GraphModule) -> None:
    for chain in private_chains(region):
        reorder(region, chain, torch.randperm(chain.units))


def alter_norms(network: nn.Module) -> fx.GraphModule:
    """Biases so large that a channel masked before its norm instead of behind it would be seen."""
    randomise_norms(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.bias, 0.5, 1.0)
    return trace(network, SHAPE)


def plain() -> Net:
    return Net(lambda n, x: n.b(F.relu(n.norm(n.a(x)))), 5, a=conv(3, 6, 3), norm=nn.BatchNorm2d(6), b=conv(6, 5, 3))


def separable() -> Net:
    def forward(n: Net, x: Tensor) -> Tensor:
        x = n.norm2(n.each(n.act(n.norm1(n.a(x)))))
        return n.b(F.hardswish(x)) + n.c(F.avg_pool2d(x, 3, 1, 1))

    layers = {"norm1": nn.BatchNorm2d(8), "act": nn.PReLU(8), "norm2": nn.BatchNorm2d(8, affine=False)}
    return Net(forward, 5, a=conv(3, 8), each=conv(8, 8, 3, groups=8), b=conv(8, 5), c=conv(8, 5), **layers)


def flattened() -> Net:
    def forward(n: Net, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(n.norm(n.a(x)), 2)
        return n.dropout(x.view(x.size(0), -1))

    return Net(forward, 6 * 4, pooled=False, a=conv(3, 6), norm=nn.BatchNorm2d(6), dropout=nn.Dropout())


def grouped() -> Net:
    """A grouped convolution with half as many outputs and one with twice as many, and norms of groups."""

    def forward(n: Net, x: Tensor) -> Tensor:
        x = F.relu(n.norm1(n.a(x)))
        x = F.relu(n.norm2(n.group1(x)))
        return n.b(n.affine(n.frozen(n.norm3(n.group2(x)))))

    layers = {"norm1": nn.BatchNorm2d(16), "norm2": nn.GroupNorm(4, 8), "norm3": nn.InstanceNorm2d(16, affine=True)}
    layers |= {"group1": conv(16, 8, 3, groups=8), "group2": conv(8, 16, 3, groups=4), "b": conv(16, 5)}
    return Net(forward, 5, a=conv(3, 16), affine=Affine((16, 1, 1)), frozen=FrozenBatchNorm2d(16), **layers)


@pytest.mark.parametrize("network", [plain, separable, flattened, grouped])
def test_narrowed_is_masked_behind_norms_with_biases(network: Callable) -> None:
    region = alter_norms(network())
    widths = halves(region)
    assert_narrow_is_masked(region, SHAPE, widths)
    for chain in private_chains(region):
        assert_narrow_is_masked(region, SHAPE, {chain.name: chain.together})


def test_groups_go_whole() -> None:
    region = alter_norms(grouped())
    narrowed = narrow(region, {"a": 4})
    assert repr(narrowed.a) == repr(conv(3, 4))
    assert repr(narrowed.norm1) == repr(nn.BatchNorm2d(4))
    assert repr(narrowed.group1) == repr(conv(4, 2, 3, groups=2))
    assert repr(narrowed.norm2) == repr(nn.GroupNorm(1, 2))
    assert repr(narrowed.group2) == repr(conv(2, 4, 3))
    assert repr(narrowed.b) == repr(conv(4, 5))
    assert [chain.channels for chain in private_chains(narrowed)] == [4, 5]
    with pytest.raises(DynamizeError, match="they go in groups, so give a multiple of 4"):
        narrow(region, {"a": 6})


@pytest.mark.parametrize("side", [1, 2])
def test_a_square_layer_behind_a_flattened_map_is_masked_by_itself(side: int) -> None:
    width = 6 * side * side
    region = trace(
        Net(
            lambda n, x: F.relu(n.square(F.adaptive_avg_pool2d(n.a(x), side).flatten(1))),
            width,
            pooled=False,
            a=conv(3, 6),
            square=nn.Linear(width, width),
        ),
        SHAPE,
    )
    assert_narrow_is_masked(region, SHAPE, {"a": 2})


@pytest.mark.parametrize(("forward", "layer"), SQUEEZES)
def test_narrowed_is_masked_around_squeeze_and_excitation(forward: Callable, layer: Callable) -> None:
    region = trace(Net(forward, 5, a=conv(3, 8), fc1=layer(8, 2), fc2=layer(2, 8), b=conv(8, 5)), SHAPE)
    chain = private_chains(region)[0]
    points = mask_points(region, [chain])["a"]
    assert len(points) == 2  # what is squeezed, and what was multiplied by the gate
    narrowed = assert_narrow_is_masked(region, SHAPE, {"a": 3})
    assert [tuple(narrowed.get_parameter(f"{name}.weight").shape[:2]) for name in ("fc1", "fc2")] == [(2, 3), (3, 2)]


@pytest.mark.parametrize("network", [plain, separable, flattened, grouped])
def test_reordering_changes_nothing(network: Callable) -> None:
    region = alter_norms(network())
    images = torch.randn(4, *SHAPE)
    with torch.no_grad():
        wanted = region(images)
        first = next(region.parameters()).clone()
        shuffled(region)
        assert close(region(images), wanted, 1e-6)
    assert not torch.equal(next(region.parameters()), first)


def test_channel_i_becomes_the_one_named_at_i() -> None:
    region = alter_norms(plain())
    chain = private_chains(region)[0]
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    before = {name: tensor.clone() for name, tensor in region.state_dict().items()}
    reorder(region, chain, order)
    after = region.state_dict()
    for name in ("a.weight", "a.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
        assert torch.equal(after[name], before[name][order]), name
    assert torch.equal(after["b.weight"], before["b.weight"][:, order])
    assert torch.equal(after["b.bias"], before["b.bias"])


def test_importance_by_hand() -> None:
    region = trace(plain(), SHAPE)
    chain, last = private_chains(region)
    with torch.no_grad():
        region.get_parameter("b.weight").zero_()[0, :, 0, 0] = torch.tensor([3.0, 1, 1, 1, 1, 0])
        region.get_parameter("b.weight")[1, 0, 2, 2] = 4
        region.get_parameter("norm.weight").copy_(torch.tensor([2.0, -7, 1, 0, 1, 1]))
        region.get_parameter("last.weight").fill_(1)
    found = importance(region, chain)
    assert found.dtype == torch.float64
    assert found.tolist() == [10, 7, 1, 0, 1, 0]
    filters = torch.tensor([26**0.5, 0, 0, 0, 0], dtype=torch.float64)  # no norm: sqrt(3) * the filter's own
    filters[:2] = torch.tensor([(9.0 + 4) ** 0.5, 4])  # 3, 1, 1, 1, 1 and 4
    assert torch.allclose(importance(region, last), 3**0.5 * filters)


def test_copies_are_contiguous_and_say_their_size() -> None:
    region = alter_norms(separable())
    region.get_parameter("a.weight").requires_grad_(False)
    narrowed = narrow(region, {"a": 3})
    assert "8, kernel" not in repr(narrowed.a)
    assert repr(narrowed.a) == repr(conv(3, 3))
    assert repr(narrowed.each) == repr(conv(3, 3, 3, groups=3))
    assert repr(narrowed.b) == repr(conv(3, 5))
    assert repr(narrowed.act) == "PReLU(num_parameters=3)"
    assert repr(narrowed.norm1) == repr(nn.BatchNorm2d(3))
    assert not narrowed.a.weight.requires_grad
    assert narrowed.b.weight.requires_grad
    state, old = narrowed.state_dict(), region.state_dict()
    assert state.keys() == old.keys()
    assert all(tensor.is_contiguous() for tensor in state.values())
    memory = {tensor.untyped_storage().data_ptr() for tensor in old.values()}
    assert not memory & {tensor.untyped_storage().data_ptr() for tensor in state.values()}


def test_the_original_stays_and_the_copy_is_annotated() -> None:
    region = trace(plain(), SHAPE).train()
    before = {name: tensor.clone() for name, tensor in region.state_dict().items()}
    narrowed = narrow(region, {"a": 2})
    assert all(torch.equal(tensor, before[name]) for name, tensor in region.state_dict().items())
    assert narrowed.training
    assert torch.equal(narrowed.get_buffer("norm.running_mean"), before["norm.running_mean"][:2])
    macs = sum(node.meta["macs"] for node in narrowed.graph.nodes)
    assert macs == count_macs(narrowed, torch.zeros(1, *SHAPE)) == 64 * 9 * (2 * 3 + 5 * 2) + 5 * 3
    assert [chain.channels for chain in private_chains(narrowed)] == [2, 5]
    assert narrow(narrowed, {"a": 1}).get_submodule("b").in_channels == 1


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"aa": 2}, "no private channel chain here. Did you mean a"),
        ({"a": 0}, "cannot keep 0 channels: give a whole number from 1 to 6"),
        ({"a": 7}, "cannot keep 7"),
        ({"a": 1.5}, "cannot keep 1.5"),
        ({"a": True}, "cannot keep True"),
    ],
)
def test_widths_that_do_not_exist_are_refused(widths: dict, message: str) -> None:
    with pytest.raises(DynamizeError, match=message):
        narrow(trace(plain(), SHAPE), widths)


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6]])
def test_orders_that_lose_a_channel_are_refused(order: list[int]) -> None:
    region = trace(plain(), SHAPE)
    with pytest.raises(DynamizeError, match="each of its 6 channels once"):
        reorder(region, private_chains(region)[0], order)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenet_v3_small",
        "efficientnet_b0",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "googlenet",
        "regnet_y_400mf",
    ],
)
@pytest.mark.fast("resnet18", "mobilenet_v3_small")
def test_torchvision_networks(name: str) -> None:
    region = trace(torchvision_network(name), (3, 64, 64))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = region(images)
        shuffled(region)
        assert close(region(images), wanted, 1e-5)
    assert_narrow_is_masked(region, (3, 64, 64), halves(region))


def test_vgg_narrows_the_blocks_of_its_first_linear_layer() -> None:
    region = trace(randomise_norms(small_vgg()), (3, 64, 64))
    last = private_chains(region)[-1].name
    narrowed = assert_narrow_is_masked(region, (3, 64, 64), {last: 100})
    assert narrowed.get_submodule("4").in_features == 100 * 49


def test_timm_subclasses() -> None:
    timm = pytest.importorskip("timm", reason="needs timm, whose layers are narrowed")
    network = randomise_norms(timm.create_model("tf_efficientnet_b0", pretrained=False, num_classes=10))
    region = trace(network, (3, 64, 64))
    assert_narrow_is_masked(region, (3, 64, 64), halves(region))


def test_regions_of_a_network_are_narrowed_by_themselves() -> None:
    traced = trace(randomise_norms(create("cifar_resnet20")), (3, 32, 32))
    cuts = cut_points(traced)
    region = extract(traced, cuts[2].name, cuts[3].name)
    narrowed = assert_narrow_is_masked(region, cuts[2].shape, halves(region))
    assert count_macs(narrowed, torch.zeros(1, *cuts[2].shape)) == (cuts[3].macs - cuts[2].macs) / 2
