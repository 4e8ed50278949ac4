"""The transforms, one a file; importing this package registers them."""

from dynamize.transforms.calibrate import Calibrate
from dynamize.transforms.cascade import Cascade
from dynamize.transforms.channel_gates import ChannelGates
from dynamize.transforms.distill import Distill
from dynamize.transforms.exits import Exits
from dynamize.transforms.expand_branches import ExpandBranches
from dynamize.transforms.factorize import Factorize
from dynamize.transforms.fold_batchnorm import FoldBatchnorm
from dynamize.transforms.fuse_branches import FuseBranches
from dynamize.transforms.fuse_gates import FuseGates
from dynamize.transforms.glance_focus import GlanceFocus
from dynamize.transforms.hybrid_gates import HybridGates
from dynamize.transforms.prune import Prune
from dynamize.transforms.q_gates import QGates
from dynamize.transforms.quantize import Quantize
from dynamize.transforms.recalibrate import Recalibrate
from dynamize.transforms.skip_gates import SkipGates
from dynamize.transforms.spatial_sampling import SpatialSampling

__all__ = [
    "Calibrate",
    "Cascade",
    "ChannelGates",
    "Distill",
    "Exits",
    "ExpandBranches",
    "Factorize",
    "FoldBatchnorm",
    "FuseBranches",
    "FuseGates",
    "GlanceFocus",
    "HybridGates",
    "Prune",
    "QGates",
    "Quantize",
    "Recalibrate",
    "SkipGates",
    "SpatialSampling",
]
