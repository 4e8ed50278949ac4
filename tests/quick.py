"""Which parameters of a test are tried in the fast set; the others take as long for little more.

``only`` says it of values that several tests try, ``@pytest.mark.fast("id", "other id")`` of one test.
"""

from collections import defaultdict
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


def slow_besides(items: Iterable[pytest.Item], whole: bool) -> None:
    """Mark those slow whose parameters their tests do not call fast.

    Args:
        whole: these are all parameters of their tests.

    Raises:
        pytest.UsageError: there are no such parameters.
    """
    tests = defaultdict(dict[str, pytest.Item])
    for item in items:
        test, _, parameters = item.nodeid.removesuffix("]").partition("[")
        tests[test][parameters] = item
    for test, tried in tests.items():
        fast = {one for mark in next(iter(tried.values())).iter_markers("fast") for one in mark.args}
        if whole and (unknown := fast - tried.keys()):
            raise pytest.UsageError(f"{test} is not tried with {', '.join(sorted(unknown))}")
        for item in [tried[parameters] for parameters in tried.keys() - fast] if fast else []:
            item.add_marker(pytest.mark.slow)
