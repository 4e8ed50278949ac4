"""Networks that see how a tensor lies in memory: fine in the contiguous memory of plain PyTorch."""

import torch
from networks import conv_block
from torch import Tensor, nn

SHAPE = (1, 8, 8)


@torch.fx.wrap
def flattened(x: Tensor, start: int) -> Tensor:
    """Stays whole when it is traced."""
    return x.view(*x.shape[:start], -1)


class Flattening(nn.Module):
    """Three blocks and a linear layer on the flattened map: subclasses say how."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_block(1, 8), conv_block(8, 12, 2), conv_block(12, 16))
        self.linear = nn.Linear(256, 10)

    def flat(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.flat(self.body(x)))


class BySizeKeyword(Flattening):
    def flat(self, x: Tensor) -> Tensor:
        return x.view(size=(x.shape[0], 256))


class ByExample(Flattening):
    def flat(self, x: Tensor) -> Tensor:
        return x.view_as(torch.zeros_like(x).flatten(1))


class ByWrapped(Flattening):
    def flat(self, x: Tensor) -> Tensor:
        return flattened(x, 1)


class ByStride(Flattening):
    def flat(self, x: Tensor) -> Tensor:
        return x.as_strided((x.shape[0], 256), (x.stride(0), 1))


class ByBytes(Flattening):
    """The bytes of a float and back: of another type the last dimension is longer, and must be the innermost."""

    def flat(self, x: Tensor) -> Tensor:
        return x.view(torch.int16).view(x.dtype).flatten(1)


class ComplexMap(Flattening):
    def flat(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(x.unflatten(3, (2, 2))).abs().repeat(1, 1, 1, 2).flatten(1)


class Fourier(Flattening):
    """A filter in the frequency domain (Rao et al. 2021, GFNet): a parameter of four dimensions that is no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(16, 4, 3, 2))

    def flat(self, x: Tensor) -> Tensor:
        filtered = torch.fft.rfft2(x) * torch.view_as_complex(self.filter)
        return torch.fft.irfft2(filtered, s=(4, 4)).flatten(1)


class Standardised(nn.Conv2d):
    """Weight standardisation as it is commonly written."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.view(self.weight.size(0), -1)
        spread = flat.std(1).view(-1, 1, 1, 1) + 1e-5
        return self._conv_forward(x, self.weight / spread, self.bias)


class Standard(Flattening):
    def __init__(self) -> None:
        super().__init__()
        self.body[1] = nn.Sequential(Standardised(8, 12, 3, 2, 1), nn.ReLU())


NETWORKS = [Flattening, BySizeKeyword, ByExample, ByWrapped, ByStride, ByBytes, ComplexMap, Fourier,
            Standard]  # fmt: skip


def build(kind: type[Flattening]) -> Flattening:
    torch.manual_seed(0)
    return kind().eval()
