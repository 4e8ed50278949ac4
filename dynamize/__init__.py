"""dynamize: turn a trained CNN into a dynamic network that really skips work, and measure what it saves.

Names are loaded when they are first used (PEP 562), so ``import dynamize`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynamize.artifact import load as load
    from dynamize.artifact import save as save
    from dynamize.calibration.controller import Controller as Controller
    from dynamize.calibration.offsets import calibrate as calibrate
    from dynamize.calibration.predictions import PredictionTable as PredictionTable
    from dynamize.conversion import convert as convert
    from dynamize.data.given import splits as splits
    from dynamize.errors import DynamizeError as DynamizeError
    from dynamize.nn.network import DynamicNetwork as DynamicNetwork
    from dynamize.nn.network import record_routing as record_routing
    from dynamize.runtime.compiled import compile_network as compile_network
    from dynamize.script import run_steps as run_steps
    from dynamize.sources import source as source
    from dynamize.training.objectives import MultiExitLoss as MultiExitLoss
    from dynamize.transform import Context as Context
    from dynamize.transforms import Calibrate as Calibrate
    from dynamize.transforms import Cascade as Cascade
    from dynamize.transforms import ChannelGates as ChannelGates
    from dynamize.transforms import Distill as Distill
    from dynamize.transforms import Exits as Exits
    from dynamize.transforms import ExpandBranches as ExpandBranches
    from dynamize.transforms import Factorize as Factorize
    from dynamize.transforms import FoldBatchnorm as FoldBatchnorm
    from dynamize.transforms import FuseBranches as FuseBranches
    from dynamize.transforms import FuseGates as FuseGates
    from dynamize.transforms import GlanceFocus as GlanceFocus
    from dynamize.transforms import HybridGates as HybridGates
    from dynamize.transforms import Prune as Prune
    from dynamize.transforms import QGates as QGates
    from dynamize.transforms import Quantize as Quantize
    from dynamize.transforms import Recalibrate as Recalibrate
    from dynamize.transforms import SkipGates as SkipGates
    from dynamize.transforms import SpatialSampling as SpatialSampling

_HOMES = {
    "Calibrate": "transforms",
    "Cascade": "transforms",
    "ChannelGates": "transforms",
    "Context": "transform",
    "Controller": "calibration.controller",
    "Distill": "transforms",
    "DynamicNetwork": "nn.network",
    "DynamizeError": "errors",
    "Exits": "transforms",
    "ExpandBranches": "transforms",
    "Factorize": "transforms",
    "FoldBatchnorm": "transforms",
    "FuseBranches": "transforms",
    "FuseGates": "transforms",
    "GlanceFocus": "transforms",
    "HybridGates": "transforms",
    "MultiExitLoss": "training.objectives",
    "PredictionTable": "calibration.predictions",
    "Prune": "transforms",
    "QGates": "transforms",
    "Quantize": "transforms",
    "Recalibrate": "transforms",
    "SkipGates": "transforms",
    "SpatialSampling": "transforms",
    "calibrate": "calibration.offsets",
    "compile_network": "runtime.compiled",
    "convert": "conversion",
    "load": "artifact",
    "record_routing": "nn.network",
    "run_steps": "script",
    "save": "artifact",
    "source": "sources",
    "splits": "data.given",
}

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dynamize' has no attribute '{name}'; public names: {', '.join(__all__)}")
    return getattr(import_module(f"dynamize.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
