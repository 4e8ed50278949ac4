"""The HTML page: what is in it as text, and how it behaves in headless Chromium."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from dynamize.calibration.operating import OperatingPoint
from dynamize.calibration.table import EVERYONE
from dynamize.errors import DynamizeError
from dynamize.report import Answerer, Gallery, GalleryImage, Ledger, Network, ReportData, html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)
Opened = Callable[[ReportData], webdriver.Chrome]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("chromium and chromedriver are not both on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(chromium: webdriver.Chrome, tmp_path: Path) -> Opened:
    """Opens a report from a file, with the logs emptied before."""

    def open_page(report: ReportData) -> webdriver.Chrome:
        page = tmp_path / "report.html"
        page.write_text(html.render(report), encoding="utf-8")
        for kind in ("browser", "performance"):
            chromium.get_log(kind)
        chromium.get(page.as_uri())
        return chromium

    return open_page


def requests(driver: webdriver.Chrome) -> list[str]:
    """Addresses asked for since the log was last read; inline data is not asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith("data:")]


def text(driver: webdriver.Chrome, name: str) -> str:
    return driver.find_element(By.ID, name).text


def widths(driver: webdriver.Chrome) -> list[float]:
    """Shares of the bar that its pieces really take on the screen."""
    time.sleep(0.3)
    pieces = driver.find_elements(By.CSS_SELECTOR, "#bar > div")
    return [piece.rect["width"] / driver.find_element(By.ID, "bar").rect["width"] for piece in pieces]


def middles(driver: webdriver.Chrome, chart: str, kind: str) -> list[list[float]]:
    """Where marks of a kind come to rest on the screen, from the top left corner of their chart."""
    time.sleep(0.3)
    script = """
        const corner = document.querySelector(`#${arguments[0]} svg`).getBoundingClientRect();
        return [...document.querySelectorAll(`#${arguments[0]} ${arguments[1]}`)].map((mark) => {
            const box = mark.getBoundingClientRect();
            return [box.x + box.width / 2 - corner.x, box.y + box.height / 2 - corner.y];
        });"""
    found: list[list[float]] = driver.execute_script(script, chart, kind)
    return found


def marker(driver: webdriver.Chrome, chart: str) -> list[float]:
    """Middle of the highlighted point."""
    return middles(driver, chart, ".here circle")[0]


def assert_shows(driver: webdriver.Chrome, point: OperatingPoint) -> None:
    assert text(driver, "point-name") == point.name
    assert text(driver, "accuracy") == f"{100 * point.accuracy:.2f} %"
    assert float(text(driver, "macs").removesuffix(" M")) == pytest.approx(point.macs / 1e6, rel=0.006)
    assert point.latency_ms is not None
    assert text(driver, "latency") == f"{point.latency_ms:.2f} ms"
    assert text(driver, "speedup") == f"{4.4 / point.latency_ms:.2f}x"
    shown = [float(b.text.removesuffix(" %")) for b in driver.find_elements(By.CSS_SELECTOR, "#shares b")]
    assert shown == pytest.approx([100 * share for share in point.exits], abs=0.06)
    assert widths(driver) == pytest.approx(point.exits, abs=0.01)


def test_slider_moves_everything(opened: Opened, report: ReportData) -> None:
    driver, points = opened(report), report.operating_points
    slider = driver.find_element(By.ID, "slider")
    assert_shows(driver, points[4])
    before = {chart: marker(driver, chart) for chart in ("chart-macs", "chart-latency")}
    slider.send_keys(Keys.ARROW_RIGHT)
    assert_shows(driver, points[5])
    assert slider.get_attribute("aria-valuetext") == f"{points[5].name}: accuracy 93.31 %, 79.3 M MACs"
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


