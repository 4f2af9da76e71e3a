"""The page in a real browser, as a person uses it."""

from __future__ import annotations

import os
import shutil

import pytest
from PIL import Image

from mahlstick.page import app
from mahlstick.pipelines.recipe import read_recipe

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: no chromium on PATH")

# The editor draws with WebGL, here in software; the rest keeps Chromium from calling home.
ARGUMENTS = [
    "--no-sandbox",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    page = app.build(out=tmp_path_factory.mktemp("out"))
    yield app.launch(page, port=None)
    page.jobs.close()
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture
def visit(browser, address):
    """A new person at the page, and a check that nothing was asked of another host, and no script failed."""
    contexts, faults = [], []

    def enter(**options):
        context = browser.new_context(viewport={"width": 1440, "height": 900}, **options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith((address, "data:", "blob:")) or faults.append(asked.url))
        page.goto(address)
        page.locator("#paint").wait_for()
        page.locator("#seed input[placeholder]").wait_for()
        playwright.expect(page.locator("#seed input")).to_have_value("")  # the server has answered
        return page

    yield enter
    for context in contexts:
        context.close()
    assert not faults


def paint(page, steps=3, **fields):
    """Presses the keys and gives the saved picture's path."""
    before = page.locator("#gallery img").count()
    page.locator("#settings input[type=number]").first.fill(str(steps))
    for name, value in fields.items():
        page.locator(f"#{name} :is(input, textarea)").first.fill(str(value))
    page.locator("#prompt textarea").press("Control+Enter")
    page.locator("#status .job").wait_for()
    page.locator("#status .job").wait_for(state="detached")
    playwright.expect(page.locator("#gallery img")).not_to_have_count(before)


def download(page, path):
    source = page.locator("#gallery .preview img, #gallery img").first.get_attribute("src")
    path.write_bytes(page.request.get(source).body())
    return path


def draw(page, canvas, *points):
    canvas.get_by_role("button", name="Brush").first.click()
    box = canvas.locator("canvas").first.bounding_box()
    centre = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for i, (x, y) in enumerate(points):
        page.mouse.move(centre[0] + x, centre[1] + y, steps=4)
        if i == 0:
            page.mouse.down()
    page.mouse.up()


def test_a_drawing_steers_and_its_picture_brings_the_settings_back(visit, tmp_path):
    page = visit()
    paint(page, prompt="penguin", seed=7)
    plain = download(page, tmp_path / "plain.png")
    page.get_by_role("button", name="Controls").click()
    canvas = page.locator("#control-0-picture")
    canvas.locator("canvas").first.wait_for()
    draw(page, canvas, (-60, -60), (60, -60), (60, 60), (-60, 60), (-60, -60))
    page.locator("#control-0 img").first.wait_for()  # what the net sees
    paint(page)
    drawn = download(page, tmp_path / "drawn.png")
    recipe = read_recipe(drawn)
    assert recipe.request.seeds == [7] and len(recipe.request.controls) == 1
    assert Image.open(drawn).tobytes() != Image.open(plain).tobytes()

    other = visit()
    assert other.locator("#gallery img").count() == 0  # one does not see another's
    other.locator("#drop input[type=file]").set_input_files(drawn)
    playwright.expect(other.locator("#prompt textarea")).to_have_value("penguin")
    playwright.expect(other.locator("#seed input")).to_have_value("7")
    other.locator("#control-0-picture canvas").first.wait_for()
    paint(other)
    assert Image.open(download(other, tmp_path / "again.png")).tobytes() == Image.open(drawn).tobytes()


def test_cancel_and_faults(visit, tmp_path):
    page = visit()
    page.locator("#paint").click()
    playwright.expect(page.get_by_role("alert")).to_have_text("Say what to paint first.")
    page.locator("#prompt textarea").fill("red apple")
    page.locator("#settings input[type=number]").first.fill("100")
    page.locator("#paint").click()
    page.locator("#status .job img").wait_for()
    page.locator("#cancel").click()
    playwright.expect(page.locator("#status .note")).to_contain_text("Cancelled")
    assert page.locator("#gallery img").count() == 0 and not page.locator("#cancel").is_visible()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    page.locator("#drop input[type=file]").set_input_files(bad)
    playwright.expect(page.get_by_role("alert")).to_contain_text("bad.png: not a readable picture")


@pytest.mark.parametrize("locale, word", [("en-GB", "Paint"), ("zh-CN", "生成")])
def test_a_phone_in_either_language(visit, locale, word):
    page = visit(locale=locale, color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    playwright.expect(page.locator("#paint")).to_have_text(word)
    page.locator("#example-control").click()
    page.locator("#control-0-picture canvas").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter(e => e.checkVisibility()"
        " && !(e.labels?.length || e.ariaLabel || e.title || e.innerText?.trim()"
        " || e.querySelector('img')?.alt)).map(e => e.outerHTML)"
    )
    assert unnamed == []
