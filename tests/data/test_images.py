import pytest
import torch

from dynamize.data import DataSpec, load_data, loader, set_epoch


@pytest.fixture(scope="module")
def digits():
    return load_data(DataSpec(source="digits"), (1, 8, 8), 10)


def order(training_loader):
    return [int(label) for _, labels in training_loader for label in labels]


def test_training_order_depends_on_seed_and_epoch_only(digits):
    first, second = (digits.train.training_loader(64, seed=3) for _ in range(2))
    assert order(first) == order(second) == order(first)
    set_epoch(first, 1)
    assert order(first) != order(second)
    set_epoch(second, 1)
    assert order(first) == order(second)
    assert order(digits.train.training_loader(64, seed=4)) != order(digits.train.training_loader(64, seed=3))


def test_every_image_comes_once_with_its_label(digits):
    everything = loader(digits.train, 100, shuffle=True, seed=1)
    images = torch.cat([x for x, _ in everything])
    labels = torch.cat([y for _, y in everything])
    assert images.dtype == torch.uint8
    pairs = sorted((tuple(x.flatten().tolist()), int(y)) for x, y in zip(images, labels, strict=True))
    stored = zip(digits.train.storage.pixels, digits.train.labels, strict=True)
    assert pairs == sorted((tuple(x.flatten().tolist()), int(y)) for x, y in stored)


def test_the_last_small_batch_is_left_out_of_training_only(digits):
    sizes = [len(y) for _, y in digits.train.training_loader(100, seed=0)]
    assert sizes == [100] * 10
    assert [len(y) for _, y in digits.calibration.training_loader(500, seed=0)] == [359]
    assert sum(len(y) for _, y in digits.test.batches(100)) == 359


def test_prepare_augments_only_with_a_generator_and_only_train(digits):
    raw, _ = next(iter(digits.train.training_loader(32, seed=0)))
    plain = digits.train.prepare(raw)
    assert torch.equal(plain, digits.train.prepare(raw))
    augmented = digits.train.prepare(raw, torch.Generator().manual_seed(0))
    assert augmented.shape == plain.shape
    assert not torch.equal(augmented, plain)
    assert torch.equal(digits.test.prepare(raw, torch.Generator()), plain)


def test_accelerate_prepares_the_loader_and_keeps_the_epochs(digits):
    from accelerate import Accelerator

    ours = digits.train.training_loader(64, seed=5)
    prepared = Accelerator(cpu=True).prepare_data_loader(digits.train.training_loader(64, seed=5))
    for epoch in (0, 2):
        set_epoch(ours, epoch)
        set_epoch(prepared, epoch)
        assert order(prepared) == order(ours)


def test_one_item_is_an_image_and_its_label(digits):
    image, label = digits.test[3]
    assert image.shape == (1, 8, 8)
    assert label == digits.test.labels[3]
