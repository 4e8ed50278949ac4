"""Places that are learnt: where they start, and that they follow what crops answer."""

from typing import Any

import pytest
import torch

import dynamize as dz
from dynamize.nn.looking import LearntLook
from dynamize.nn.network import DynamicNetwork
from dynamize.nn.piece import Dense
from dynamize.nn.proposal import Proposal

SHAPE = (1, 16, 16)


def made(**fields: Any) -> DynamicNetwork:
    net = dz.source("dynamize:digits_resnet", pretrained=True)
    step = dz.GlanceFocus(**{"glance": 12, "crops": 2, "crop": 0.5, "size": 8, "policy": "learned"} | fields)
    return dz.convert(net, [step], SHAPE)


def proposing(network: DynamicNetwork) -> Proposal:
    (found,) = (piece.where for piece in network.row if isinstance(piece, LearntLook))
    return found


def test_without_evidence_it_starts_in_the_middle() -> None:
    proposal = Proposal((4, 5, 5), 1, (0.4, 0.4), None)
    assert proposal(torch.randn(3, 4, 5, 5)).flatten().tolist() == pytest.approx([0.5] * 6, abs=1e-5)


def test_it_starts_where_the_evidence_is_and_then_elsewhere() -> None:
    class Corner(torch.nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features[:, 0].flatten(1)

    evidence: Any = Corner()
    features = torch.zeros(1, 4, 6, 6)
    features[0, 0, 5, 0], features[0, 0, 0, 5] = 9, 6
    places = Proposal((4, 6, 6), 2, (0.5, 0.5), evidence)(features)
    assert places[0].tolist() == pytest.approx([1, 0, 0, 1], abs=0.05)


def test_what_crops_answer_moves_places_and_not_the_glance() -> None:
    network = made().train()
    proposal = proposing(network)
    images = torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(0))
    dense = network(images)
    assert isinstance(dense, Dense)
    dense.logits[1].log_softmax(1)[:, 0].sum().backward()
    assert proposal.score.weight.grad is not None
    assert float(proposal.score.weight.grad.abs().sum()) > 0
    assert all(one.grad is None for one in network.graphs["glance/"].parameters())
    assert any(one.grad is not None for one in network.graphs["focus-1/"].parameters())


def test_training_looks_anywhere_at_times_and_testing_never() -> None:
    proposal = proposing(made())
    features = torch.randn(400, *proposal.body[0].weight.shape[1:2], 3, 3)
    usual = proposal(features)
    moved = (proposal.tried(features) - usual).abs().amax(1) > 1e-6
    assert 0.15 < float(moved.float().mean()) < 0.35
    assert torch.equal(proposal(features), usual)


def test_it_follows_a_pruned_glance() -> None:
    network = made()
    before = proposing(network).body[0].weight.shape[1]
    pruned = dz.convert(network, [dz.Prune(ratio=0.5, statistics_images=0, member="glance")], SHAPE).eval()
    assert proposing(pruned).body[0].weight.shape[1] < before
    assert pruned(torch.randn(2, *SHAPE)).shape == (2, 10)
