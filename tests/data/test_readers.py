"""Every refusal names the file or folder; every accepted layout gives the same pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from dynamize.data import DataSpec, load_data
from dynamize.errors import DynamizeError


def load(source, shape=(3, 8, 8), classes=2, **options):
    return load_data(DataSpec(source=source, **options), shape, classes)


def test_missing_folder_says_the_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DynamizeError, match=f"{tmp_path}/nowhere does not exist"):
        load("imagefolder:nowhere")
    with pytest.raises(DynamizeError, match=f"{tmp_path}/nowhere.npz does not exist"):
        load("npz:nowhere.npz")


def test_empty_class_folder(make_folder):
    root = make_folder(train=30, test=30)
    for image in (root / "test" / "dog").iterdir():
        image.unlink()
    (root / "test" / "dog" / "notes.txt").write_text("not an image")
    splits = load(f"imagefolder:{root}")
    assert splits.test.labels.tolist() == [0] * 30
    assert any(f"the test images in {root}/test have none of dog" in warning for warning in splits.warnings)
    (root / "test" / "dog" / "notes.txt").unlink()
    (root / "test" / "dog").rmdir()
    assert load(f"imagefolder:{root}").test.labels.tolist() == [0] * 30
    for image in (root / "test" / "cat").iterdir():
        image.unlink()
    with pytest.raises(DynamizeError, match=f"the class folders in {root}/test hold no image"):
        load(f"imagefolder:{root}")


def test_differing_class_folders(make_folder):
    root = make_folder(train=30, test=30)
    (root / "test" / "dog").rename(root / "test" / "wolf")
    with pytest.raises(DynamizeError, match=f"{root}/test has the class folders wolf .* and lacks dog"):
        load(f"imagefolder:{root}")


def test_train_without_test(make_folder):
    root = make_folder(train=30)
    with pytest.raises(DynamizeError, match="no test/ or val/"):
        load(f"imagefolder:{root}")


def test_parts_without_class_folders(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    with pytest.raises(DynamizeError, match="holds no class folders"):
        load(f"imagefolder:{tmp_path}")


@pytest.mark.parametrize("memory_gb", [4, 0])
def test_truncated_image_in_memory_and_streamed(make_folder, memory_gb):
    root = make_folder(train=40, test=40, size=(32, 32))
    broken = root / "test" / "cat" / "0007.png"
    broken.write_bytes(broken.read_bytes()[:400])

    def read_all():
        return list(load(f"imagefolder:{root}", memory_gb=memory_gb, calibration=20).test.batches(16))

    with pytest.raises(DynamizeError) as caught:
        read_all()
    message = str(caught.value)
    assert str(broken) in message
    assert "\n" not in message
    assert "Traceback" not in message


def test_a_text_file_called_png(make_folder):
    root = make_folder(train=40, test=40)
    (root / "train" / "cat" / "0003.png").write_text("hello")
    with pytest.raises(DynamizeError, match=r"0003\.png: not an image, or cut short; replace or delete"):
        load(f"imagefolder:{root}", calibration=20)


def test_class_count_differs_from_the_networks(make_folder):
    root = make_folder(train=30, test=30)
    with pytest.raises(DynamizeError, match=rf"{root}/train has 2 classes \(cat, dog\) and the network answers 10"):
        load(f"imagefolder:{root}", classes=10)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_colour_modes_reach_the_channels_of_the_network(tmp_path, mode):
    from dynamize.data.storage import FileStorage, Geometry

    path = str(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"))
    Image.new("RGB", (8, 8), (200, 200, 200)).convert(mode, palette=Image.Palette.ADAPTIVE).save(path)
    for channels in (1, 3):
        pixels = FileStorage([path]).read([0], Geometry(channels, (8, 8)))
        assert pixels.shape == (1, channels, 8, 8)
        assert (pixels.int() - 200).abs().max() <= 6


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    from dynamize.data.storage import FileStorage, Geometry

    Image.fromarray(np.full((8, 8), 100 * 257, dtype=np.uint16)).save(tmp_path / "x.png")
    pixels = FileStorage([str(tmp_path / "x.png")]).read([0], Geometry(1, (8, 8)))
    assert (pixels == 100).all()


def test_grey_from_arrays_is_grey_from_files(make_folder, make_npz):
    root = make_folder(train=30, test=30)
    files = sorted((root / "test" / "cat").iterdir())
    x = np.stack([np.asarray(Image.open(f)) for f in files])
    grey = torch.from_numpy(np.stack([np.asarray(Image.open(f).convert("L")) for f in files]))
    source = make_npz(x_train=x, y_train=np.arange(30) % 2, x_test=x, y_test=np.arange(30) % 2)
    splits = load(f"npz:{source}", shape=(1, 8, 8), calibration=20, calibration_from="train")
    assert torch.equal(splits.test.storage.pixels[:, 0], grey)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "float", "int64"])
def test_npz_layouts_hold_the_same_pixels(make_npz, layout):
    plain = np.random.RandomState(0).randint(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    x = {
        "NHWC": plain,
        "NCHW": plain.transpose(0, 3, 1, 2),
        "float": plain.astype(np.float32) / 255,
        "int64": plain.astype(np.int64),
    }[layout]
    y = np.arange(60) % 2
    splits = load(f"npz:{make_npz(x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])}", calibration=20)
    assert torch.equal(splits.test.storage.pixels, torch.from_numpy(plain[:20]).permute(0, 3, 1, 2))
    assert splits.test.labels.tolist() == y[:20].tolist()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"y_train": np.arange(60) % 3}, "labels 0 to 2, out of range for 2 classes"),
        ({"y_test": np.arange(60) % 2 - 1}, "labels -1 to 0, out of range"),
        ({"y_test": np.zeros(60)}, "one whole number per image"),
        ({"y_test": np.zeros(59, dtype=int)}, "one whole number per image"),
        ({"x_test": np.zeros((60, 8, 8, 4), dtype=np.uint8)}, "1 or 3 channels"),
        ({"x_test": np.random.RandomState(0).randn(60, 8, 8, 3)}, "not plain pixels"),
        ({"x_test": np.array([None])}, "cannot read .*data.npz"),
    ],
)
def test_npz_refusals_name_the_arrays(make_npz, change, said):
    x, y = np.zeros((60, 8, 8, 3), dtype=np.uint8), np.arange(60) % 2
    path = make_npz(**({"x_train": x, "y_train": y, "x_test": x, "y_test": y} | change))
    with pytest.raises(DynamizeError, match=said) as caught:
        load(f"npz:{path}")
    assert str(path) in str(caught.value)


def test_npz_lacking_arrays_and_no_npz(make_npz, tmp_path):
    with pytest.raises(DynamizeError, match="lacks y_train, x_test, y_test .it holds x_train"):
        load(f"npz:{make_npz(x_train=np.zeros((2, 8, 8)))}")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DynamizeError, match=r"cannot read .*text\.npz"):
        load(f"npz:{tmp_path / 'text.npz'}")


def test_torchvision_names_and_missing_roots(tmp_path):
    with pytest.raises(DynamizeError, match="did you mean torchvision:CIFAR10@"):
        load(f"torchvision:Cifar10@{tmp_path}")
    with pytest.raises(DynamizeError, match=f"{tmp_path}/none.*data.download: true"):
        load(f"torchvision:CIFAR10@{tmp_path}/none")
    with pytest.raises(DynamizeError, match="no train and test part"):
        load(f"torchvision:FakeData@{tmp_path}")
    assert not (tmp_path / "none").exists()


def test_torchvision_arrays(tmp_path):
    """MNIST as it lies on disk: IDX files of 28 x 28 grey images."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 200), ("t10k", 50)):
        pixels = np.random.RandomState(count).randint(0, 256, (count, 28, 28), dtype=np.uint8)
        header = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = b"".join(n.to_bytes(4, "big") for n in (0x801, count))
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    splits = load(f"torchvision:MNIST@{tmp_path}", shape=(1, 28, 28), classes=10, calibration=50)
    assert (len(splits.train), len(splits.calibration), len(splits.test)) == (150, 50, 50)
    expected = np.random.RandomState(50).randint(0, 256, (50, 28, 28), dtype=np.uint8)
    assert torch.equal(splits.test.storage.pixels[:, 0], torch.from_numpy(expected))
