"""The pictures of a report in these docs: a page as headless Chromium shows it, in light and dark colours.

    dynamize run quickstart
    python docs/screenshots.py runs/quickstart/report.html --to docs/images

needs chromium, chromedriver and the extra ``dev``.
"""

import argparse
import base64
import io
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

COLORS = 256  # of a picture's palette
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """Headless Chromium with an empty profile."""
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        raise SystemExit("install chromium and chromedriver, which take the pictures")
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for flag in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(flag)
        found = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield found
        finally:
            found.quit()


def picture(driver: webdriver.Chrome, page: Path, scheme: str, width: int, height: int) -> Image.Image:
    """The page from its top, in pixels."""
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(page.resolve().as_uri())
    time.sleep(0.5)  # until marks have come to rest
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


def main() -> None:
    """Write report-light.png and report-dark.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="report.html of a run")
    parser.add_argument("--to", type=Path, default=Path("docs/images"), help="folder to write")
    parser.add_argument("--width", type=int, default=1000, help="pixels")
    parser.add_argument("--height", type=int, default=1250, help="pixels from the top of the page")
    given = parser.parse_args()
    given.to.mkdir(parents=True, exist_ok=True)
    with browser() as driver:
        for scheme in ("light", "dark"):
            shot = picture(driver, given.page, scheme, given.width, given.height)
            file = given.to / f"report-{scheme}.png"
            shot.quantize(COLORS, dither=Image.Dither.NONE).save(file, optimize=True)
            print(f"{file}  {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
