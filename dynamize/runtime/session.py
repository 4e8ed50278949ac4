"""Options of all ONNX Runtime sessions: they run on one thread pool."""

from functools import cache

import onnxruntime as ort
import torch


def session_options() -> ort.SessionOptions:
    """For a session on the shared pool that says errors only."""
    _share_one_pool()
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    return options


@cache
def _share_one_pool() -> None:
    """Several sessions that each own a spinning pool run two to three times slower than one."""
    ort.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
