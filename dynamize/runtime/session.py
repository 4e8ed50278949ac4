"""Options of all ONNX Runtime sessions: they share threads and memory."""

from functools import cache

import numpy as np
import onnxruntime as ort
import torch


def session_options() -> ort.SessionOptions:
    """For a session on the shared pool that says errors only."""
    _share()
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = 3
    return options


@cache
def _share() -> None:
    """One pool: several sessions that each own a spinning one run two to three times slower. One arena: what a session
    writes in between lies where the one before it wrote, in the cache (5 % of a ResNet-50 with skip gates)."""
    ort.set_global_thread_pool_sizes(torch.get_num_threads(), 1)
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, -1, -1, -1))
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let the C library keep freed memory instead of returning it at once, only to be given it again page by page:
    glibc learns from the first large block that is freed, up to 32 MB (mallopt(3), M_MMAP_THRESHOLD). Feature maps that
    sessions hand on are such blocks (6 % of a batch of a ResNet-50 with skip gates)."""
    block = np.ones(2**25 - 2**16, np.uint8)
    del block
