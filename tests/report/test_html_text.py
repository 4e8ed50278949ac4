"""The HTML page: what is in it as text."""

import re

import pytest
from pydantic import ValidationError

from dynamize.errors import DynamizeError
from dynamize.report import Classes, GalleryImage, Ledger, ReportData, html


def test_of_many_classes_those_that_change_most_are_told(report: ReportData) -> None:
    confused = [(3, 4, 9)]
    static = Classes(count=[10] * 40, right=[9] * 40, confused=confused)  # the others are not listed
    dynamic = Classes(count=[10] * 40, right=[9] * 30 + [5] + [9] * 9, confused=[(30, 1, 5), *confused])
    many = {"classes": static, "class_names": [f"class {k}" for k in range(40)]}
    stands = [one.model_copy(update={"classes": dynamic}) for one in report.standings]
    page = html.render(report.model_copy(update=many | {"standings": stands}))
    assert 'class="confusion"' not in page
    assert "changed most" in page
    assert page.index('class="left">class 30<') < page.index('class="left">class 0<')
    assert re.search(r'class="left">class 3</th><td class="left">class 4</td><td>9</td><td>9</td>', page)
    assert re.search(r'class="left">class 30</th><td class="left">class 1</td><td>≤ 9</td><td>5</td>', page)


def test_page_names_no_address(report: ReportData) -> None:
    page = html.render(report)
    addresses = set(re.findall(r"https?://[^\"'\s<]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(?:src|href)=\"(?!data:)", page)


def test_exits_are_called_by_their_decisions(report: ReportData) -> None:
    names = {"exit.1": "member.small", "exit.2": "focus.2"}
    last = report.ledger.rows[-1]
    decisions = {names[name]: last.decisions[name] for name in names}
    row = last.model_copy(update={"decisions": decisions, "leaving": [*decisions]})
    found = ReportData(ledger=Ledger(rows=[report.ledger.rows[0], row]))
    assert found.exit_names() == ["member small", "focus 2", "last exit"]
    assert "<b>focus 2</b>" in html.render(found)


def test_nothing_endless_is_said(report: ReportData) -> None:
    page = html.render(report.model_copy(update={"pictures": ["iVBO"] * len(report.pictures)}))
    for text in ("Infinity", "NaN", "e+308", "surer"):
        assert text not in page


def test_dearer_options_are_darker(report: ReportData) -> None:
    page = html.render(report.model_copy(update={"standings": report.standings[6:7]}))
    legend = re.findall(r'<li><i class="([a-z ]+)"(?: style="background: hsl\(225 \d+% (\d+)%\)")?></i>', page)
    legend = [one for one in legend if one[0] in ("path", "gone")]
    assert legend[0] == ("path", "")  # what is skipped has no blue
    lightness = [int(light) for look, light in legend[1:5]]
    assert lightness == sorted(lightness, reverse=True)
    assert lightness[-1] == 48
    assert legend[5:] == [("gone", "")]
    pieces = re.findall(r'<div class="(path|path pale|gone pale)" title="([a-z0-9% ]+): [0-9.]+ %"', page)
    assert {title for look, title in pieces if look == "path"} == {"whole"}
    assert {title for look, title in pieces if look == "gone pale"} == {"left before"}


def test_picture_must_be_base64_and_there(report: ReportData) -> None:
    with pytest.raises(ValidationError, match="pictures"):
        ReportData(ledger=report.ledger, pictures=['x" onerror="alert(1)'])
    with pytest.raises(ValidationError, match="a picture that is not there"):
        ReportData(ledger=report.ledger, standings=report.standings, sections=report.sections)
    image = GalleryImage(picture=0, label=0, answer=0, confidence=1.0)
    assert image.macs is None


def test_empty_ledger_is_refused() -> None:
    with pytest.raises(DynamizeError, match="no rows"):
        html.render(ReportData(ledger=Ledger()))
