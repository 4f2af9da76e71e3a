"""The screenshots of the page: `python docs/page.py` writes docs/images/page*.png. Needs Playwright and Chromium."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from mahlstick.page import app

IMAGES = Path(__file__).with_name("images")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def paint(page: Page) -> None:
    """Follows the example's drawing, with a seed that the page shows."""
    page.locator("#example-control").click()
    page.locator("#control-0-seen img").wait_for()
    page.locator("#prompt textarea").fill("red penguin")
    page.locator("#seed input").fill("7")
    page.locator("#paint").click()
    page.locator("#gallery img").first.wait_for()
    page.wait_for_timeout(1000)


def main() -> None:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with tempfile.TemporaryDirectory() as out, sync_playwright() as driver:
        page = app.build(out=out)
        address = app.launch(page, port=None)
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        for name, width, height, scheme in (("page", 1440, 1500, "light"), ("page-phone", 390, 1500, "dark")):
            size = {"width": width, "height": height}
            shown = browser.new_page(viewport=size, color_scheme=scheme)  # type: ignore[arg-type]
            shown.set_default_timeout(180_000)
            shown.goto(address)
            shown.wait_for_timeout(2000)
            paint(shown)
            shown.mouse.move(0, 0)
            shown.screenshot(path=IMAGES / f"{name}.png")
        browser.close()
        page.jobs.close()
        page.close(verbose=False)


if __name__ == "__main__":
    main()
