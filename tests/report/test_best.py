"""The sentence on who is best at the chosen cost, by hand."""

import pytest

from dynamize.report import Ledger, Rival
from dynamize.report.best import UNNAMED, best
from dynamize.report.cells import row_notes


def against(ledger: Ledger, ratio: float, speed: float, lead: float, noise: float, name: str = "resnet32") -> Ledger:
    """With a rival of this share of the MACs, this speed at batch 1, and this lead in accuracy, plus and minus."""
    last = ledger.rows[-1]
    fields = last.model_dump() | {
        "step": last.step + 1 + len(ledger.rivals),
        "transform": f"rival: {name}",
        "macs": ratio * ledger.rows[0].macs,
        "macs_ratio": ratio,
        "accuracy": last.accuracy + lead,
        "speedup": {"onnxruntime": {"1": speed, "64": 1.0}},
        "decisions": {},
        "leaving": [],
        "notes": [],
        "lead": lead,
        "lead_ci": (lead - noise, lead + noise),
    }
    return ledger.model_copy(update={"rivals": [*ledger.rivals, Rival.model_validate(fields)]})


def test_rival_that_is_better_beyond_noise_is_recommended(ledger: Ledger) -> None:
    assert best(against(ledger, 0.57, 1.50, 0.006, 0.003)) == (
        "Best at this cost: resnet32 is more accurate by 0.60 points (95 %: 0.30 to 0.90) at 0.57 of the MACs against "
        "0.57 and 0.99 times its time at batch 1. It is recommended instead of the network of this run."
    )


def test_gain_within_noise_is_called_that(ledger: Ledger) -> None:
    told = best(against(ledger, 0.57, 1.50, 0.002, 0.003))
    assert told.startswith("Best at this cost: the network of this run, within noise; resnet32 is more accurate")
    assert "a gain within noise" in told
    assert "recommended" not in told


def test_as_accurate_and_clearly_cheaper_is_recommended(ledger: Ledger) -> None:
    told = best(against(ledger, 0.33, 2.5, 0.0, 0.003))
    assert "resnet32 is as accurate at 0.33 of the MACs" in told
    assert "recommended instead" in told


@pytest.mark.parametrize(("ratio", "speed", "lead"), [(0.4, 2.0, -0.01), (0.9, 1.1, 0.01)])
def test_rival_that_is_worse_or_dearer_is_not(ledger: Ledger, ratio: float, speed: float, lead: float) -> None:
    assert best(against(ledger, ratio, speed, lead, 0.003)).startswith("Best at this cost: the network of this run; no")


def test_fewer_macs_but_more_time_is_no_recommendation(ledger: Ledger) -> None:
    told = best(against(ledger, 0.4, 1.0, 0.01, 0.003))
    assert told.startswith("At this cost it depends on what counts: resnet32 is more accurate")
    assert "1.49 times its time at batch 1" in told


def test_recommended_rival_goes_before_one_that_leads_within_noise(ledger: Ledger) -> None:
    both = against(against(ledger, 0.57, 1.5, 0.008, 0.009, "noisy"), 0.5, 1.6, 0.004, 0.001, "sure")
    assert "sure is more accurate" in best(both)


def test_without_rivals_that_is_said_and_with_rivals_the_tables_have_them(ledger: Ledger) -> None:
    assert best(ledger) == ""
    assert row_notes(ledger)[-1] == UNNAMED
    named = against(ledger, 0.4, 1.0, 0.01, 0.003)
    assert UNNAMED not in row_notes(named)
    assert [row.step for row in named.with_rivals().rows] == [0, 1, 2, 3, 4, 5]
    assert Ledger.model_validate(named.model_dump()) == named
