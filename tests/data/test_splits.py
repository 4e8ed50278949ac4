import logging

import numpy as np
import pytest
import torch
from PIL import Image

from dynamize.data import DataSpec, load_data
from dynamize.errors import DynamizeError
from dynamize.recipe import Recipe
from dynamize.subject import Named


def load(source, shape=(3, 8, 8), classes=2, progress=None, **options):
    return load_data(DataSpec(source=source, **options), shape, classes, progress)


def keys(splits):
    return {name: list(getattr(splits, name).keys) for name in ("train", "calibration", "test")}


def is_a_partition(splits, total):
    together = [key for part in keys(splits).values() for key in part]
    return len(together) == len(set(together)) == total


def test_digits_are_split_60_20_20_the_same_for_every_seed():
    splits = load("digits", (1, 8, 8), 10)
    assert [len(splits.train), len(splits.calibration), len(splits.test)] == [1079, 359, 359]
    assert is_a_partition(splits, 1797)
    assert keys(splits) == keys(load("digits", (1, 8, 8), 10, seed=7))
    counts = splits.calibration.labels.bincount()
    assert counts.min() >= 34
    assert splits.warnings == []
    assert splits.train.storage.pixels.max() == 255


def test_digits_train_images_are_never_calibration_images_of_another_mode():
    usual = keys(load("digits", (1, 8, 8), 10))
    halves = keys(load("digits", (1, 8, 8), 10, calibration_from="test"))
    assert set(halves["train"]) == set(usual["train"])


def test_more_digits_than_the_standard_calibration_part_warn():
    assert load("digits", (1, 8, 8), 10, calibration=600).warnings


def test_calibration_from_train_is_stratified_and_warned_about(make_folder, caplog):
    root = make_folder(train=60, test=30)
    with caplog.at_level(logging.WARNING, "dynamize"):
        splits = load(f"imagefolder:{root}", calibration=0.25)
    assert len(splits.calibration) == 30
    assert splits.calibration.labels.tolist() == [0] * 15 + [1] * 15
    assert is_a_partition(splits, 180)
    assert splits.spec.calibration == 30
    assert "too sure of itself" in splits.warnings[0]
    assert splits.warnings[0] in caplog.text


def test_even_files_of_each_class_calibrate_and_odd_ones_test(make_folder):
    root = make_folder(train=10, test=25)
    splits = load(f"imagefolder:{root}", calibration_from="test")
    expected = [f"{root}/test/{c}/{i:04}.png" for c in ("cat", "dog") for i in range(0, 25, 2)]
    assert splits.calibration.keys == expected
    assert all(int(key[-5]) % 2 == 1 for key in splits.test.keys)
    assert is_a_partition(splits, 70)
    assert splits.warnings == []
    swapped = load(f"imagefolder:{root}", calibration_from="test", fold=1)
    assert swapped.calibration.keys == splits.test.keys
    assert swapped.test.keys == splits.calibration.keys


def test_a_smaller_calibration_does_not_move_the_test_images(make_folder):
    root = make_folder(train=10, test=60)
    whole = load(f"imagefolder:{root}", calibration_from="test")
    fewer = load(f"imagefolder:{root}", calibration_from="test", calibration=24)
    assert len(fewer.calibration) == 24
    assert set(fewer.calibration.keys) < set(whole.calibration.keys)
    assert fewer.test.keys == whole.test.keys


def test_validation_folder(make_folder):
    root = make_folder(train=10, val=15, test=20)
    splits = load(f"imagefolder:{root}", calibration_from="val")
    assert [len(splits.train), len(splits.calibration), len(splits.test)] == [20, 30, 40]
    assert all("/val/" in key for key in splits.calibration.keys)
    assert splits.warnings == []


def test_val_stands_for_test_where_there_is_no_test(make_folder):
    splits = load(f"imagefolder:{make_folder(train=40, val=15)}", calibration=20)
    assert all("/val/" in key for key in splits.test.keys)
    with pytest.raises(DynamizeError, match="calibration_from is val, .* use one of train, test"):
        load(splits.spec.source, calibration_from="val")


def test_flat_folder_is_split_80_10_10(make_folder):
    root = make_folder(flat=100)
    splits = load(f"imagefolder:{root}", seed=3)
    assert [len(splits.train), len(splits.calibration), len(splits.test)] == [160, 20, 20]
    assert splits.test.labels.bincount().tolist() == [10, 10]
    assert is_a_partition(splits, 200)
    assert keys(splits) == keys(load(f"imagefolder:{root}", seed=3))
    assert keys(splits) != keys(load(f"imagefolder:{root}", seed=4))


def test_limits_keep_classes_balanced(make_folder):
    splits = load(f"imagefolder:{make_folder(train=60, test=30)}", calibration=20, train_limit=30, test_limit=8)
    assert splits.train.labels.bincount().tolist() == [15, 15]
    assert splits.test.labels.bincount().tolist() == [4, 4]


def test_the_resolved_spec_gives_the_same_splits(make_folder):
    splits = load(f"imagefolder:{make_folder(train=60, test=30)}", calibration=0.2, train_limit=40)
    again = load_data(splits.spec, (3, 8, 8), 2)
    assert keys(again) == keys(splits)
    assert again.spec == splits.spec


