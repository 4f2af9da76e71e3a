"""The page's grids without a browser."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from gradio_client import Client
from PIL import Image

import mahlstick as ms
from mahlstick.errors import MahlstickError
from mahlstick.page import app
from mahlstick.page.compare import CELLS, KIND, comparison
from mahlstick.page.jobs import Cancelled
from mahlstick.page.units import UnitFault
from mahlstick.pictures import save_png
from mahlstick.pipelines.compare import Axis, cells, read_grid
from mahlstick.pipelines.load import embedded_folder
from mahlstick.pipelines.recipe import GRID_KEY, read_recipe
from mahlstick.pipelines.request import Request

PHOTO = Image.open(embedded_folder().parent / "examples" / "penguin-drawing.png").convert("RGB")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    built = app.build(out=tmp_path_factory.mktemp("out"), device="cpu")
    yield built
    built.jobs.close()


def screen(page, session="someone", **given):
    """What the server is told of Create, with a picture in its second control alone, and of Compare."""
    create, compare = page.create, page.compare
    values = {field: field.value for field in (*create.fields, *compare.fields)}
    request = Request(
        prompt="red penguin", seed=3, steps=1, controls=[{"adapter": "lineart", "image": PHOTO, "scale": 0.5}] * 2
    )
    for field, update in create.write(request).items():
        is_update = isinstance(update, dict) and update.get("__type__") == "update"
        values[field] = update.get("value", values.get(field)) if is_update else update
    values |= create.controls[0].write(None) | {create.controls[0].shown: True}
    values |= {page.compare._session: session, create.seed: 3}
    parts = {"x": (compare.x.field, compare.x.text), "y": (compare.y.field, compare.y.text)}
    for name, pair in given.items():
        values |= dict(zip(parts[name], pair, strict=True)) if name in parts else {getattr(create, name): pair}
    return values


def run(page, values):
    """The last that the browser is shown of each component."""

    async def collect():
        shown = {}
        async for updates in page.compare.make(values, None):
            shown |= updates
        return shown

    return asyncio.run(collect())


def test_a_grid_is_made_saved_and_its_settings_come_back(page, tmp_path):
    values = screen(page, x=("controls[1].scale", "0, 1.5"), y=("prompt", "red, blue"))
    request, x, y = page.compare.read(values)
    assert (x.field, request.prompt, len(request.controls)) == ("controls[0].scale", "red penguin", 1)
    shown = run(page, values)
    compare, history = page.compare, page.history
    assert shown[compare.status] == "" and not any(shown[line] for line in compare.errors)
    (saved,) = history.others("someone", KIND)
    assert shown[compare.gallery]["value"] == [str(saved)] and shown[compare.gallery]["visible"]
    assert history.others("another", KIND) == [] and not compare.enter("another")[compare.gallery]["visible"]

    pictures = sorted(history.pictures("someone"))
    wanted = [cell for row in cells(request, x, y) for cell in row]
    assert len(pictures) == len(wanted) == 4
    for path, cell in zip(pictures, wanted, strict=True):
        recipe = read_recipe(path).request
        assert (recipe.prompt, recipe.controls[0].scale) == (cell.prompt, cell.controls[0].scale)
    alone = ms.generate(wanted[3], loader=page.jobs._loader, device="cpu", progress=False).images[0]
    assert Image.open(pictures[3]).tobytes() == alone.tobytes()

    elsewhere = tmp_path / "grid.png"
    elsewhere.write_bytes(saved.read_bytes())
    back = compare._restore_file(str(elsewhere), "another", None)
    assert back[page.create.prompt] == "red penguin" and back[page.create.seed] == 3
    assert back[compare.x.field]["value"] == "controls[0].scale" and back[compare.x.text]["value"] == "0, 1.5"
    assert back[compare.y.field]["value"] == "prompt" and back[compare.y.text]["value"] == '"red", "blue"'


@pytest.mark.parametrize(
    "given, place, sentence",
    [
        ({"x": ("guidance", "0.5, x")}, "x", "guidance: 'x' is no number; write values such as 0.5, 1"),
        ({"x": ("steps", "5"), "y": ("controls[0].end", "1")}, "y", "Control 1 has no picture"),
        ({"x": ("steps", "5"), "y": ("controls[1].end", "0, 1")}, "y", "start 0 is not before end 0"),
        ({"x": ("steps", "0, 5")}, "x", "steps: should be greater than or equal to 1"),
        ({"x": ("prompt", "owl, cat")}, "x", "'owl' is not in the prompt"),
        ({"x": ("controls[1].adapter", "lineart, other")}, "x", "net: 'other' is unknown; choose from lineart"),
        ({"x": ("", ""), "y": ("", "")}, "x", "Choose what is to differ."),
        ({"x": ("steps", "1-13"), "y": ("seed", "1-5")}, None, f"13 × 5 = 65 pictures, and a grid has at most {CELLS}"),
        ({"x": ("prompt", "red, " + "x" * 501)}, None, "words may have at most 500 letters"),
        ({"x": ("prompt", "red, " * 5001)}, "x", "the values may have at most 20000 letters"),
        ({"prompt": " "}, None, "Say on Create what to paint first"),
    ],
)
def test_a_fault_is_told_beside_its_field_before_any_work(page, given, place, sentence):
    shown = run(page, screen(page, session="faulty", **given))
    told = {line: text for line, text in shown.items() if line in page.compare.errors and text}
    line = page.compare.error if place is None else getattr(page.compare, place).error
    assert list(told) == [line]
    assert sentence in told[line].replace("&#x27;", "'").replace("&gt;", ">")
    assert page.history.pictures("faulty") == []


def test_values_that_do_only_together_are_no_fault(page):
    values = screen(page, x=("controls[1].start", "0.6"), y=("controls[1].end", "0.8, 1"))
    values[page.create.controls[1].end] = 0.5
    page.compare.read(values)
    values[page.compare.x.text] = "0.9"
    with pytest.raises(MahlstickError, match=r"start 0\.9 is not before end 0\.8") as caught:
        page.compare.read(values)
    assert not isinstance(caught.value, UnitFault), "neither is at fault alone"


def test_a_grid_is_cancelled_within_a_step_and_keeps_what_is_made(page):
    request, kept = Request(prompt="red apple", seed=1, steps=1), []
    work = comparison(request, Axis(field="steps", values=[1, 900]), None, page.history, "hasty", kept.extend)
    job = page.jobs.submit(work, "hasty/grids")
    deadline = time.monotonic() + 120
    while job.step < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert job.total == 901 and job.preview.width > 2 * 100
    asyncio.run(page.compare.cancel_all("hasty"))
    with pytest.raises(Cancelled):
        job.future.result(60)
    assert job.step < 300
    assert page.history.pictures("hasty") == kept and len(kept) == 1 and page.history.others("hasty", KIND) == []


def test_a_grid_of_a_net_that_the_session_trained_comes_back(page, tmp_path):
    trained = page.history.results("trainer") / "mine"
    trained.mkdir(parents=True)
    (trained / "net.safetensors").symlink_to(
        embedded_folder() / "controlnet-lineart" / "diffusion_pytorch_model.safetensors"
    )
    (trained / "config.json").symlink_to(embedded_folder() / "controlnet-lineart" / "config.json")
    values = screen(page, "trainer", x=("controls[1].scale", "0, 1"), y=("controls[1].adapter", "lineart, mine"))
    values[page.create.controls[1].adapter] = str(trained)
    shown = run(page, values)
    assert not any(shown[line] for line in page.compare.errors)
    (saved,) = page.history.others("trainer", KIND)
    back = page.compare._restore_chosen("trainer", [saved.name], 0, None)
    assert back[page.compare.y.text]["value"] == "lineart, mine" and not back[page.compare.drop_error]
    assert "mine" in [name for name, _ in back[page.create.controls[0].adapter]["choices"]]
    assert back[page.create.controls[0].adapter]["value"] == str(trained)
    stranger = page.compare._restore_file(str(saved), "another", None)
    assert "is not offered on this page" in stranger[page.compare.drop_error]


def test_clips_are_not_offered_without_a_motion_module(tmp_path, monkeypatch):
    monkeypatch.setattr("mahlstick.page.models.embedded_adapters", dict)
    built = app.build(out=tmp_path, device="cpu")
    assert not built.animate._tab.visible
    built.train.close()
    built.jobs.close()


def test_the_settings_to_choose_are_those_of_the_units_on_create(page):
    def fields(update):
        return [field for _, field in update["choices"]]

    shown = [True, False, True, False, False, False, False]
    x, y = page.compare._offer(*shown, "image_prompts[1].end", "steps")
    assert {"controls[0].mode", "controls[2].mode", "image_prompts[1].end"} <= {*fields(x)}
    assert "controls[1].mode" not in fields(x) and "image_prompts[1].end" not in fields(y)
    assert "" in fields(y) and "" not in fields(x)


def test_a_grid_that_names_files_of_this_machine_is_refused(page, tmp_path):
    request = Request(prompt="x", seeds=[1], width=64, height=64, guidance=1.0)
    made = page.compare
    fields = {"request": json.loads(request.to_json()) | {"init": "/etc/hostname"}, "files": {}, "versions": {}}
    text = fields | {"device": "cpu", "dtype": "float32", "threads": 1, "x": {"field": "steps", "values": [1]}}
    path = save_png(Image.new("RGB", (8, 8)), tmp_path / "grid.png", {GRID_KEY: json.dumps(text)})
    shown = made._restore_file(str(path), "someone", None)
    assert "init: give the picture as a data: URL" in shown[made.drop_error] and page.create.init not in shown


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ("controls[0].scale", "the request has 0 controls"),
        ("image_prompts[0].start", "image_prompts[0].start: cannot be compared on this page"),
    ],
)
def test_a_grid_whose_axis_has_no_place_on_the_page_is_refused(page, tmp_path, field, sentence):
    request = Request(prompt="x", seeds=[1], width=64, height=64, guidance=1.0, image_prompts=[{"images": [PHOTO]}])
    fields = {"request": json.loads(request.to_json()), "files": {}, "versions": {"mahlstick": "1"}, "device": "cpu"}
    text = fields | {"dtype": "float32", "threads": 1, "x": {"field": field, "values": [0.5]}}
    path = save_png(Image.new("RGB", (8, 8)), tmp_path / "grid.png", {GRID_KEY: json.dumps(text)})
    shown = page.compare._restore_file(str(path), "someone", None)
    assert sentence in shown[page.compare.drop_error] and page.compare.x.field not in shown


def test_the_named_endpoint(page):
    client = Client(app.launch(page, port=None), verbose=False)
    request = {"prompt": "penguin", "seed": 4, "steps": 1}
    x = {"field": "seed", "values": [1, 2]}
    grid, *pictures = client.predict(request, x, None, api_name="/compare")
    assert read_grid(grid).x.values == [1, 2]
    assert [read_recipe(path).request.seeds for path in pictures] == [[1], [2]]
    for changed, sentence in (
        ({"init": "/etc/hostname"}, "init: give the picture as a data: URL"),
        ({"base": "/etc"}, "base: /etc is not offered"),
    ):
        with pytest.raises(Exception, match=sentence):
            client.predict(request | changed, x, None, api_name="/compare")
    for given, sentence in (
        (("x", x, None), "request: is no JSON object"),
        ((request, ["steps"], None), "x: is no JSON object"),
        ((request, x, "seed"), "y: is no JSON object"),
        ((request, {"field": "steps", "values": 4}, None), "values: should be"),
        ((request, {"field": "prompt", "values": ["penguin", "x" * 501]}, None), "at most 500 letters"),
    ):
        with pytest.raises(Exception, match=sentence):
            client.predict(*given, api_name="/compare")
    with pytest.raises(Exception, match="at most 64"):
        client.predict(request, {"field": "seed", "values": list(range(90))}, None, api_name="/compare")
    page.close(verbose=False)
