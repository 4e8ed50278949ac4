import pytest
import torch
import torch.nn.functional as F

from dynamize.data.augment import Normalize, augment, random_resized_crop


def batch(n: int = 32, size: int = 12, channels: int = 3) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_normalize_is_torchvisions():
    from torchvision.transforms.v2.functional import normalize

    images = batch()
    expected = normalize(images.float() / 255, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    result = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))(images)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert images.dtype == torch.uint8


@pytest.mark.parametrize("kind", ["crop", "crop_flip"])
def test_every_augmented_image_is_a_window_of_its_own_padded_original(kind):
    images, padding = batch(), 2
    padded = F.pad(images, (padding,) * 4)
    flips = 0
    for original, cut in zip(padded, augment(images, seeded(), kind, padding), strict=True):
        windows = [original[:, y : y + 12, x : x + 12] for y in range(5) for x in range(5)]
        plain = any(torch.equal(cut, window) for window in windows)
        flipped = any(torch.equal(cut, window.flip(2)) for window in windows)
        assert plain != flipped
        flips += flipped
    assert flips == 0 if kind == "crop" else 5 < flips < 27


def test_crops_reach_every_offset():
    images = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).expand(600, 1, 5, 5)
    cuts = augment(images, seeded(), "crop", 1)
    assert {int(c) for c in cuts[:, 0, 2, 2]} == {7, 8, 9, 12, 13, 14, 17, 18, 19}


def test_augmentation_follows_its_generator():
    images = batch()
    first = augment(images, seeded(1), "crop_flip", 4)
    assert torch.equal(first, augment(images, seeded(1), "crop_flip", 4))
    assert not torch.equal(first, augment(images, seeded(2), "crop_flip", 4))
    assert augment(images, seeded(), "none", 4) is images


def test_random_resized_crop_keeps_to_the_image():
    ramp = torch.arange(120, dtype=torch.uint8).expand(200, 1, 100, 120)
    cuts = random_resized_crop(ramp, seeded(), (20, 24), flip=False)
    assert cuts.shape == (200, 1, 20, 24)
    assert cuts.dtype == torch.uint8
    steps = cuts.float().diff(dim=3)
    assert (steps >= 0).all(), "columns keep their order when nothing is flipped"
    widths = (cuts[:, 0, 0, -1].float() - cuts[:, 0, 0, 0].float()) / 119
    assert widths.min() < 0.45
    assert widths.max() > 0.9
    flipped = random_resized_crop(ramp, seeded(), (20, 24), flip=True)
    share = (flipped[:, 0, 0, -1] < flipped[:, 0, 0, 0]).float().mean()
    assert 0.35 < share < 0.65


def test_random_resized_crop_of_a_constant_is_that_constant():
    grey = torch.full((8, 3, 30, 30), 77, dtype=torch.uint8)
    assert (random_resized_crop(grey, seeded(), (16, 16), flip=True) == 77).all()