def test_thresholds_are_said_in_words(opened: Opened, report: ReportData) -> None:
    point = report.operating_points[4].model_copy(
        update={"thresholds": {"exit.1": -1.7976931348623157e308, "exit.2": None}}
    )
    driver = opened(report.model_copy(update={"operating_points": [point]}))
    assert text(driver, "thresholds") == "exit 1 (stage 1): all leave; exit 2 (stage 2): off"
    point = point.model_copy(update={"thresholds": {"exit.1": None, "exit.2": 0.91237}})
    driver = opened(report.model_copy(update={"operating_points": [point]}))
    assert text(driver, "thresholds") == "exit 1 (stage 1): off; exit 2 (stage 2): leave at 0.9124 or surer"


def test_marker_lies_on_the_dot_of_its_point(opened: Opened, report: ReportData) -> None:
    driver = opened(report.model_copy(update={"selected": "macs-0.68"}))
    assert_shows(driver, report.operating_points[6])
    for chart in ("chart-macs", "chart-latency"):
        dots = middles(driver, chart, ".dot")
        assert len(dots) == 13
        assert marker(driver, chart) == pytest.approx(dots[6], abs=0.6)


def test_click_on_a_dot_chooses_it(opened: Opened, report: ReportData) -> None:
    driver = opened(report)
    dot = driver.find_elements(By.CSS_SELECTOR, "#chart-latency .dot")[1]
    driver.execute_script("arguments[0].dispatchEvent(new MouseEvent('click'))", dot)
    assert_shows(driver, report.operating_points[1])
    assert driver.find_element(By.ID, "slider").get_property("value") == "1"


def test_static_network_and_rivals_are_marked(opened: Opened, report: ReportData) -> None:
    driver = opened(report)
    for chart in ("chart-macs", "chart-latency"):
        marks = [mark.text for mark in driver.find_elements(By.CSS_SELECTOR, f"#{chart} .mark")]
        assert marks == ["resnet20", "resnet32", "resnet56, static"]
        for kind, number in ((".static", 1), (".rival", 2), (".once", 3), (".band", 1)):
            assert len(driver.find_elements(By.CSS_SELECTOR, f"#{chart} {kind}")) == number, kind


def test_the_sweep_of_budgets_is_drawn_where_its_costs_are_known(opened: Opened, report: ReportData) -> None:
    driver = opened(report)
    assert "budgeted batch" in driver.find_element(By.CSS_SELECTOR, ".key").text
    for chart, number in (("chart-macs", 4), ("chart-latency", 0)):
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
    assert_shows(driver, report.operating_points[4])


def with_points(report: ReportData, count: int) -> ReportData:
    return ReportData(ledger=report.ledger, operating_points=report.operating_points[:count])


def only_static(report: ReportData) -> ReportData:
    return ReportData(ledger=report.ledger.model_copy(update={"rows": report.ledger.rows[:1]}))


def untimed(report: ReportData) -> ReportData:
    rows = [row.model_copy(update={"latency": {}, "speedup": {}}) for row in report.ledger.rows]
    without = {"latency_ms": None, "latency_ci": None}
    points = [point.model_copy(update=without) for point in report.operating_points]
    return ReportData(ledger=Ledger(rows=rows), operating_points=points)


