"""Which network is best at what a run's network costs: that one, or a rival that the recipe names."""

from dynamize.report.ledger import RIVAL, Ledger, Rival, Row

UNNAMED = (
    "No rival was named: `compare:` in the recipe judges and times smaller networks, and a cascade of them, beside "
    "this one."
)
MORE_MACS = 0.01
"""Share of more MACs at which a rival still counts as one of the same cost."""

CLEARLY = {"macs": 0.02, "time": 0.05}
"""Shares below which a cost is not said to differ: timings vary by that much."""


def best(ledger: Ledger) -> str:
    """One sentence on who is best at the chosen cost, which is the last row's MACs and time at the smallest batch.

    A rival is recommended if it costs no more in either way, and is more accurate beyond noise (the 95 % interval of
    the paired difference on the test images) or as accurate and clearly cheaper. Empty if no rival was named.
    """
    if not ledger.rivals:
        return ""
    ours = ledger.rows[-1]
    alike = [one for one in ledger.rivals if one.lead >= 0 and (_no_more_macs(one, ours) or _no_slower(ledger, one))]
    if not alike:
        return "Best at this cost: the network of this run; no rival is as accurate at no more MACs or no more time."
    found = max(alike, key=lambda one: (_recommended(ledger, one), _both(ledger, one), one.lead, -one.macs))
    told = f"{_name(found)} is {_accuracy(found)} at {_costs(ledger, found)}"
    if _recommended(ledger, found):
        return f"Best at this cost: {told}. It is recommended instead of the network of this run."
    if not _both(ledger, found):
        return f"At this cost it depends on what counts: {told}."
    return f"Best at this cost: the network of this run, within noise; {told}."


def _recommended(ledger: Ledger, rival: Rival) -> bool:
    return _both(ledger, rival) and (rival.lead_ci[0] > 0 or _clearly_cheaper(ledger, rival))


def _both(ledger: Ledger, rival: Rival) -> bool:
    return _no_more_macs(rival, ledger.rows[-1]) and _no_slower(ledger, rival)


def _no_more_macs(rival: Row, ours: Row) -> bool:
    return rival.macs <= (1 + MORE_MACS) * ours.macs


def _no_slower(ledger: Ledger, rival: Rival) -> bool:
    """MACs decide alone where no time was measured."""
    gain = _gain(ledger, rival)
    return _no_more_macs(rival, ledger.rows[-1]) if gain is None else gain >= 1 - CLEARLY["time"]


def _clearly_cheaper(ledger: Ledger, rival: Rival) -> bool:
    gain = _gain(ledger, rival)
    fewer = rival.macs <= (1 - CLEARLY["macs"]) * ledger.rows[-1].macs
    return fewer and (gain is None or gain >= 1 + CLEARLY["time"])


def _gain(ledger: Ledger, rival: Rival) -> float | None:
    """How many times faster than the network of the run, on the main backend at the smallest batch."""
    for backend in ledger.backends()[:1]:
        batch = ledger.batches(backend)[0]
        speedup = rival.speedup.get(backend, {}).get(batch)
        return None if speedup is None else speedup / ledger.rows[-1].speedup.get(backend, {}).get(batch, 1.0)
    return None


def _name(rival: Rival) -> str:
    name = rival.transform.removeprefix(RIVAL)
    return f"the {name}" if rival.leaving else name


def _accuracy(rival: Rival) -> str:
    low, high = (100 * end for end in rival.lead_ci)
    if rival.lead == 0:
        return "as accurate"
    noise = "" if rival.lead_ci[0] > 0 else ", a gain within noise"
    return f"more accurate by {100 * rival.lead:.2f} points (95 %: {low:.2f} to {high:.2f}{noise})"


def _costs(ledger: Ledger, rival: Rival) -> str:
    ours, gain = ledger.rows[-1], _gain(ledger, rival)
    macs = f"{rival.macs_ratio:.2f} of the MACs against {ours.macs_ratio:.2f}"
    if gain is None:
        return macs
    batch = ledger.batches(ledger.backends()[0])[0]
    return f"{macs} and {1 / gain:.2f} times its time at batch {batch}"
