"""The last measurement of a run: one source of every number that a report shows of an operating point."""

import json
from pathlib import Path

from dynamize.report.folder import read_report
from dynamize.report.html import render


def test_ledger_points_and_page_have_one_number_for_one_point(finished_run: Path) -> None:
    report = read_report(finished_run)
    last, here = report.ledger.rows[-1], report.stands[report.here]
    assert (
        here.point
        == report.selected
        == json.loads((finished_run / "manifest.json").read_text())["operating_point"]["name"]
    )
    shared = {name: getattr(last, name) for name in type(last).model_fields if name != "notes"}
    assert {name: getattr(here, name) for name in shared} == shared
    assert {one.name for one in report.operating_points} == {one.point for one in report.standings}
    assert all(one.latency.keys() == last.latency.keys() for one in report.stands)
    view = json.loads(render(report).split('id="data">')[1].split("</script>")[0])
    ((_, timings),) = last.latency.items()
    for batch, timing in timings.items():
        assert view["points"][report.here][batch] == timing.median_ms
        assert view["static"][batch] == report.ledger.rows[0].latency[report.ledger.backend][batch].median_ms
