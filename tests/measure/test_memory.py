"""Bytes on disk and at the peak, against counting by hand."""

from pathlib import Path

import torch
from gated_networks import gated_resnet
from networks import ThreeLayer, with_exits
from torch import nn

from dynamize.checkpoints import save_state_dict
from dynamize.conversion import wrap
from dynamize.measure.memory import LiveBytes, peak_bytes, saved_bytes
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Setting


def test_size_is_that_of_the_file(tmp_path: Path) -> None:
    network = with_exits(chain=True)
    save_state_dict(network.state_dict(), tmp_path / "weights.safetensors")
    assert saved_bytes(network) == (tmp_path / "weights.safetensors").stat().st_size


def test_an_int8_weight_is_one_byte() -> None:
    class Holder(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.register_buffer("weight", torch.zeros(1000, dtype=dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    sizes = [saved_bytes(DynamicNetwork(Holder(one), input_shape=(1,))) for one in (torch.int8, torch.float32)]
    assert 2990 <= sizes[1] - sizes[0] <= 3010  # 3000, and the header's padding


def test_live_bytes_by_hand() -> None:
    given = torch.zeros(1000)
    with torch.no_grad(), LiveBytes() as live:
        first = given + 1  # 4000
        first.add_(1).view(10, 100)  # nothing new
        given.view(10, 100)  # not made here
        second = torch.cat([first, first])  # 8000
        assert (live.now, live.peak) == (12_000, 12_000)
        del first
        assert (live.now, live.peak) == (8_000, 12_000)
        del second
        torch.zeros(500)
        assert (live.now, live.peak) == (0, 12_000)


def test_peak_by_hand() -> None:
    """Of 4 bytes each: weights of conv1 4 * 27 + 4, conv2 8 * 36 + 8 and linear 8 * 5 + 5; the image, 3 * 64; and at
    most at once what conv1 gives and its relu, 4 * 64 each."""
    network = wrap(ThreeLayer().eval(), ThreeLayer.shape)
    weights = 4 * (4 * 27 + 4 + 8 * 36 + 8 + 8 * 5 + 5)
    assert peak_bytes(network) == weights + 4 * 3 * 64 + 4 * 2 * 4 * 64


def test_counted_on_the_dearest_path_and_nothing_is_left_changed() -> None:
    network = gated_resnet({}).train()
    network.setting = before = Setting({"exit.1": float("-inf"), "exit.2": None}, -1e6)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    peak = peak_bytes(network)
    assert peak_bytes(network) == peak
    assert network.setting is before
    assert before == Setting({"exit.1": float("-inf"), "exit.2": None}, -1e6)
    assert network.training
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    network.setting = Setting({"exit.1": float("inf"), "exit.2": None})
    assert peak_bytes(network) == peak
    assert peak > sum(value.nbytes for value in state.values()) + 2 * 4 * 8 * 16 * 16
