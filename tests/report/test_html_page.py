"""How the HTML page behaves in headless Chromium."""

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from browser import Opened, cards, marker, middles, requests, shown, told, view_of, widths
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from dynamize.report import Gallery, Ledger, ReportData, Standing, cells

CHARTS = ("chart-macs", "chart-1", "chart-64")


def assert_shows(driver: webdriver.Chrome, point: Standing) -> None:
    assert [one.text for one in shown(driver, ".slide output b")] == [point.point]
    times = point.latency["onnxruntime"]
    assert cards(driver) == {
        "Accuracy": f"{100 * point.accuracy:.2f} %",
        "MACs per image": cells.count(point.macs),
        "One image": cells.milliseconds(times["1"].median_ms) + " ms",
        "64 images together": cells.milliseconds(times["64"].median_ms) + " ms",
    }
    assert widths(driver) == pytest.approx([share for share in point.exits if share], abs=0.01)


def test_slider_moves_everything(opened: Opened, report: ReportData) -> None:
    driver, points = opened(report), report.stands
    slider = driver.find_element(By.ID, "slider")
    assert_shows(driver, points[4])
    before = {chart: marker(driver, chart) for chart in CHARTS}
    slider.send_keys(Keys.ARROW_RIGHT)
    assert_shows(driver, points[5])
    assert slider.get_attribute("aria-valuetext") == f"{points[5].point}: 93.41 %, 79.3M MACs"
    slider.send_keys(Keys.HOME)
    assert_shows(driver, points[0])
    for chart, (x, y) in before.items():
        moved = marker(driver, chart)
        assert moved[0] < x - 5
        assert moved[1] > y + 5
    slider.send_keys(Keys.END)
    assert_shows(driver, points[-1])
    driver.execute_script("arguments[0].value = 6; arguments[0].dispatchEvent(new Event('input'))", slider)
    assert_shows(driver, points[6])


@pytest.mark.parametrize(
    ("what", "selector"),
    [
        ("the drawing", "#point .river text"),
        ("conditions in words", "#point .answering li"),
        ("the commands", "#point .command code"),
        ("gates", "#gates .units b"),
        ("who answers", "#answerers tbody td"),
        ("the gallery", "#gallery .pictures li"),
        ("classes", "#classes tbody td"),
    ],
)
def test_slider_moves(opened: Opened, report: ReportData, what: str, selector: str) -> None:
    driver = opened(report)
    before = told(driver, selector)
    driver.find_element(By.ID, "slider").send_keys(Keys.HOME)
    after = told(driver, selector)
    assert before, what
    assert after, what
    assert before != after, what
    assert driver.get_log("browser") == []


def test_card_curve_and_tables_show_one_number(opened: Opened, report: ReportData) -> None:
    driver, last = opened(report), report.ledger.rows[-1]
    point = view_of(report)["points"][report.here]
    for batch, title in (("1", "One image"), ("64", "64 images together")):
        assert point[batch] == last.latency["onnxruntime"][batch].median_ms
        assert view_of(report)["static"][batch] == report.ledger.rows[0].latency["onnxruntime"][batch].median_ms
        value, gain = cells.latency(last, "onnxruntime", batch), cells.speedup(last, "onnxruntime", batch)
        assert cards(driver)[title] == f"{value} ms"
        (notes,) = (card.text for card in shown(driver, ".cards > div") if card.text.startswith(title))
        assert f"{gain}x the speed" in notes
        for table in ("ledger", "every"):
            assert [value, gain] == neighbours(driver, table, f"ms b{batch}")
    assert (point["accuracy"], point["macs"]) == (last.accuracy, last.macs)


def neighbours(driver: webdriver.Chrome, table: str, heading: str) -> list[str]:
    """The cell under a heading and the next one, in the row that is set in bold."""
    heads = [one.text for one in driver.find_elements(By.CSS_SELECTOR, f"#{table} thead tr:last-child th")]
    row = driver.find_elements(By.CSS_SELECTOR, f"#{table} tr.last td")
    return [cell.text for cell in row[heads.index(heading) :][:2]]


def test_drawing_is_as_high_as_the_share_of_the_images_and_as_wide_as_their_cost(
    opened: Opened, report: ReportData
) -> None:
    driver, stand = opened(report), report.stands[4]
    (river,) = shown(driver, ".river")
    blocks = river.find_elements(By.CSS_SELECTOR, ".run")
    area = sum(block.rect["width"] * block.rect["height"] for block in blocks)
    beds = river.find_elements(By.CSS_SELECTOR, ".bed")
    bed = sum(block.rect["width"] * block.rect["height"] for block in beds)
    spent = 0.0
    for section, reached in zip(report.sections, stand.reached, strict=True):
        place = section.place
        spent += reached * (section.macs if place is None else place.always)
        if place is not None:
            spent += sum(map(float.__mul__, map(float, place.macs), map(float, stand.decisions[place.name])))
    assert area / bed == pytest.approx(spent / sum(section.dearest for section in report.sections), rel=0.01)
    leaving = river.find_elements(By.CSS_SELECTOR, ".leave")
    heights = [block.rect["height"] / beds[0].rect["height"] for block in leaving]
    assert heights == pytest.approx(stand.exits, abs=0.01)


