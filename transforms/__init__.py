"""The transforms, one a file; importing this package registers them."""

from dynamize.transforms.calibrate import Calibrate
from dynamize.transforms.channel_gates import ChannelGates
from dynamize.transforms.distill import Distill
from dynamize.transforms.exits import Exits
from dynamize.transforms.hybrid_gates import HybridGates
from dynamize.transforms.q_gates import QGates
from dynamize.transforms.skip_gates import SkipGates

__all__ = ["Calibrate", "ChannelGates", "Distill", "Exits", "HybridGates", "QGates", "SkipGates"]
