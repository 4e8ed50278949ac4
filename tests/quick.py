"""Which parameters of a test are tried in the fast set; the others take as long for little more."""

from collections.abc import Hashable, Iterable
from typing import Any

import pytest


def only(fast: Iterable[Hashable], values: Iterable[Any]) -> list[Any]:
    """All values, those not in ``fast`` marked slow; of a value of several parts the first one says which it is."""
    known = set(fast)
    found = []
    for value in values:
        parts = value if isinstance(value, tuple) else (value,)
        found.append(pytest.param(*parts, marks=[] if parts[0] in known else pytest.mark.slow))
        known.discard(parts[0])
    assert not known, f"there is no {known}"
    return found