def test_commands_are_copied(opened: Opened, report: ReportData) -> None:
    driver = opened(report)
    origin = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    driver.execute_cdp_cmd("Browser.grantPermissions", origin)
    button, code = shown(driver, "#point .copy")[0], shown(driver, "#point .command code")[0]
    assert code.text == "dynamize predict 'runs/cifar exits' IMAGES --point macs-0.57"
    button.click()
    time.sleep(0.2)
    assert button.text == "copied"
    assert driver.execute_script("return getSelection().toString()").strip() == code.text


def test_marker_lies_on_the_dot_of_its_point(opened: Opened, report: ReportData) -> None:
    driver = opened(report.model_copy(update={"selected": "macs-0.68"}))
    assert_shows(driver, report.stands[6])
    for chart in CHARTS:
        dots = middles(driver, chart, ".dot")
        assert len(dots) == 13
        assert marker(driver, chart) == pytest.approx(dots[6], abs=0.6)


def test_click_on_a_dot_chooses_it(opened: Opened, report: ReportData) -> None:
    driver = opened(report)
    dot = driver.find_elements(By.CSS_SELECTOR, "#chart-1 .dot")[1]
    driver.execute_script("arguments[0].dispatchEvent(new MouseEvent('click'))", dot)
    assert_shows(driver, report.stands[1])
    assert driver.find_element(By.ID, "slider").get_property("value") == "1"


def test_static_network_and_rivals_are_marked(opened: Opened, report: ReportData) -> None:
    driver = opened(report)
    for chart, once in zip(CHARTS, (3, 0, 0), strict=True):
        marks = [mark.text for mark in driver.find_elements(By.CSS_SELECTOR, f"#{chart} .mark")]
        assert marks == ["static", "resnet20", "resnet32"]
        for kind, number in ((".static", 1), (".rival", 2), (".once", once), (".band", 1)):
            assert len(driver.find_elements(By.CSS_SELECTOR, f"#{chart} {kind}")) == number, kind


def test_the_sweep_of_budgets_is_drawn_where_its_costs_are_known(opened: Opened, report: ReportData) -> None:
    driver = opened(report)
    assert "budgeted batch" in driver.find_element(By.CSS_SELECTOR, ".key").text
    for chart, number in (("chart-macs", 4), ("chart-1", 0)):
        assert len(driver.find_elements(By.CSS_SELECTOR, f"#{chart} .sweep")) == number
        assert len(driver.find_elements(By.CSS_SELECTOR, f"#{chart} .sweep-line")) == (number > 0)
    assert (
        "budgeted" not in opened(report.model_copy(update={"budgeted": []})).find_element(By.CSS_SELECTOR, ".key").text
    )


def test_zoom_lowers_nothing_but_the_axis(opened: Opened, report: ReportData) -> None:
    driver = opened(report)
    high = marker(driver, "chart-macs")
    driver.find_element(By.ID, "zoom").click()
    assert marker(driver, "chart-macs")[1] > high[1] + 5
    labels = [label.text for label in driver.find_elements(By.CSS_SELECTOR, "#chart-macs svg > text")]
    assert min(float(label) for label in labels if re.fullmatch(r"[89]\d(\.\d)?", label)) >= 88
    assert_shows(driver, report.stands[4])


def with_points(report: ReportData, count: int) -> ReportData:
    stands = [one.model_copy(update={"reached": [], "gallery": []}) for one in report.standings[:count]]
    return ReportData(ledger=report.ledger, standings=stands)


def only_static(report: ReportData) -> ReportData:
    return ReportData(ledger=report.ledger.model_copy(update={"rows": report.ledger.rows[:1], "rivals": []}))


def untimed(report: ReportData) -> ReportData:
    without: dict[str, Any] = {"latency": {}, "speedup": {}}
    rows = [row.model_copy(update=without) for row in report.ledger.rows]
    stands = [one.model_copy(update=without) for one in report.standings]
    return report.model_copy(update={"ledger": Ledger(rows=rows), "standings": stands})


