"""Blocks of branches begin as the convolution that they were made of, and end as one."""

import copy
import itertools
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import close, randomise_norms
from torch import Tensor, nn

from dynamize.nn.branches import BranchBlock, Form, fits

FORMS = get_args(Form)


def host(with_norm: bool, **fields: Any) -> tuple[nn.Conv2d, nn.BatchNorm2d | None]:
    conv = nn.Conv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, "padding": 1} | fields)
    if not with_norm:
        return conv, None
    norm = nn.BatchNorm2d(conv.out_channels, eps=1e-3, momentum=0.3)
    randomise_norms(norm)
    return conv, norm


def run(layers: list[nn.Module | None], images: Tensor, training: bool) -> Tensor:
    for layer in layers:
        if layer is not None:
            images = layer.train(training)(images)
    return images


def assert_nothing_changes(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, form: Form, images: Tensor) -> BranchBlock:
    """Bit-equal in both modes, and the same statistics after a step."""
    before = copy.deepcopy([conv, norm])
    block = BranchBlock(conv, norm, form)
    assert len(block.branches) > 0
    with torch.no_grad():
        for training in (False, True, False):
            assert torch.equal(run([block], images, training), run(before, images, training))
    return block


def perturb(block: nn.Module) -> None:
    """As training would: every parameter and statistic is something else."""
    randomise_norms(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def assert_fuses(block: BranchBlock, images: Tensor) -> nn.Conv2d:
    perturb(block)
    block.eval()
    conv = block.fuse()
    with torch.no_grad():
        assert close(conv(images), block(images))
    return conv


CHANNELS = [(4, 8, 1), (4, 4, 1), (4, 8, 2), (6, 6, 3), (4, 4, 4), (4, 8, 4)]  # inputs, outputs, groups


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.fast(
    "channels0-acnet", "channels1-dbb", "channels2-repvgg", "channels3-qarepvgg", "channels4-dbb", "channels5-acnet"
)
def test_every_form_on_every_convolution(form: Form, channels: tuple[int, int, int]) -> None:
    inputs, outputs, groups = channels
    images = torch.randn(3, inputs, 13, 12)
    for side, stride, dilation, bias, with_norm in itertools.product((3, 5), (1, 2), (1, 2), (False, True), (0, 1)):
        conv, norm = host(
            bool(with_norm), in_channels=inputs, out_channels=outputs, groups=groups, kernel_size=side, stride=stride,
            dilation=dilation, padding=dilation * (side // 2), bias=bias,
        )  # fmt: skip
        fused = assert_fuses(assert_nothing_changes(conv, norm, form, images), images)
        assert (fused.kernel_size, fused.stride, fused.padding) == (conv.kernel_size, conv.stride, conv.padding)
        assert (fused.dilation, fused.groups) == (conv.dilation, conv.groups)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    side=st.sampled_from([3, 5]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    padding=st.sampled_from([0, 1, 2, 3, (1, 2), (0, 3), "same", "valid"]),
    groups=st.sampled_from([1, 2, 4]),
    with_norm=st.booleans(),
)
def test_every_padding(form: Form, side: int, mode: str, padding: Any, groups: int, with_norm: bool) -> None:
    conv, norm = host(with_norm, out_channels=4, kernel_size=side, padding=padding, padding_mode=mode, groups=groups)
    images = torch.randn(2, 4, 9, 11)
    fused = assert_fuses(assert_nothing_changes(conv, norm, form, images), images)
    assert fused.groups == groups


@pytest.mark.parametrize(
    ("form", "fields", "branches"),
    [
        ("acnet", {}, ["1 x 3", "3 x 1"]),
        ("dbb", {}, ["1 x 1", "1 x 1 - 3 x 3", "1 x 1 - average"]),
        ("dbb", {"out_channels": 4, "groups": 4}, ["1 x 1 - 3 x 3", "average"]),
        ("repvgg", {}, ["1 x 1"]),
        ("repvgg", {"out_channels": 4}, ["1 x 1", "identity"]),
        ("repvgg", {"out_channels": 4, "stride": 2}, ["1 x 1"]),
        ("qarepvgg", {"out_channels": 4}, ["1 x 1", "identity"]),
        ("qarepvgg", {}, ["1 x 1"]),
    ],
)
def test_the_branches_of_a_form(form: Form, fields: dict, branches: list[str]) -> None:
    block = BranchBlock(*host(True, **fields), form)
    assert [_name(branch) for branch in block.branches] == branches
    norms = [m for branch in block.branches for m in branch.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool(norms) is (form != "qarepvgg")
    assert all(norm.eps == 1e-3 for norm in norms)


def _name(branch: nn.Module) -> str:
    sizes = [f"{m.kernel_size[0]} x {m.kernel_size[1]}" for m in branch.modules() if isinstance(m, nn.Conv2d)]
    average = "average" if "taps" in dict(branch.named_buffers()) else None
    return " - ".join([*sizes, *filter(None, [average])]) or "identity"


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_all_branches(form: Form) -> None:
    """The zero scale hides a branch's own layers in the first step only."""
    block = BranchBlock(*host(True, out_channels=4), form).train()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    images = torch.randn(4, 4, 8, 8)
    before = {name: value.clone() for name, value in block.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        block(images).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in block.named_parameters())
    block.eval()
    with torch.no_grad():
        assert close(block.fuse()(images), block(images))


def test_the_hand_made_case() -> None:
    """A 3 x 3 of ones over one channel, plus 2 x identity: 9 + 2 inside, 4 + 2 in a corner."""
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(conv.weight)
    block = BranchBlock(conv, None, "qarepvgg").eval()
    with torch.no_grad():
        block.branches[1].scale.fill_(2.0)
    fused = block.fuse()
    assert fused.weight.flatten().tolist() == [1, 1, 1, 1, 3, 1, 1, 1, 1]
    answer = fused(torch.ones(1, 1, 4, 4))
    assert answer[0, 0, 1, 1].item() == 11
    assert answer[0, 0, 0, 0].item() == 6


def test_frozen_hosts_and_modes_are_handed_on() -> None:
    conv, norm = host(True)
    conv.requires_grad_(False)
    fused = BranchBlock(conv, norm, "dbb").eval().fuse()
    assert not fused.training
    assert not fused.weight.requires_grad
    assert BranchBlock(*host(True), "acnet").double().eval().fuse().weight.dtype == torch.float64


def test_what_can_get_branches() -> None:
    assert fits(nn.Conv2d(1, 1, 3))
    for size in (1, 2, 4, (1, 3), (3, 5)):
        assert not fits(nn.Conv2d(1, 1, size))
