"""The report in headless Chromium: opened from a file, and read as a person sees it."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from dynamize.report import ReportData, html

Opened = Callable[[ReportData], webdriver.Chrome]


def requests(driver: webdriver.Chrome) -> list[str]:
    """Addresses asked for since the log was last read; inline data is not asked for."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith("data:")]


def shown(driver: webdriver.Chrome, selector: str) -> list[Any]:
    """The elements that are not hidden."""
    script = "return [...document.querySelectorAll(arguments[0])].filter((one) => one.checkVisibility())"
    found: list[Any] = driver.execute_script(script, selector)
    return found


def told(driver: webdriver.Chrome, selector: str) -> list[str]:
    """Texts of the elements that are not hidden."""
    script = """return [...document.querySelectorAll(arguments[0])].filter((one) => one.checkVisibility())
        .map((one) => one.innerText || one.textContent)"""
    found: list[str] = driver.execute_script(script, selector)
    return found


def cards(driver: webdriver.Chrome) -> dict[str, str]:
    """Figures of the cards by their titles."""
    values = [one.text for one in shown(driver, ".cards dd:not(.small)")]
    return dict(zip([one.text for one in shown(driver, ".cards dt")], values, strict=True))


def widths(driver: webdriver.Chrome) -> list[float]:
    """Shares of the bar that its pieces take on the screen."""
    (bar,) = shown(driver, "#point .bar")
    return [piece.rect["width"] / bar.rect["width"] for piece in bar.find_elements(By.TAG_NAME, "div")]


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


def view_of(report: ReportData) -> dict[str, Any]:
    """What the script in the page draws from."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html.render(report), re.DOTALL)
    assert found is not None
    view: dict[str, Any] = json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return view