@pytest.mark.parametrize(
    ("reduced", "accuracy", "latency"),
    [
        (lambda report: report, "92.90 %", "2.56 ms"),
        (lambda report: with_points(report, 0), "93.27 %", "0.76 ms"),
        (lambda report: with_points(report, 1), "77.52 %", "1.66 ms"),
        (only_static, "93.57 %", "1.13 ms"),
        (untimed, "92.90 %", "not measured"),
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
    assert text(driver, "accuracy") == accuracy
    assert text(driver, "latency") == latency
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


def test_narrow_screen_does_not_scroll_sideways(opened: Opened, report: ReportData) -> None:
    driver = opened(report)
    size = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        time.sleep(0.3)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 420
        assert driver.find_element(By.CSS_SELECTOR, "#chart-macs svg").rect["width"] < 400
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_gallery_shows_images_and_wrong_answers(opened: Opened, report: ReportData) -> None:
    driver = opened(report)
    images = driver.find_elements(By.CSS_SELECTOR, ".pictures img")
    assert len(images) == 48
    assert all(image.get_property("naturalWidth") == 32 for image in images)
    wrong = driver.find_elements(By.CSS_SELECTOR, ".pictures .wrong")
    given = [image for shown in report.gallery for image in shown.first + shown.last]
    assert len(wrong) == sum(image.label != image.answer for image in given) > 0
    assert wrong[0].text.split("\n") == ["deer", "is cat", "0.99"]
    assert [wrong[-1].text.split("\n")[-1], images[-1].get_attribute("alt")] == ["126M", "airplane, answered airplane"]
    shown = driver.find_elements(By.CSS_SELECTOR, ".gallery")[-1]
    assert [head.text for head in shown.find_elements(By.TAG_NAME, "h4")] == [
        "the cheapest, in executed MACs",
        "the dearest",
    ]


def test_every_gate_has_a_bar_of_its_paths(opened: Opened, report: ReportData) -> None:
    driver = opened(report)
    panel = driver.find_element(By.ID, "gates")
    assert "The 10,000 test images took 37 different ways" in panel.text
    kinds = [item.text for item in panel.find_elements(By.CSS_SELECTOR, ".legend li")]
    assert kinds == ["skipped", "25 % wide", "50 % wide", "75 % wide", "whole", "left before"]
    bars = panel.find_elements(By.CSS_SELECTOR, ".units .bar")
    told = [bar.get_attribute("aria-label") for bar in bars]
    assert told[1] == "skipped 30.0 %, whole 30.0 %, left before 40.0 %"
    shares = [[0.125, 0.875], [0.3, 0.3, 0.4], [0.05, 0.1, 0.05, 0.2, 0.6]]
    for bar, wanted in zip(bars, shares, strict=True):
        pieces = bar.find_elements(By.TAG_NAME, "div")
        assert [one.rect["width"] / bar.rect["width"] for one in pieces] == pytest.approx(wanted, abs=0.01)
    run = [cell.text for cell in panel.find_elements(By.CSS_SELECTOR, ".units b")]
    assert run == ["88 %", "38 %", "30 %"]


def test_gates_without_exits_show_no_exits(opened: Opened, report: ReportData) -> None:
    rows = [row.model_copy(update={"decisions": {}, "leaving": []}) for row in report.ledger.rows]
    points = [point.model_copy(update={"exits": [1.0], "thresholds": {}}) for point in report.operating_points]
    driver = opened(
        ReportData(ledger=Ledger(rows=rows), operating_points=points, usage=report.usage, gallery=report.gallery[-1:])
    )
    driver.find_element(By.ID, "slider").send_keys(Keys.ARROW_RIGHT)
    assert driver.find_elements(By.ID, "exits") == []
    assert driver.find_element(By.ID, "gallery-title").text == "Who costs what"
    assert len(driver.find_elements(By.CSS_SELECTOR, ".units .bar")) == 3
    assert driver.get_log("browser") == []


HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"


def test_text_from_outside_stays_text(opened: Opened, report: ReportData) -> None:
    image = report.gallery[0].first[0].model_copy(update={"label": HOSTILE, "answer": 0})
    hostile: dict[str, Any] = {
        "ledger": report.ledger.model_copy(
            update=dict.fromkeys(("title", "model", "command", "machine"), HOSTILE)
            | {"rows": [row.model_copy(update={"notes": [HOSTILE]}) for row in report.ledger.rows]}
        ),
        "operating_points": [point.model_copy(update={"name": HOSTILE}) for point in report.operating_points],
        "static": Network(name=HOSTILE, macs=1e8, accuracy=0.9),
        "gallery": [Gallery(exit=2, name=HOSTILE, first=[image])],
        "class_names": [HOSTILE],
        "latency_label": HOSTILE,
        "notes": [HOSTILE],
    }
    driver = opened(ReportData(**hostile))
    assert driver.execute_script("return window.broken") is None
    assert text(driver, "point-name") == HOSTILE
    assert driver.get_log("browser") == []


def test_who_answers(report: ReportData, opened: Opened) -> None:
    names = ["small", HOSTILE, "main"]
    alike = ([1, 0.9, 0.5], [0.9, 1, 0.75], [0.5, 0.75, 1])
    rights = (0.95, None, 0.5)
    found = [
        Answerer(name=name, share=share, right=right, alone=0.9, alike=list(row))
        for name, share, right, row in zip(names, (0.75, 0, 0.25), rights, alike, strict=True)
    ]
    wrong = report.gallery[0].model_copy(update={"wrong": report.gallery[0].last[:1], "last": []})
    driver = opened(report.model_copy(update={"answerers": found, "gallery": [wrong]}))
    rows = driver.find_elements(By.CSS_SELECTOR, "#answerers tbody tr")
    cells = [[cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")] for row in rows]
    assert cells == [
        ["small", "75.0", "95.00", "90.00", "–", "90.0", "50.0"],
        [HOSTILE, "0.0", "–", "90.00", "90.0", "–", "75.0"],
        ["main", "25.0", "50.00", "90.00", "50.0", "75.0", "–"],
    ]
    shades = [cell.value_of_css_property("background-color") for cell in rows[0].find_elements(By.CLASS_NAME, "alike")]
    assert len(set(shades)) == 3
    headings = [one.text for one in driver.find_elements(By.CSS_SELECTOR, ".gallery h4")]
    assert headings == ["first to leave: the surest", "wrong, the surest first"]
    assert driver.get_log("browser") == []


def test_page_names_no_address(report: ReportData) -> None:
    page = html.render(report)
    addresses = set(re.findall(r"https?://[^\"'\s<]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(?:src|href)=\"(?!data:)", page)


def view_of(report: ReportData) -> dict[str, Any]:
    """What the script in the page draws from."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html.render(report), re.DOTALL)
    assert found is not None
    view: dict[str, Any] = json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return view


def test_thresholds_stand_in_the_order_of_the_exits(report: ReportData) -> None:
    thresholds = [{"exit.2": 0.9, "exit.1": EVERYONE}, {"exit.2": None, "exit.1": 0.5}]
    points = [
        point.model_copy(update={"thresholds": one})
        for point, one in zip(report.operating_points, thresholds, strict=False)
    ]
    view = view_of(report.model_copy(update={"operating_points": points}))
    assert [point["thresholds"] for point in view["points"]] == [[EVERYONE, 0.9], [0.5, None]]
    assert view["exits"] == ["exit 1 (stage 1)", "exit 2 (stage 2)", "own classifier"]


def test_exits_are_called_by_their_decisions(report: ReportData) -> None:
    names = {"exit.1": "member.small", "exit.2": "focus.2"}
    last = report.ledger.rows[-1]
    decisions = {names[name]: shares for name, shares in last.decisions.items()}
    row = last.model_copy(update={"decisions": decisions, "leaving": [*decisions]})
    view = view_of(ReportData(ledger=Ledger(rows=[report.ledger.rows[0], row])))
    assert view["exits"] == ["member small", "focus 2", "last exit"]
    assert view["points"][0]["exits"] == pytest.approx([0.4321, 0.3111, 0.2568])
    assert view["points"][0]["thresholds"] == []


def test_dearer_options_are_darker(report: ReportData) -> None:
    page = html.render(report)
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


def test_picture_must_be_base64() -> None:
    with pytest.raises(ValidationError, match="png_base64"):
        GalleryImage(png_base64='x" onerror="alert(1)', label=0, answer=0, confidence=1.0)


def test_empty_ledger_is_refused() -> None:
    with pytest.raises(DynamizeError, match="no rows"):
        html.render(ReportData(ledger=Ledger()))
