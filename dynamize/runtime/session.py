"""Options of all ONNX Runtime sessions: whose threads they run on, and the memory that they share."""

from functools import cache

import numpy as np
import onnxruntime as ort

from dynamize.runtime.engine import torch_threads
from dynamize.runtime.threads import Threads, note_pool


def session_options(threads: Threads) -> ort.SessionOptions:
    """For a session that says nothing: what goes wrong is raised."""
    _share_memory()
    options = ort.SessionOptions()
    if threads == "shared":
        _share_threads()
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = torch_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # else they spin against the next session
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = 4
    return options


def _share_threads() -> None:
    """One pool: several sessions that each own a spinning one run two to three times slower."""
    if note_pool():
        ort.set_global_thread_pool_sizes(torch_threads(), 1)


@cache
def _share_memory() -> None:
    """One arena: what a session writes in between lies where the one before it wrote, in the cache (5 % of a ResNet-50
    with skip gates). Only sessions that ask for it use it."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, -1, -1, -1))
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let the C library keep freed memory instead of returning it at once, only to be given it again page by page:
    glibc learns from the first large block that is freed, up to 32 MB (mallopt(3), M_MMAP_THRESHOLD). Feature maps that
    sessions hand on are such blocks (6 % of a batch of a ResNet-50 with skip gates)."""
    block = np.ones(2**25 - 2**16, np.uint8)
    del block
