"""Closed-form leave-one-out answers against leaving each image out and solving again."""

import torch
from networks import SmallResNet, small_resnet
from torch import Tensor

from dynamize.graph.cuts import cut_points
from dynamize.graph.trace import trace
from dynamize.training.probe import _leave_one_out, _pool, probe


def brute_force(features: Tensor, targets: Tensor) -> Tensor:
    """Ridge regression refitted n times, each without the image that it then answers."""
    count = len(features)
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    features = torch.cat([features, torch.ones(count, 1, dtype=features.dtype)], dim=1)
    ridge = 0.01 * count * torch.eye(features.shape[1], dtype=features.dtype)
    answers = []
    for i in range(count):
        rest = torch.arange(count) != i
        x, y = features[rest], targets[rest]
        answers.append(features[i] @ torch.linalg.solve(x.T @ x + ridge, x.T @ y))
    return torch.stack(answers)


def test_leave_one_out_is_refitting_without_each_image() -> None:
    for seed, (count, width) in enumerate([(12, 3), (20, 40), (30, 8)]):  # also more features than images
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(count, width, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 3, (count,), generator=generator)
        targets = torch.nn.functional.one_hot(labels, 3).double() * 2 - 1
        assert torch.equal(_leave_one_out(features, targets), brute_force(features, targets).argmax(1))


def test_many_random_features_do_not_flatter() -> None:
    labels = torch.arange(60) % 2
    targets = torch.nn.functional.one_hot(labels).double() * 2 - 1
    right = (_leave_one_out(torch.randn(60, 200, dtype=torch.float64), targets) == labels).double().mean()
    assert right < 0.75  # fitted and judged on the same images it would be 1.0


def test_informative_features_are_found_batch_by_batch() -> None:
    network = trace(small_resnet(), SmallResNet.shape)
    names = [cut.name for cut in cut_points(network)][1::2]
    labels = torch.arange(48) % 3
    images = torch.randn(48, *SmallResNet.shape) * 0.1
    images[torch.arange(48), labels] += 1.0  # the class is the channel that is bright
    whole = probe(network, names, [(images, labels)], torch.device("cpu"))
    parts = probe(network, names, list(zip(images.split(10), labels.split(10), strict=True)), torch.device("cpu"))
    assert whole.shape == (len(names), 48)
    assert whole.dtype == torch.bool
    assert torch.equal(whole, parts)
    assert whole.double().mean() > 0.95


def test_pooling_keeps_the_number_of_features_in_bounds() -> None:
    assert _pool(torch.zeros(5, 16, 8, 8)).shape == (5, 64)
    assert _pool(torch.zeros(5, 512, 8, 8)).shape == (5, 512)
    assert _pool(torch.zeros(5, 16, 1, 8)).shape == (5, 16)


def test_constant_and_repeated_features_do_no_harm() -> None:
    features = torch.ones(20, 6, dtype=torch.float64)
    labels = torch.arange(20) % 2
    features[:, 0] = labels * 2.0
    features[:, 1] = features[:, 0]
    targets = torch.nn.functional.one_hot(labels).double() * 2 - 1
    assert torch.equal(_leave_one_out(features, targets), labels)
