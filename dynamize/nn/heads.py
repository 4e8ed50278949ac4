"""Exit heads: small classifiers on an intermediate feature map."""

from torch import Tensor, nn
from torch.nn import functional as F


class ExitHead(nn.Module):
    """An intermediate classifier that may build on the exits before it.

    Args:
        body: feature map (N, C, H, W) -> (N, C', H', W').
        classifier: (N, C', H', W') -> (N, classes).
        fusion: adds what earlier heads saw to the logits, (N, D) -> (N, classes); None where nothing came before.
    """

    def __init__(self, body: nn.Module, classifier: nn.Module, fusion: nn.Linear | None = None) -> None:
        super().__init__()
        self.body = body
        self.classifier = classifier
        self.fusion = fusion

    def forward(self, features_NCHW: Tensor, context_ND: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the logits (N, classes) and the pooled features (N, C') that later exits may build on."""
        features_NCHW = self.body(features_NCHW)
        logits = self.classifier(features_NCHW)
        if self.fusion is not None:
            logits = logits + self.fusion(context_ND)
        return logits, features_NCHW.mean(dim=(2, 3))


def linear_classifier(channels: int, classes: int) -> nn.Sequential:
    """Global average pool and a linear layer: (N, channels, H, W) -> (N, classes)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class LoneNorm(nn.BatchNorm2d):
    """Batch norm that also bears, in training, one image of one pixel: it has no variance, so the running statistics
    stand in, and stay."""

    def forward(self, input: Tensor) -> Tensor:
        lone = self.training and input.numel() == input.shape[1]
        if not lone:
            return super().forward(input)
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def conv_body(channels: int, width: int, size: int, pool: int = 1) -> nn.Sequential:
    """Stride-2 3x3 convolutions to ``width`` channels: MSDNet's classifier (Huang et al. 2018, sec. 4).

    Args:
        channels: of the feature map.
        width: output channels of each convolution.
        size: the shorter side of the feature map; a map of 8 or more gets two convolutions, a smaller one gets one.
        pool: side of the squares that are averaged before.
    """
    layers: list[nn.Module] = [nn.AvgPool2d(pool)] if pool > 1 else []
    for inputs in [channels, width][: 2 if size // pool >= 8 else 1]:
        layers += [nn.Conv2d(inputs, width, 3, stride=2, padding=1, bias=False), LoneNorm(width), nn.ReLU()]
    return nn.Sequential(*layers)


def zero_fusion(inputs: int, classes: int) -> nn.Linear:
    """A linear map that starts at zero, so that adding it changes nothing until it is trained."""
    fusion = nn.Linear(inputs, classes, bias=False)
    nn.init.zeros_(fusion.weight)
    return fusion