def test_too_few_calibration_images(make_folder):
    root = make_folder(train=60, test=30)
    with pytest.raises(DynamizeError, match=f"19 calibration images asked of {root}/train: at least 20"):
        load(f"imagefolder:{root}", calibration=19)
    with pytest.raises(DynamizeError, match="it can give 120"):
        load(f"imagefolder:{root}", calibration=121)


def test_test_folder_that_is_a_link_to_train_is_refused(make_folder):
    root = make_folder(train=60)
    (root / "test").symlink_to(root / "train")
    with pytest.raises(DynamizeError, match="train and test share 90 images, such as .*png"):
        load(f"imagefolder:{root}", calibration=30)


def test_normalisation_is_computed_on_train_and_recorded(make_npz):
    x = np.zeros((60, 8, 8, 3), dtype=np.uint8)
    x[::2, :, :, 0], x[..., 1] = 255, 51
    y = np.arange(60) // 30
    path = make_npz(x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    splits = load(f"npz:{path}", calibration_from="train", calibration=20)
    mean, std = splits.spec.normalize
    share = float((splits.train.storage.pixels[:, 0] == 255).float().mean())
    assert mean == pytest.approx((share, 0.2, 0.0), abs=1e-5)
    assert std[0] == pytest.approx((share * (1 - share)) ** 0.5, abs=1e-5)
    values = torch.cat([images for images, _ in splits.train.batches(7)])
    assert values[:, 0].mean() == pytest.approx(0, abs=1e-3)


def test_large_images_get_torchvisions_test_transform(tmp_path):
    from torchvision.transforms import v2

    for part, count in (("train", 25), ("test", 3)):
        for i in range(count):
            folder = tmp_path / part / "only"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.RandomState(i).randint(0, 256, (130 + 7 * i, 201, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03}.png")
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.2, 0.2]
    splits = load(f"imagefolder:{tmp_path}", (3, 112, 112), 1, calibration=20, normalize=[mean, std], memory_gb=1)
    theirs = v2.Compose(
        [v2.Resize(128), v2.CenterCrop(112), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        + [v2.Normalize(mean, std)]
    )
    images, _ = next(splits.test.batches(3))
    for ours, path in zip(images, splits.test.keys, strict=True):
        torch.testing.assert_close(ours, theirs(Image.open(path)), rtol=1e-4, atol=1e-5)
    raw, _ = next(iter(splits.train.training_loader(4, seed=0)))
    assert raw.shape[2:] == (128, 128)
    assert splits.train.prepare(raw).shape[2:] == (112, 112)
    assert splits.train.prepare(raw, torch.Generator().manual_seed(0)).shape[2:] == (112, 112)


def test_streamed_batches_equal_those_in_memory(make_folder, caplog):
    root = make_folder(train=40, test=20, size=(9, 11))
    with caplog.at_level(logging.INFO, "dynamize"):
        streamed = load(f"imagefolder:{root}", calibration=20, memory_gb=0)
    assert "test: 40 images would take 0.0 GB" in caplog.text
    caplog.clear()
    seen = []
    with caplog.at_level(logging.INFO, "dynamize"):
        kept = load(f"imagefolder:{root}", calibration=20, progress=lambda *p: seen.append(p))
    assert "train: 60 images decoded into 0.0 MB" in caplog.text
    assert seen[-1] == (120, 120)
    assert kept.test.in_memory
    assert not streamed.test.in_memory
    for (a, y), (b, z) in zip(kept.test.batches(16), streamed.test.batches(16), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(y, z)


def test_train_images_stay_in_their_files_where_no_step_learns_from_them(make_folder):
    root = make_folder(train=40, test=20, size=(8, 8))
    for steps, decoded in (
        ([{"pass": "exits", "at": ["layer2"]}], False),
        ([{"pass": "prune", "macs_ratio": 0.8}], False),
        ([{"pass": "prune", "macs_ratio": 0.8, "recovery_epochs": 1}], True),
        ([{"pass": "exits", "at": ["layer2"]}, {"pass": "distill", "epochs": 1}], True),
    ):
        recipe = Recipe.model_validate(
            {
                "version": 1,
                "model": {"source": "dynamize:digits_resnet", "input": [1, 8, 8]},
                "data": {"source": f"imagefolder:{root}", "calibration": 20},
                "steps": steps,
            }
        )
        splits = Named(recipe).images(2, seed=0)
        assert splits.train.in_memory is decoded
        assert splits.calibration.in_memory
        assert splits.test.in_memory
        assert len(next(iter(splits.train.batches(8)))[0]) == 8


def test_arrays_of_another_size_are_resized_and_said_to_differ(caplog):
    splits = load("digits", (1, 16, 16), 10)
    assert next(splits.test.batches(5))[0].shape == (5, 1, 16, 16)
    other = load("digits", (1, 16, 16), 10, image_size=12)
    assert next(other.test.batches(5))[0].shape == (5, 1, 12, 12)
    assert "12 x 12 (data.image_size) and the network's input is 16 x 16" in other.warnings[0]


def test_shapes_that_do_not_fit_the_network():
    with pytest.raises(DynamizeError, match="2 channels"):
        load("digits", (2, 8, 8), 10)
    with pytest.raises(DynamizeError, match="normalize has 3 channels and the network's input 1"):
        load("digits", (1, 8, 8), 10, normalize=[[0.5] * 3, [0.5] * 3])
    with pytest.raises(DynamizeError, match=r"data\.resize 7 is below"):
        load("digits", (1, 8, 8), 10, resize=7)