@pytest.mark.parametrize(
    ("reduced", "accuracy", "latency"),
    [
        (lambda report: report, "93.00 %", "0.76 ms"),
        (lambda report: with_points(report, 0), "93.00 %", "0.76 ms"),
        (lambda report: with_points(report, 1), "77.62 %", "0.51 ms"),
        (only_static, "93.57 %", "1.13 ms"),
        (untimed, "93.00 %", "not measured"),
    ],
    ids=["full", "no-points", "one-point", "static", "untimed"],
)
def test_page_is_quiet_and_alone(
    opened: Opened,
    report: ReportData,
    reduced: Callable[[ReportData], ReportData],
    accuracy: str,
    latency: str,
) -> None:
    driver = opened(reduced(report))
    for slider in driver.find_elements(By.CSS_SELECTOR, "#slider:enabled"):
        slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert cards(driver)["Accuracy"] == accuracy
    assert latency in [cards(driver).get(name) for name in ("One image", "Time")]
    assert driver.get_log("browser") == []
    assert requests(driver) == [driver.current_url]
    script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert [name for name in driver.execute_script(script) if not name.startswith("data:")] == []
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    driver.execute_script("console.error('probe')")
    assert "probe" in driver.get_log("browser")[0]["message"]


def test_page_forbids_requests_by_itself(opened: Opened, report: ReportData) -> None:
    driver = opened(report)
    driver.execute_script("new Image().src = 'http://127.0.0.1:9/leak.png'")
    assert any("Content Security Policy" in entry["message"] for entry in driver.get_log("browser"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_screen_scrolls_sideways(opened: Opened, report: ReportData, scheme: str) -> None:
    ledger = report.ledger.model_copy(update={"title": "torchvision:mobilenet_v3_large, converted"})
    driver = opened(report.model_copy(update={"ledger": ledger}))
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        for width in (320, 500, 820, 1000, 1600):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            time.sleep(0.1)
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            assert driver.find_element(By.CSS_SELECTOR, "#chart-macs svg").rect["width"] < min(width, 800)
        page = driver.find_element(By.TAG_NAME, "body").value_of_css_property("background-color")
        assert (sum(map(int, re.findall(r"\d+", page)[:3])) > 380) == (scheme == "light")
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_without_scripts_the_page_says_where_the_network_stands(opened: Opened, report: ReportData) -> None:
    driver = opened(report)
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.refresh()
        assert cards(driver)["Accuracy"] == "93.00 %"
        assert len(shown(driver, ".river")) == 1
        assert "JavaScript" in driver.find_element(By.CSS_SELECTOR, "noscript p").text
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_gallery_shows_images_and_wrong_answers(opened: Opened, report: ReportData) -> None:
    driver, gallery = opened(report), report.stands[4].gallery
    images = shown(driver, ".pictures i")
    assert len(images) == 48
    script = "return arguments[0].map((one) => getComputedStyle(one).backgroundImage)"
    found = driver.execute_script(script, images)
    assert all("data:image/png" in image for image in found)
    assert len(set(found)) > 20
    wrong = shown(driver, ".pictures .wrong")
    given = [image for one in gallery for image in one.first + one.last]
    assert len(wrong) == sum(image.label != image.answer for image in given) > 0
    assert wrong[0].text.split("\n") == ["ship", "is horse", "99 %"]
    assert wrong[-1].text.split("\n")[-1][-1] == "M"
    assert images[0].get_attribute("aria-label") == "deer, answered deer"
    heads = [head.text for head in shown(driver, ".gallery")[-1].find_elements(By.TAG_NAME, "h4")]
    assert heads == ["the cheapest, in executed MACs", "the dearest"]


def test_every_gate_has_a_bar_of_its_paths(opened: Opened, report: ReportData) -> None:
    driver = opened(report.model_copy(update={"selected": "macs-0.68"}))
    panel = driver.find_element(By.ID, "gates")
    assert "The 10,000 test images took 43 different ways" in panel.text
    kinds = [item.text for item in shown(driver, "#gates .legend li")]
    assert kinds == ["skipped", "25 % wide", "50 % wide", "75 % wide", "whole", "left before"]
    bars = shown(driver, "#gates .units .bar")
    out, _, rest = report.stands[6].exits
    assert bars[1].get_attribute("aria-label") == "skipped 42.9 %, whole 42.9 %, left before 14.3 %"
    here = 1 - out
    shares = [
        [0.125, 0.875],
        [here / 2, here / 2, out],
        [*(part * rest for part in (0.125, 0.25, 0.125, 0.5)), 1 - rest],
    ]
    for bar, wanted in zip(bars, shares, strict=True):
        pieces = bar.find_elements(By.TAG_NAME, "div")
        assert [one.rect["width"] / bar.rect["width"] for one in pieces] == pytest.approx(wanted, abs=0.01)
    assert [cell.text for cell in shown(driver, "#gates .units b")] == ["88 %", "54 %", "23 %"]


def test_gates_without_exits_show_no_exits(opened: Opened, report: ReportData) -> None:
    alone: dict[str, Any] = {"leaving": [], "words": {}, "right": []}
    changes = [k for k, section in enumerate(report.sections) if section.name != ""]
    stands = [one.model_copy(update=alone | {"gallery": one.gallery[-1:]}) for one in report.standings]
    rows = [row.model_copy(update={"decisions": {}, "leaving": []}) for row in report.ledger.rows]
    points = [point.model_copy(update={"exits": [1.0], "thresholds": {}}) for point in report.operating_points]
    kept = [k for k in changes if report.sections[k].place is None or report.sections[k].place.effect == "changes"]
    driver = opened(
        ReportData(
            ledger=Ledger(rows=rows),
            operating_points=points,
            standings=[one.model_copy(update={"reached": [one.reached[k] for k in kept]}) for one in stands],
            sections=[report.sections[k] for k in kept],
            pictures=report.pictures,
            images=100,
        )
    )
    driver.find_element(By.ID, "slider").send_keys(Keys.ARROW_RIGHT)
    assert shown(driver, ".answering") == []
    assert driver.find_element(By.ID, "gallery-title").text == "Who costs what"
    assert len(shown(driver, ".units .bar")) == 3
    assert driver.get_log("browser") == []


HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"


def test_text_from_outside_stays_text(opened: Opened, report: ReportData) -> None:
    image = report.stands[0].gallery[0].first[0].model_copy(update={"label": HOSTILE, "answer": 0})
    hurt = {"point": HOSTILE, "words": {"exit.1": HOSTILE}, "gallery": [Gallery(exit=2, name=HOSTILE, first=[image])]}
    hostile: dict[str, Any] = {
        "ledger": report.ledger.model_copy(
            update=dict.fromkeys(("title", "model", "command", "machine"), HOSTILE)
            | {"rows": [row.model_copy(update={"notes": [HOSTILE]}) for row in report.ledger.rows]}
        ),
        "operating_points": [point.model_copy(update={"name": HOSTILE}) for point in report.operating_points],
        "standings": [one.model_copy(update=hurt) for one in report.standings],
        "metrics": [row | {"step": HOSTILE} for row in report.metrics],
        **{name: getattr(report, name) for name in ("sections", "pictures", "classes", "images", "answerers")},
        "class_names": [HOSTILE] * 10,
        "recipe": HOSTILE,
        "folder": HOSTILE,
        "versions": {HOSTILE: HOSTILE},
        "notes": [HOSTILE],
    }
    driver = opened(ReportData(**hostile))
    assert driver.execute_script("return window.broken") is None
    assert [one.text for one in shown(driver, ".slide output b")] == [HOSTILE]
    assert driver.get_log("browser") == []


def test_who_answers(report: ReportData, opened: Opened) -> None:
    stand = report.stands[4]
    wrong = stand.gallery[0].model_copy(update={"wrong": stand.gallery[0].last[:1], "last": []})
    one = stand.model_copy(update={"right": [0.95, None, 0.5], "gallery": [wrong]})
    driver = opened(report.model_copy(update={"standings": [one]}))
    rows = driver.find_elements(By.CSS_SELECTOR, "#answerers tbody tr")
    names = [row.find_element(By.TAG_NAME, "th").text for row in rows]
    assert names == report.exit_names()
    assert [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in rows] == [
        ["42.9", "95.00", "90.00", "-", "90.00", "50.00"],
        ["46.1", "-", "90.00", "90.00", "-", "75.00"],
        ["11.0", "50.00", "90.00", "50.00", "75.00", "-"],
    ]
    shades = [cell.value_of_css_property("background-color") for cell in rows[0].find_elements(By.CLASS_NAME, "alike")]
    assert len(set(shades)) == 3
    headings = [one.text for one in driver.find_elements(By.CSS_SELECTOR, ".gallery h4")]
    assert headings == ["first to leave: the surest", "wrong, the surest first"]
    assert driver.get_log("browser") == []


def test_classes_are_told_static_beside_dynamic(opened: Opened, report: ReportData) -> None:
    driver = opened(report)
    first = shown(driver, "#classes tbody tr")[0]
    assert first.text.split() == ["airplane", "1000", "93.6", "92.6", "-1.0"]
    static, dynamic = (
        [cell.text for cell in table.find_elements(By.TAG_NAME, "td")[:10]] for table in shown(driver, ".confusion")
    )
    assert [static[0], static[3], dynamic[0], dynamic[3]] == ["936", "64", "926", "74"]


def test_training_curves_are_those_of_the_metrics(opened: Opened, report: ReportData) -> None:
    driver = opened(report)
    titles = [one.text for one in driver.find_elements(By.CSS_SELECTOR, "#training figcaption")]
    assert titles == ["distill\naccuracy on calibration images, %", "distill\nloss"]
    lines = driver.find_elements(By.CSS_SELECTOR, "#training polyline")
    assert len(lines) == 4
    assert lines[-1].get_attribute("points") == "0.00,0.00 33.33,66.67 66.67,88.89 100.00,100.00"
