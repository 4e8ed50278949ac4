"""Steps that continue a network converted earlier are checked against what it has behind it."""

import pytest

import dynamize as dz
from dynamize.transform import check_order


def test_calibrate_may_follow_exits_of_an_earlier_conversion() -> None:
    check_order([dz.Calibrate()], done=["exits", "distill"])
    with pytest.raises(dz.DynamizeError, match="needs `exits` or `skip_gates` or `channel_gates` before it"):
        check_order([dz.Calibrate()])
