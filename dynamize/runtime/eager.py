"""The eager backend: PyTorch modules with batch norms folded, in channels-last memory."""

import copy
from typing import cast

import torch
from torch import nn

from dynamize.graph.fold import folded
from dynamize.nn import channels_last
from dynamize.nn.gated import GatedSegment
from dynamize.nn.heads import ExitHead
from dynamize.nn.network import DynamicNetwork, NetworkStage


def eager_stages(network: DynamicNetwork, device: torch.device) -> list[NetworkStage]:
    """Stages of a folded copy of ``network`` on ``device``."""
    fast = copy.deepcopy(network).eval()
    fast.segments = nn.ModuleList([_folded(segment) for segment in fast.segments])
    for head in fast.heads:
        cast(ExitHead, head).body = folded(cast(ExitHead, head).body)
    return channels_last.lay_out(fast.to(device)).stages()


def _folded(segment: nn.Module) -> nn.Module:
    """A static segment folded as a whole, one with gates way by way."""
    return segment.compiled(folded) if isinstance(segment, GatedSegment) else folded(segment)
