"""Closed-form leave-one-out answers against leaving each image out and solving again."""

import torch
from networks import SmallResNet, small_resnet
from torch import Tensor, nn

from dynamize.graph.cuts import cut_points
from dynamize.graph.trace import trace
from dynamize.training.probe import _leave_one_out, _pool, probe

CPU = torch.device("cpu")


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
        assert torch.equal(_leave_one_out(features, targets).argmax(1), brute_force(features, targets).argmax(1))


def test_many_random_features_do_not_flatter() -> None:
    labels = torch.arange(60) % 2
    targets = torch.nn.functional.one_hot(labels).double() * 2 - 1
    right = (_leave_one_out(torch.randn(60, 200, dtype=torch.float64), targets).argmax(1) == labels).double().mean()
    assert right < 0.75  # fitted and judged on the same images it would be 1.0


def test_informative_features_are_found_batch_by_batch() -> None:
    network = trace(small_resnet(), SmallResNet.shape)
    bodies = {cut.name: nn.Identity() for cut in cut_points(network)[1::2]}
    labels = torch.arange(48) % 3
    images = torch.randn(48, *SmallResNet.shape) * 0.1
    images[torch.arange(48), labels] += 1.0  # the class is the channel that is bright
    whole = probe(network, bodies, [(images, labels)], CPU)
    parts = probe(network, bodies, list(zip(images.split(10), labels.split(10), strict=True)), CPU)
    assert whole.right.shape == whole.scores.shape == (len(bodies), 48)
    assert torch.equal(whole.right, parts.right)
    assert whole.right.double().mean() > 0.95
    assert torch.equal(whole.own, network(images).argmax(1) == labels)


def test_a_body_is_seen_through_and_what_learns_sees_the_map_too() -> None:
    network = trace(small_resnet(), SmallResNet.shape)
    place = cut_points(network)[0].name
    labels = torch.arange(40) % 2
    images = torch.rand(40, *SmallResNet.shape)
    images[labels == 1, :, :4] *= -1  # only where things lie tells the classes apart, not their mean

    def right(body: nn.Module) -> float:
        return float(probe(network, {place: body}, [(images, labels)], CPU).right[0].double().mean())

    with torch.no_grad():
        blind = nn.Conv2d(cut_points(network)[0].shape[0], 4, 1)
        blind.weight.zero_()
    assert right(blind) > right(nn.AvgPool2d(2)) - 0.05
    assert right(blind) > 0.9


def test_where_there_are_no_labels_the_networks_own_answers_count() -> None:
    network = trace(small_resnet(), SmallResNet.shape)
    images = torch.randn(30, *SmallResNet.shape)
    found = probe(network, {cut_points(network)[0].name: nn.Identity()}, [(images, torch.full((30,), -1))], CPU)
    assert found.own.all()


def test_sure_answers_are_more_often_right() -> None:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(300) % 3
    images = torch.randn(300, *SmallResNet.shape, generator=generator)
    images[torch.arange(300), labels] += 0.06
    network = trace(small_resnet(), SmallResNet.shape)
    found = probe(network, {cut_points(network)[0].name: nn.Identity()}, [(images, labels)], CPU)
    surest = found.scores[0].argsort(descending=True)
    assert found.right[0][surest[:100]].double().mean() > found.right[0][surest[-100:]].double().mean() + 0.1


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
    assert torch.equal(_leave_one_out(features, targets).argmax(1), labels)
