"""Checkpoints: everything that users bring, as real files; and a saver that never leaves half a file."""

import argparse
import collections
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import shared_data
from torch import Tensor, nn

from dynamize.checkpoints import load_into, read_state_dict, save_state_dict
from dynamize.errors import DynamizeError
from dynamize.models import create


class Net(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)


def _state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return Net().state_dict()


def _same(read: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(read) == list(expected) and all(torch.equal(read[k], expected[k]) for k in expected)


WRAPPINGS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
    "model": lambda s: {"model": s, "args": {"lr": 0.1}},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "ema": lambda s: {"ema": s, "epoch": 1},
    "state_dict_ema": lambda s: {"state_dict_ema": s},
    "net": lambda s: {"net": s, "acc": 93.1},
    "nested": lambda s: {"model": {"state_dict": s}},
    "config under a usual name": lambda s: {"model": {"depth": 20}, "net": s},
    "unusual name": lambda s: {
        "my_weights": s,
        "epoch": 1,
        "optimizer": {"state": {0: {"m": torch.ones(2)}}},
    },
    "module prefix": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled prefix": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "stacked prefixes": lambda s: {f"module._orig_mod.model.{k}": v for k, v in s.items()},
    "compiled inside": lambda s: {k.replace("conv.", "conv._orig_mod."): v for k, v in s.items()},
    "averaged model": lambda s: {"n_averaged": torch.tensor(9), **{f"module.{k}": v for k, v in s.items()}},
    "numpy number beside": lambda s: {"state_dict": s, "best": np.float64(0.9), "n": np.int64(3)},
    "arguments beside": lambda s: {"state_dict": s, "args": argparse.Namespace(model="resnet18", lr=0.1)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_finds_the_weights(tmp_path: Path, wrapping: str, zipped: bool) -> None:
    file = tmp_path / "net.pth"
    torch.save(WRAPPINGS[wrapping](_state()), file, _use_new_zipfile_serialization=zipped)
    assert _same(read_state_dict(file), _state())


def test_safetensors_is_recognised_by_content(tmp_path: Path) -> None:
    save_file({f"module.{k}": v for k, v in _state().items()}, tmp_path / "net.pt")
    read = read_state_dict(tmp_path / "net.pt")
    assert read.keys() == _state().keys()
    assert torch.equal(read["conv.weight"], _state()["conv.weight"])
    torch.save(_state(), tmp_path / "net.safetensors")
    assert _same(read_state_dict(tmp_path / "net.safetensors"), _state())


def test_prefix_stays_unless_every_name_has_it(tmp_path: Path) -> None:
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(state, tmp_path / "net.pt")
    assert _same(read_state_dict(tmp_path / "net.pt"), state)


def test_plain_weights_win_over_averaged_ones_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, averaged = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    torch.save({"state_dict_ema": averaged, "state_dict": plain}, tmp_path / "net.pt")
    assert _same(read_state_dict(tmp_path / "net.pt"), plain)
    assert "state_dict_ema" in caplog.text


@pytest.mark.parametrize("name", ["resnet56-4bfd9763.th", "resnet56-cifar10-jpeg.pt"])
def test_reads_real_checkpoints(name: str) -> None:
    model = create("cifar_resnet56").eval()
    state = read_state_dict(shared_data() / name)
    load_into(model, state, "cifar_resnet56")
    assert torch.equal(model.get_parameter("layer3.8.conv2.weight"), state["layer3.8.conv2.weight"])


def _misfit(model: nn.Module, state: dict[str, Tensor]) -> str:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DynamizeError) as caught:
        load_into(model, state, "mynet", "mine.pt")
    assert _same(dict(model.state_dict()), before)
    assert "mine.pt does not fit mynet" in str(caught.value)
    return str(caught.value)


def test_loads_exactly() -> None:
    model = Net()
    load_into(model, _state(), "mynet")
    assert _same(dict(model.state_dict()), _state())


def test_lists_missing_unexpected_and_wrong_shapes() -> None:
    state = _state()
    state["extra.weight"] = state.pop("bn.weight")
    state["conv.weight"] = torch.zeros(8, 1, 3, 3)
    message = _misfit(Net(), state)
    assert "missing in the checkpoint (1):\n    bn.weight" in message
    assert "unexpected in the checkpoint (1):\n    extra.weight" in message
    assert "conv.weight: float32[8, 1, 3, 3] in the checkpoint, float32[8, 3, 3, 3] here" in message


def test_long_lists_are_cut() -> None:
    message = _misfit(create("cifar_resnet56"), create("cifar_resnet20").state_dict())
    assert "missing in the checkpoint (180)" in message
    assert "and 172 more" in message
    assert message.count("\n") < 15


def test_another_architecture_is_called_that() -> None:
    assert "another architecture" in _misfit(Net(), {"w": torch.ones(1)})


def test_class_count_says_what_to_type() -> None:
    message = _misfit(Net(classes=4), Net(classes=7).state_dict())
    assert "7 classes, the network has 4: pass num_classes=7" in message
    assert "head.weight, head.bias" in message
    assert "\n" not in message


def test_class_count_is_said_beside_other_misfits() -> None:
    message = _misfit(Net(classes=4), {**Net(classes=7).state_dict(), "extra": torch.ones(1)})
    assert "pass num_classes=7" in message
    assert "extra" in message


def test_other_width_is_not_mistaken_for_a_class_count() -> None:
    narrow = Net()
    narrow.head = nn.Linear(6, 4)
    assert "num_classes" not in _misfit(Net(), narrow.state_dict())
    state = _state()
    state["bn.weight"] = state["bn.bias"] = torch.ones(6)
    assert "num_classes" not in _misfit(Net(), state)


def test_integer_weights_are_refused() -> None:
    state = _state()
    state["conv.weight"] = torch.zeros(8, 3, 3, 3, dtype=torch.int8)
    assert "conv.weight: int8[8, 3, 3, 3] in the checkpoint, float32" in _misfit(Net(), state)


def test_half_precision_is_widened() -> None:
    model = Net()
    halves = {k: v.half() if v.is_floating_point() else v for k, v in _state().items()}
    load_into(model, halves, "mynet")
    assert model.conv.weight.dtype == torch.float32
    assert torch.equal(model.conv.weight, _state()["conv.weight"].half().float())


def test_batch_norm_counters_may_lack() -> None:
    model = Net()
    load_into(model, {k: v for k, v in _state().items() if "num_batches" not in k}, "mynet")
    assert torch.equal(model.head.weight, _state()["head.weight"])


def test_profiler_leftovers_are_dropped() -> None:
    model = Net()
    load_into(model, {**_state(), "conv.total_ops": torch.ones(1), "total_params": torch.ones(1)}, "mynet")
    assert torch.equal(model.head.weight, _state()["head.weight"])


def test_wrapped_network_takes_plain_weights_and_the_reverse() -> None:
    wrapped = nn.Sequential(collections.OrderedDict(module=Net()))
    load_into(wrapped, _state(), "mynet")
    assert torch.equal(wrapped.get_parameter("module.conv.weight"), _state()["conv.weight"])
    plain = Net()
    load_into(plain, wrapped.state_dict(), "mynet")
    assert _same(dict(plain.state_dict()), _state())


def test_old_densenet_names_fit() -> None:
    from torchvision.models import DenseNet

    torch.manual_seed(0)
    source, model = (DenseNet(8, (1, 1), 8, num_classes=3) for _ in range(2))
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v for k, v in source.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    load_into(model, old, "densenet")
    assert _same(dict(model.state_dict()), dict(source.state_dict()))


def test_module_versions_survive_prefixes_and_safetensors(tmp_path: Path) -> None:
    from torchvision.models import mnasnet0_5

    torch.manual_seed(0)
    source = mnasnet0_5(num_classes=3)
    torch.save({"state_dict": nn.DataParallel(source).state_dict()}, tmp_path / "net.pt")
    save_state_dict(source.state_dict(), tmp_path / "net.safetensors")
    for name in ("net.pt", "net.safetensors"):
        model = mnasnet0_5(num_classes=3)
        load_into(model, read_state_dict(tmp_path / name), "mnasnet")
        assert _same(dict(model.state_dict()), dict(source.state_dict()))


def test_saves_shared_strided_and_empty_tensors(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    flat = torch.arange(6.0)
    state = {
        "a": weight,
        "tied": weight,
        "part": flat[2:4],
        "all": flat,
        "t": flat.view(2, 3).t(),
        "none": torch.ones(0),
    }
    save_state_dict(state, tmp_path / "w.safetensors")
    read = load_file(tmp_path / "w.safetensors")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_full_disk_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_state_dict({"w": torch.ones(4)}, file)
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DynamizeError, match="nothing was changed there. Free some space"):
            save_state_dict({"w": torch.ones(100_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_interruption_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "w.safetensors"
    save_state_dict({"w": torch.ones(4)}, file)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_state_dict({"w": torch.zeros(4)}, file)
    assert load_file(file)["w"].sum() == 4
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_folder_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "no").write_text("")
    with pytest.raises(DynamizeError, match="Cannot write .*no/w.safetensors"):
        save_state_dict({"w": torch.ones(1)}, tmp_path / "no" / "w.safetensors")


def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DynamizeError, match="dense tensors only"):
        save_state_dict({"w": torch.ones(2, 2).to_sparse()}, tmp_path / "w.safetensors")
    assert os.listdir(tmp_path) == []


class Renamed(nn.Module):
    """Reads what an earlier version of it saved."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self._register_load_state_dict_pre_hook(self._old)

    def _old(self, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}old.")]:
            state[key.replace("old.", "net.", 1)] = state.pop(key)


class Overriding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}old.")]:
            state[key.replace("old.", "net.", 1)] = state.pop(key)
        super()._load_from_state_dict(state, prefix, *rest)


@pytest.mark.parametrize("kind", [Renamed, Overriding])
def test_hooks_of_the_network_are_run(kind: type[nn.Module]) -> None:
    old = {f"old.{key}": value for key, value in _state().items()}
    model = kind()
    load_into(model, old, "mynet")
    assert torch.equal(model.get_parameter("net.conv.weight"), _state()["conv.weight"])
    del old["old.conv.weight"]
    message = _misfit(kind(), old)
    assert "missing in the checkpoint (1):\n    net.conv.weight" in message
    assert "unexpected" not in message


def test_weight_norm_of_the_old_kind_fits_the_new() -> None:
    old, new = nn.utils.weight_norm(Net().head), nn.utils.parametrizations.weight_norm(Net().head)
    load_into(new, old.state_dict(), "mynet")
    assert torch.equal(new.weight, old.weight)


def test_tied_weights_may_be_stored_once() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.twin = self.head

    model = Tied()
    load_into(model, _state(), "mynet")
    assert torch.equal(model.twin.weight, _state()["head.weight"])
    assert "missing in the checkpoint (1):\n    conv.bias" in _misfit(
        Tied(), {k: v for k, v in _state().items() if k != "conv.bias"}
    )


def test_averages_of_counters_are_whole_numbers_and_of_indices_too() -> None:
    model = Net()
    load_into(model, {key: value.float() for key, value in _state().items()}, "mynet")
    assert model.bn.num_batches_tracked.dtype == torch.int64
    assert "num_batches_tracked: float32" in _misfit(Net(), {**_state(), "bn.num_batches_tracked": torch.tensor(0.5)})


@pytest.mark.parametrize(
    ("prefixes", "used"),
    [(["model."], "model."), (["model.", "ema_model."], "model."), (["student.net."], "student.net.")],
)
def test_the_network_inside_a_training_module_is_found(
    prefixes: list[str], used: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"criterion.weight": torch.ones(4), "step": torch.tensor(3)}
    for prefix in prefixes:
        state |= {prefix + key: value if prefix == used else value + 1 for key, value in _state().items()}
    model = Net()
    load_into(model, state, "mynet", "mine.pt")
    assert torch.equal(model.conv.weight, _state()["conv.weight"])
    assert "leaving out criterion" in caplog.text


def test_two_networks_of_no_usual_name_are_refused() -> None:
    both = {f"{who}.{key}": value for key, value in _state().items() for who in ("student", "teacher")}
    assert "missing in the checkpoint" in _misfit(Net(), both)


def test_a_loss_with_weights_and_an_epoch_beside_are_left_out(tmp_path: Path) -> None:
    torch.save({**_state(), "criterion.weight": torch.ones(4), "epoch": 3, "name": "a"}, tmp_path / "net.pt")
    model = Net()
    load_into(model, read_state_dict(tmp_path / "net.pt"), "mynet")
    assert torch.equal(model.conv.weight, _state()["conv.weight"])


def test_averaged_weights_are_named_and_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ones, twos, threes = ({"w": torch.full((2,), float(k)), "b": torch.ones(1)} for k in (1, 2, 3))
    file = tmp_path / "net.pt"
    swa = {"n_averaged": torch.tensor(4), **{f"module.{key}": value for key, value in threes.items()}}
    torch.save({"model": ones, "model_ema": {"shadow": twos}, "swa": swa, "optimizer": {"state": {}}}, file)
    assert _same(read_state_dict(file), ones)
    assert "it also holds model_ema.shadow, swa" in caplog.text
    assert "weights: model_ema.shadow}" in caplog.text
    for name in ("model_ema", "model_ema.shadow", "shadow"):
        assert _same(read_state_dict(file, name), twos)
    assert _same(read_state_dict(file, "swa"), threes)
    with pytest.raises(DynamizeError, match=r"holds no weights 'modle_ema'\. Did you mean model_ema"):
        read_state_dict(file, "modle_ema")


def test_weights_are_chosen_by_what_their_names_begin_with(tmp_path: Path) -> None:
    state = {f"{who}.{key}": torch.full((1,), value) for who, value in (("a", 1.0), ("b", 0.0)) for key in "vw"}
    torch.save(state, tmp_path / "net.pt")
    save_file(state, tmp_path / "net.safetensors")
    for name in ("net.pt", "net.safetensors"):
        assert _same(read_state_dict(tmp_path / name, "b"), {"v": torch.zeros(1), "w": torch.zeros(1)})
