"""Which backends tests try: those that compute in float32 give the same answers to the last digits but one.

OpenVINO takes seconds to compile, and is tried in the fast set where ``quick_openvino`` says so.
"""

from importlib.util import find_spec

import pytest

from dynamize.runtime.engine import backend_names

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
quick_openvino = pytest.param("openvino", marks=needs_openvino)
FLOAT32 = [
    pytest.param(name, marks=[needs_openvino, pytest.mark.slow] if name.startswith("openvino") else [])
    for name in sorted(backend_names())
    if not name.endswith("bf16")
]
