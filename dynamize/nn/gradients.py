"""Gradients that are not those of what was computed."""

from typing import Any

import torch
from torch import Tensor


class Rescale(torch.autograd.Function):
    """Identity whose gradient is multiplied: for gradient equilibrium (Li et al. 2019, IMTA, sec. 3.2), or for what
    learns more slowly than the rest."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
