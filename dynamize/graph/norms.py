"""Batch norms that another way through the same layers has for itself."""

import copy

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm


def own_statistics(path: fx.GraphModule) -> list[nn.Module]:
    """Give each batch norm that ``path`` calls running statistics of its own, in place; scale and shift stay those of
    the norm that it was (slimmable networks, Yu et al. 2019, sec. 3.3).

    They begin as they were, so answers stay the same. Norms inside other layers are left as they are.

    Returns:
        The new norms, to be registered by whoever holds ``path``.
    """
    targets = dict.fromkeys(str(node.target) for node in path.graph.nodes if node.op == "call_module")
    found: list[nn.Module] = []
    for target in targets:
        norm = path.get_submodule(target)
        if not isinstance(norm, _BatchNorm) or not norm.track_running_stats:
            continue
        own = copy.copy(norm)  # the dictionary of its parameters stays the same one, so who exchanges them reaches both
        own._buffers = {name: None if one is None else one.clone() for name, one in norm._buffers.items()}
        path.set_submodule(target, own)
        found.append(own)
    return found
