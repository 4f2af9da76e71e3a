"""The page in a real browser, as a person uses it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel
from PIL import Image, ImageChops

import mahlstick as ms
from mahlstick.page import app
from mahlstick.pipelines.load import embedded_folder
from mahlstick.pipelines.recipe import read_recipe
from mahlstick.pipelines.request import data_url, open_picture

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: no chromium on PATH")
expect = playwright.expect

# A camera that shows a test picture; the rest keeps Chromium from calling home.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000  # milliseconds
AXE = "axe-core@4.14.1"
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
SQUARE = [(-60, -60), (60, -60), (60, 60), (-60, 60), (-60, -60)]
EXAMPLES = embedded_folder().parent / "examples"

# Whether each of the visible fields stands beside or below the others, and none is cut off at the right.
OVERLAPS = """() => {
  const seen = [...document.querySelectorAll('button:not([tabindex="-1"]), input, textarea, .canvas-stage')].filter(
    each => each.checkVisibility({ visibilityProperty: true }) && each.getBoundingClientRect().width > 1
  );
  const boxes = seen.map(each => [each, each.getBoundingClientRect()]);
  const before = (a, b) => a.right <= b.left + 1 || a.bottom <= b.top + 1;
  const apart = (a, b) => before(a, b) || before(b, a);
  const faults = boxes.filter(([, box]) => box.right > innerWidth + 1).map(([each]) => 'cut off: ' + each.outerHTML);
  for (const [i, [one, box]] of boxes.entries()) {
    for (const [other, its] of boxes.slice(i + 1)) {
      if (one.contains(other) || other.contains(one) || one.closest('#drop') || other.closest('#drop')) continue;
      if (!apart(box, its)) faults.push(one.outerHTML.slice(0, 200) + ' overlaps ' + other.outerHTML.slice(0, 200));
    }
  }
  return faults;
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    unet = UNet2DConditionModel.from_pretrained(embedded_folder() / "unet")
    ms.MotionAdapter.from_unet(unet, max_frames=8, heads=2).save_pretrained(models / "still")
    page = app.build(models, tmp_path_factory.mktemp("out"))
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

    def enter(size=DESKTOP, **options):
        context = browser.new_context(viewport=size, **options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith((address, "data:", "blob:")) or faults.append(asked.url))
        page.goto(address)
        page.locator("#paint").wait_for()
        page.locator("#seed input[placeholder]").wait_for()
        expect(page.locator("#seed input")).to_have_value("", timeout=PATIENCE)  # the server has answered
        return page

    expect.set_options(timeout=PATIENCE)
    yield enter
    for context in contexts:
        context.close()
    assert not faults


def fill(page, steps=3, **fields):
    page.locator("#settings input[type=number]").first.fill(str(steps))
    for name, value in fields.items():
        page.locator(f"#{name} :is(input, textarea)").first.fill(str(value))


def painted(page, path):
    """Waits for the picture that is on its way, and saves it."""
    page.locator("#status .job").wait_for()
    page.locator("#status .job").wait_for(state="detached")
    source = page.locator("#gallery img").first.get_attribute("src")
    path.write_bytes(page.request.get(source).body())
    return path


def paint(page, path, **fields):
    fill(page, **fields)
    page.locator("#prompt textarea").press("Control+Enter")
    return painted(page, path)


def press(page, name):
    """A click with nothing between it and what came before."""
    page.evaluate("name => document.querySelector(name).click()", name)


def draw(page, canvas, *points, lift=True):
    layer = canvas.locator(".canvas-stage canvas")
    layer.scroll_into_view_if_needed()
    box = layer.bounding_box()
    centre = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for i, (x, y) in enumerate(points):
        page.mouse.move(centre[0] + x, centre[1] + y, steps=4)
        if i == 0:
            page.mouse.down()
    if lift:
        page.mouse.up()


def ink(canvas):
    """How much is painted on a canvas: the sum of its opacities."""
    return canvas.locator(".canvas-stage canvas").evaluate(
        "layer => layer.getContext('2d').getImageData(0, 0, layer.width, layer.height).data"
        ".reduce((sum, level, i) => sum + (i % 4 === 3 ? level : 0), 0)"
    )


def pixels(path):
    return Image.open(path).convert("RGB")


def test_a_drawing_steers_and_its_picture_brings_the_settings_back(visit, tmp_path):
    page = visit()
    plain = paint(page, tmp_path / "plain.png", prompt="penguin", seed=7)
    page.get_by_role("button", name="Controls").click()
    draw(page, page.locator("#control-0-picture"), *SQUARE, lift=False)
    press(page, "#paint")  # the pen is still down
    drawn = painted(page, tmp_path / "drawn.png")
    page.mouse.up()
    recipe = read_recipe(drawn)
    assert recipe.request.seeds == [7] and len(recipe.request.controls) == 1
    assert pixels(drawn).tobytes() != pixels(plain).tobytes()
    page.locator("#control-0 img[alt*=net]").wait_for()  # what the net sees

    plainly = page.locator("#gallery img").first.get_attribute("src")
    page.locator("#overlay input").check()
    expect(page.locator("#gallery img").first).not_to_have_attribute("src", plainly)

    other = visit()
    assert other.locator("#gallery img").count() == 0  # one does not see another's
    other.locator("#drop input[type=file]").set_input_files(drawn)
    expect(other.locator("#prompt textarea")).to_have_value("penguin")
    expect(other.locator("#seed input")).to_have_value("7")
    other.locator("#control-0-picture .canvas-stage img:visible").wait_for()
    assert pixels(paint(other, tmp_path / "again.png")).tobytes() == pixels(drawn).tobytes()


def test_a_picture_is_painted_over_only_where_the_mask_is_and_results_are_sent_on(visit, tmp_path):
    page = visit()
    page.get_by_role("button", name="Start from a picture").click()
    canvas = page.locator("#init-picture")
    photo = Image.open(EXAMPLES / "lollipop-reference.png").convert("RGB").resize((64, 64))
    photo.save(tmp_path / "photo.png")
    canvas.locator("input[type=file]").set_input_files(tmp_path / "photo.png")
    canvas.locator(".canvas-stage img:visible").wait_for()
    draw(page, canvas, (-20, -20), (20, 20))
    result = paint(page, tmp_path / "result.png", prompt="red apple", seed=1)
    mask = read_recipe(result).request.mask
    assert mask is not None
    difference = ImageChops.difference(pixels(result), photo).convert("L")
    assert difference.crop((28, 28, 36, 36)).getbbox() and not difference.crop((0, 0, 64, 12)).getbbox()

    page.locator("#to-init").click()
    expect(canvas.locator("button[aria-label='Undo']")).to_be_disabled()  # it is another picture now
    page.locator("#to-control").click()
    page.locator("#control-0-picture .canvas-stage img:visible").wait_for()
    page.locator("#to-image-prompt").click()
    page.locator("#image-prompt-0-pictures img").first.wait_for()
    sent = read_recipe(paint(page, tmp_path / "sent.png")).request
    assert sent.init is not None and len(sent.controls) == len(sent.image_prompts) == 1


def test_an_uploaded_reference_is_an_image_prompt(visit, tmp_path):
    page = visit()
    page.get_by_role("button", name="Image prompts").click()
    page.locator("#image-prompt-0-pictures input[type=file]").set_input_files(EXAMPLES / "lotus-reference.png")
    page.locator("#image-prompt-0-pictures img").first.wait_for()
    request = read_recipe(paint(page, tmp_path / "made.png", prompt="cactus")).request
    assert len(request.image_prompts) == 1 and not request.controls


def test_cancel_and_faults(visit, tmp_path):
    page = visit()
    page.locator("#paint").click()
    expect(page.get_by_role("alert")).to_have_text("Say what to paint first.")
    fill(page, steps=100, prompt="red apple")
    page.locator("#settings input[type=number]").nth(1).fill("16")  # pictures: it has to be at work for long
    page.locator("#paint").click()
    page.locator("#status .job img").wait_for()
    assert page.locator("#status .job").evaluate("job => job.scrollHeight <= job.clientHeight + 1")
    page.locator("#cancel").click()
    expect(page.locator("#status .note")).to_contain_text("Cancelled")
    assert page.locator("#gallery img").count() == 0
    expect(page.locator("#cancel")).to_be_hidden()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not a picture")
    page.locator("#drop input[type=file]").set_input_files(bad)
    expect(page.get_by_role("alert")).to_contain_text("bad.png: not a readable picture")
    page.get_by_role("button", name="Controls").click()
    canvas = page.locator("#control-0-picture")
    canvas.locator("input[type=file]").set_input_files(bad)
    expect(canvas.get_by_role("alert")).to_contain_text("no picture that the browser can show")
    draw(page, canvas, *SQUARE)
    expect(canvas.get_by_role("alert")).to_be_hidden()


def test_pictures_count_though_paint_is_pressed_while_they_are_being_read(visit, tmp_path):
    page = visit()
    for name in ("Controls", "Image prompts"):
        page.get_by_role("button", name=name).click()
    for name in ("#control-0-picture", "#image-prompt-0-unlike"):
        page.locator(f"{name} .canvas").wait_for()
    fill(page, prompt="penguin", seed=7)
    drawing, *references = [
        EXAMPLES / f"{name}.png" for name in ("penguin-drawing", "lotus-reference", "lollipop-reference")
    ]
    page.evaluate(
        """given => {
            for (const [name, pictures] of Object.entries(given)) {
                const files = pictures.map(bytes => new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
                document.querySelector(`${name} .canvas`).mahlstick.take(files);
            }
            document.querySelector("#paint").click();
        }""",
        {
            "#control-0-picture": [[*drawing.read_bytes()]],
            "#image-prompt-0-pictures": [[*path.read_bytes()] for path in references],
            "#image-prompt-0-unlike": [[*references[0].read_bytes()]],
        },
    )
    request = read_recipe(painted(page, tmp_path / "made.png")).request
    assert len(request.controls) == 1 and len(request.image_prompts[0].images) == 2
    assert request.image_prompts[0].negative is not None
    page.locator("#image-prompt-0-pictures li button").first.click()
    request = read_recipe(paint(page, tmp_path / "again.png")).request
    assert open_picture(request.image_prompts[0].images[0], "").tobytes() == pixels(references[1]).tobytes()


# A camera opened, and whether its button could be pressed when it appeared.
CAN_TAKE_AT_ONCE = """button => new Promise(done => {
  const canvas = button.closest("#control-0-picture");
  const look = (_, observer) => {
    const take = canvas.querySelector(".canvas-camera button");
    if (take) { observer.disconnect(); done(!take.disabled); }
  };
  new MutationObserver(look).observe(canvas, { childList: true, subtree: true });
  button.click();
})"""


def test_the_tools_of_a_canvas(visit):
    page = visit()
    page.get_by_role("button", name="Controls").click()
    canvas = page.locator("#control-0-picture")
    canvas.locator(".canvas").wait_for()

    def tool(name):
        return canvas.get_by_role("button", name=name)

    expect(tool("Clear")).to_be_disabled()
    draw(page, canvas, *SQUARE)
    square = ink(canvas)
    draw(page, canvas, (-40, 0), (40, 0))
    assert ink(canvas) > square > 0
    tool("Eraser").click()
    draw(page, canvas, (-50, 0), (50, 0))
    assert ink(canvas) < square * 1.05
    for _ in range(2):
        page.keyboard.press("Control+z")
    page.wait_for_timeout(300)
    assert ink(canvas) == square
    tool("Clear").focus()
    page.keyboard.press("Enter")
    expect(canvas.locator(".canvas-hint")).to_be_visible()
    tool("Undo").click()
    page.wait_for_timeout(300)
    assert ink(canvas) == square

    assert tool("Take a photo").evaluate(CAN_TAKE_AT_ONCE) is False, "the camera has shown nothing yet"
    canvas.get_by_role("button", name="Take it").click()
    shown = canvas.locator(".canvas-stage img:visible")
    shown.wait_for()
    photo = shown.get_attribute("src")
    tool("Pen").focus()
    page.evaluate(
        """async photo => {
            const file = new File([await (await fetch(photo)).blob()], "pasted.png", { type: "image/png" });
            const data = new DataTransfer();
            data.items.add(file);
            document.activeElement.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
        }""",
        data_url(Image.open(EXAMPLES / "apple-drawing.png")),
    )
    expect(shown).not_to_have_attribute("src", photo)


@pytest.fixture(scope="session")
def axe(pytestconfig):
    """The script of axe-core, installed once into pytest's cache."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm, for axe-core")
    folder = Path(pytestconfig.cache.mkdir("axe"))
    script = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not script.is_file():
        install = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", folder, AXE]
        installed = subprocess.run(install, capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"npm cannot install {AXE}: {installed.stderr.strip()[-200:]}")
    return script.read_text()


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_has_contrast_a_name_and_room(visit, axe, size, scheme):
    page = visit(size=size, color_scheme=scheme, locale="zh-CN" if scheme == "dark" else "en-GB")
    expect(page.locator("#paint")).to_have_text("生成" if scheme == "dark" else "Paint")
    page.locator("#example-control").click()
    page.locator("#control-0-picture .canvas-stage img:visible").wait_for()
    page.locator("#image-prompts > button").click()
    page.locator("#init > button").click()
    page.locator("#init-picture .canvas").wait_for()
    page.evaluate(axe)
    found = look(page, size)
    strip, menu = page.locator("#tabs > .tab-wrapper [role=tab]:visible"), page.locator("#tabs .overflow-menu > button")
    folded = page.locator("#tabs .overflow-dropdown button")
    names = [tab.inner_text() for tab in strip.all()]
    if menu.is_visible():
        menu.click()
        names += folded.all_inner_texts()
        page.evaluate("scrollTo(0, 0)")
        found |= {f"menu: {fault}" for fault in violations(page)}
        menu.click()
    assert len(names) == 6
    for name in names[1:]:
        if not (tab := strip.get_by_text(name, exact=True)).count():
            menu.click()
            tab = folded.get_by_text(name, exact=True)
        tab.click()
        found |= {f"{name}: {fault}" for fault in look(page, size)}
    assert not found


def look(page, size):
    """What is wrong with what is on the screen."""
    page.wait_for_timeout(500)
    wide = page.evaluate("document.documentElement.scrollWidth") - size["width"]
    return violations(page) | set(page.evaluate(OVERLAPS)) | ({f"{wide} pixels too wide"} if wide > 0 else set())


def violations(page):
    """What axe-core finds."""
    found = page.evaluate("axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21aa'] })")
    return {f"{fault['id']}: {each['html'][:200]}" for fault in found["violations"] for each in fault["nodes"]}
