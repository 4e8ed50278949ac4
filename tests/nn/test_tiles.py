"""Blocks computed in tiles: each image in those it wants, as with masks, and what that costs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import close, randomise_norms
from torch import Tensor

import dynamize as dz
from dynamize.graph.macs import count_macs
from dynamize.measure.costs import exit_costs
from dynamize.models import create
from dynamize.nn.gates import ALL_OPEN
from dynamize.nn.network import DynamicNetwork, record_routing
from dynamize.nn.piece import Choose, Setting
from dynamize.nn.tiles import TileGate, TileUnit

SHAPE = (3, 32, 32)


def tiled(**fields: Any) -> DynamicNetwork:
    torch.manual_seed(0)
    network = randomise_norms(create("cifar_resnet20")).eval()
    step = dz.SpatialSampling.model_validate({"form": "tiles", "group": 1} | fields)
    return dz.convert(network, [step], SHAPE).eval()


def undecided(network: DynamicNetwork, images: Tensor) -> DynamicNetwork:
    """With gates that want about 40 % of the tiles."""
    features = images
    with torch.no_grad():
        for piece in network.row:
            if isinstance(piece, TileUnit):
                for layer in (piece.gate.here, piece.gate.everywhere):
                    layer.weight.normal_()
                piece.gate.here.bias.zero_()
                piece.gate.here.bias.sub_(piece.gate(features).quantile(0.6))
            features = by_hand(piece, features)[0]
    return network


def by_hand(piece: Any, features: Tensor, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """What a piece gives, all computed, and which tiles of it are wanted, (N, T)."""
    if not isinstance(piece, TileUnit):
        return piece.module(features.clone()), torch.zeros(0)
    wanted = piece.gate(features) + offset > 0
    wanted[wanted.sum(1) > piece.most] = True
    found = features.clone()
    whole = piece.ways()[-1](features)
    for number, tile in enumerate(piece.tiling.tiles):
        rows = wanted[:, number]
        found[rows, :, *tile.place] = whole[rows, :, *tile.place]
    return found, wanted


@torch.no_grad()
def all_by_hand(network: DynamicNetwork, images: Tensor, offset: float) -> tuple[Tensor, dict[str, Tensor]]:
    features, taken = images, {}
    for piece in network.row:
        features, wanted = by_hand(piece, features, offset)
        if isinstance(piece, TileUnit):
            taken[piece.name] = wanted.sum(1).clamp(max=piece.most + 1)
    return features, taken


@pytest.mark.parametrize("fields", [{}, {"group": 2, "tile": 8}, {"tile": 6}, {"dense_from": 0.9, "tile": 10}])
@pytest.mark.fast("fields0")
def test_each_image_computes_the_tiles_it_wants(fields: dict[str, Any], tmp_path: Path) -> None:
    images = torch.randn(12, *SHAPE, generator=torch.Generator().manual_seed(1))
    network = undecided(tiled(**fields), images)
    dz.save(network, tmp_path)
    loaded = dz.load(tmp_path, network=create("cifar_resnet20"))
    kinds = set()
    for offset in (0.0, 0.3):
        logits, taken = all_by_hand(network, images, offset)
        kinds |= set(torch.cat(list(taken.values())).tolist())
        for one in (network, loaded, dz.compile_network(network, "onnxruntime")):
            found = one.run(images, Setting(offset=offset))
            assert all(torch.equal(found.taken[name], options) for name, options in taken.items())
            assert close(found.logits, logits, 1e-4)
    assert len(kinds) > 2
    with torch.no_grad(), record_routing(network) as routing:
        executed = count_macs(network, images)
    assert executed == exit_costs(network).executed(routing.taken, routing.images).sum()


@pytest.mark.parametrize("backend", ["eager", "onnxruntime", "openvino"])
@pytest.mark.fast("onnxruntime")
def test_a_map_in_the_layout_of_the_backend(backend: str) -> None:
    """64 channels lie in blocks; images go one by one and together."""
    network = dz.source("torchvision:resnet18")
    images = torch.randn(3, 3, 112, 112)
    dynamic = undecided(dz.convert(network, [dz.SpatialSampling(form="tiles")], (3, 112, 112)).eval(), images)
    compiled = dz.compile_network(dynamic, backend)
    wanted, taken = all_by_hand(dynamic, images, 0.0)
    assert torch.cat(list(taken.values())).any()
    assert not compiled.notes
    assert close(compiled.run(images).logits, wanted, 1e-4)
    assert close(torch.cat([compiled.run(one).logits for one in images.split(1)]), wanted, 1e-4)


def test_nothing_is_left_out_at_first() -> None:
    network, images = tiled(), torch.randn(2, *SHAPE)
    plain = network.plain.eval()
    with torch.no_grad():
        assert torch.equal(network(images), plain(images))
    assert not network.run(images, Setting(offset=-ALL_OPEN)).choices.any()


def test_options_are_numbers_of_tiles() -> None:
    unit = tiled(keep_first=False).changing[0]
    assert isinstance(unit, TileUnit)
    assert unit.tiling.window == (12, 12)  # 8 and twice what two convolutions of 3 look at
    assert unit.options() == ("none", "1 tile", *(f"{count} tiles" for count in range(2, 8)), "whole")
    tile, whole = 2 * 16 * 16 * 9 * 12 * 12, 2 * 16 * 16 * 9 * 32 * 32
    assert unit.path_macs == (*(tile * count for count in range(8)), whole)
    assert tile * 7 < whole


@pytest.mark.parametrize("option", [0, 3, 8])
def test_forced_options_take_the_tiles_of_the_highest_scores(option: int) -> None:
    images = torch.randn(4, *SHAPE)
    network = undecided(tiled(keep_first=False), images)
    unit = network.changing[0]
    features = images
    for piece in network.row[: network.row.index(unit)]:
        features = piece.module(features)
    with torch.no_grad():
        shares = torch.nn.functional.one_hot(torch.full((4,), option), 9).float()
        wanted, scores = unit.blend(features, shares), unit.gate(features)
        changed = (wanted - features).abs().sum(1)
        per_tile = torch.stack([changed[:, *tile.place].flatten(1).sum(1) for tile in unit.tiling.tiles], 1)
        best = scores.argsort(1, descending=True)[:, : len(unit.tiling.tiles) if option == 8 else option]
        assert torch.equal((per_tile > 0).nonzero(), torch.zeros_like(scores).scatter(1, best, 1).nonzero())
    found = network.run(images, Setting(forced={one.name: torch.full((4,), option) for one in [unit]}))
    assert found.taken[unit.name].tolist() == [option] * 4


def test_training_masks_what_is_skipped() -> None:
    """Without noise and with statistics as they are, the training forward is that of eval mode; gates get gradients
    from the answers and from the cost."""
    images = torch.randn(6, *SHAPE)
    network = undecided(tiled(keep_first=False), images)
    network.choose = Choose(noise=0.0)
    trained = network.dense(images)
    found = network.run(images)
    assert close(trained.logits[-1], found.logits, 1e-4)
    for unit in network.changing:
        assert torch.equal(trained.shares[unit.name].argmax(1), found.taken[unit.name])
        assert torch.equal(trained.shares[unit.name].detach().round().sum(1), torch.ones(6))
    unit = network.changing[0]
    cost = (trained.shares[unit.name] * torch.tensor(unit.path_macs)).sum()
    for target in (trained.logits[-1].square().sum(), cost):
        (gradient,) = torch.autograd.grad(target, [unit.gate.here.weight], retain_graph=True)
        assert gradient.abs().sum() > 0


def test_eval_mode_hands_gradients_on() -> None:
    images = torch.randn(3, *SHAPE, requires_grad=True)
    network = undecided(tiled(), images.detach())
    network.run(images).logits.sum().backward()
    assert images.grad is not None
    assert network.plain.get_parameter("layer1.1.conv1.weight").grad is not None


def test_the_gate_sees_a_tile_and_the_whole_map() -> None:
    gate = TileGate(2, 4).eval()
    features = torch.zeros(1, 2, 6, 8)
    features[0, 0, 4:, :4] = 3.0  # the last row of tiles is two rows high
    with torch.no_grad():
        assert gate(features).tolist() == [[3.0] * 4]
        gate.here.weight[0, 0] = gate.everywhere.weight[0, 0] = 1.0
        found = gate(features) - 3
    assert torch.allclose(found, torch.tensor([[0.75, 0.75, 3.75, 0.75]]), atol=1e-3)
