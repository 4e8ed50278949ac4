"""Networks whose answers cannot be taken apart are refused when they are read."""

import pytest
import torch
from networks import ThreeLayer, conv_block
from torch import Tensor, nn
from torch.nn import functional as F

from dynamize.errors import DynamizeError
from dynamize.graph.trace import trace


def classifier(*layers: nn.Module, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(conv_block(3, 8), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


class OverBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax()


@torch.fx.wrap
def rounded_as_by_size(x: Tensor) -> Tensor:
    """As kernels do: another batch size, another last digit."""
    return x * (1 + torch.finfo(x.dtype).eps * len(x))


class OnAHair(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(rounded_as_by_size(x) * 1e6)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(8, track_running_stats=False), OverBatch()])
def test_what_mixes_the_images_of_a_batch_is_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(DynamizeError, match=r"`?1`?.*depends on the other images of its batch"):
        trace(classifier(layer), (3, 8, 8))


def test_rounding_that_a_deep_network_multiplies_is_no_mixing() -> None:
    network, images = classifier(OnAHair()).eval(), torch.rand(3, 3, 8, 8)
    assert not torch.allclose(network(images)[:1], network(images[:1]), rtol=1e-2)
    trace(network, (3, 8, 8))


def test_norms_of_each_image_by_itself_are_taken() -> None:
    for layer in (nn.InstanceNorm2d(8), nn.GroupNorm(2, 8), nn.BatchNorm2d(8)):
        traced = trace(classifier(layer), (3, 8, 8))
        assert any(isinstance(module, type(layer)) for module in traced.modules())


@pytest.mark.parametrize(
    ("last", "word"),
    [(nn.Softmax(1), "softmax"), (nn.LogSoftmax(1), "log_softmax"), (nn.Sigmoid(), "sigmoid")],
)
def test_a_last_operator_that_leaves_no_logits_is_refused(last: nn.Module, word: str) -> None:
    with pytest.raises(DynamizeError, match=f"ends in .*{word}.* take logits.*Leave the last operator out"):
        trace(nn.Sequential(*classifier(), last), (3, 8, 8))


def test_one_score_is_refused() -> None:
    with pytest.raises(DynamizeError, match="one score for each image, and one class is no choice"):
        trace(classifier(classes=1), (3, 8, 8))


def test_answers_drawn_at_random_are_refused() -> None:
    class Always(ThreeLayer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5, True))

    with pytest.raises(DynamizeError, match="draws random numbers in evaluation"):
        trace(Always(), ThreeLayer.shape)


def test_weights_that_are_to_come_are_not_judged() -> None:
    network = classifier()
    with torch.no_grad():
        network[-1].weight.fill_(float("nan"))
    with pytest.raises(DynamizeError, match="no finite numbers"):
        trace(network, (3, 8, 8))
    trace(network, (3, 8, 8), check=False)
