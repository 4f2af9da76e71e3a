"""The page without a browser: what is on the screen and a request are the same, jobs stop, sessions are apart."""

from __future__ import annotations

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest
import torch
from gradio_client import Client
from PIL import Image
from starlette.exceptions import HTTPException

import mahlstick as ms
from mahlstick import annotators
from mahlstick.errors import MahlstickError
from mahlstick.page import app, canvas, scripts, status
from mahlstick.page.create import Create
from mahlstick.page.history import History
from mahlstick.page.jobs import Cancelled, Jobs, pictures
from mahlstick.page.limits import BodyLimit
from mahlstick.page.making import Begun, Maker
from mahlstick.page.models import Models
from mahlstick.page.sentences import translated
from mahlstick.page.units import SLIDERS, _shown_options
from mahlstick.pictures import save_png
from mahlstick.pipelines.load import embedded_folder
from mahlstick.pipelines.recipe import describe, read_recipe
from mahlstick.pipelines.request import Request, data_url, open_picture

EXAMPLES = embedded_folder().parent / "examples"
DRAWING = EXAMPLES / "penguin-drawing.png"
REFERENCE = EXAMPLES / "lollipop-reference.png"
PAINTED = Image.new("L", (64, 64))
PAINTED.paste(255, (8, 8, 40, 40))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    built = app.build(out=tmp_path_factory.mktemp("out"))
    yield built
    built.jobs.close()


@pytest.fixture
def jobs():
    found = Jobs(device="cpu")
    yield found
    found.close()


def on_the_screen(create: Create, updates: dict) -> dict:
    """What the server is told after the browser has shown the updates."""
    values = {field: field.value for field in create.fields}
    for field, update in updates.items():
        is_update = isinstance(update, dict) and update.get("__type__") == "update"
        values[field] = update.get("value", values.get(field)) if is_update else update
    return values


def test_every_setting_comes_back(page):
    photo = Image.open(REFERENCE).convert("RGB")
    request = Request(
        prompt="a (red:1.2) penguin",
        negative_prompt="blue",
        seed=2**40,
        steps=150,
        images=2,
        guidance=0.0,
        width=64,
        height=64,
        scheduler="dpm++_2m_karras",
        init=photo,
        mask=PAINTED.resize(photo.size, Image.Resampling.NEAREST),
        strength=0.35,
        controls=[
            {"adapter": "lineart", "image": photo, "annotator": "canny", "options": {"low": 30}, "scale": -0.5},
            {"adapter": "lineart", "image": photo, "start": 0.25, "end": 0.5, "mode": "guess", "resize": "pad"},
            {
                "adapter": "lineart",
                "image": photo,
                "annotator": "lineart",
                "options": {"source": "picture"},
                "mask": PAINTED.resize(photo.size, Image.Resampling.NEAREST),
            },
        ],
        image_prompts=[
            {"images": [photo, photo.rotate(90)], "scale": 0.35, "blocks": "style", "negative": photo.rotate(180)},
            {"images": [photo], "mask": PAINTED},
        ],
    )
    values = on_the_screen(page.create, page.create.write(request))
    read = page.create.read(values)
    assert read.model_dump(mode="json", exclude={"controls", "mask"}) == request.model_dump(
        mode="json", exclude={"controls", "mask"}
    )
    for now, before in zip(read.controls, request.controls, strict=True):
        assert now.model_dump(exclude={"mask", "image"}) == before.model_dump(exclude={"mask", "image"})
        assert (now.mask is None) == (before.mask is None)
    assert read.mask.tobytes() == request.mask.tobytes()
    assert read.controls[2].mask.tobytes() == request.controls[2].mask.tobytes()


def test_every_option_of_an_annotator_has_a_place():
    for name in annotators.names():
        numbers, choice, switch = _shown_options(name)
        shown = {option.name for option in (*numbers, choice, switch) if option is not None}
        assert len(numbers) <= SLIDERS
        assert shown | {"model", "mask"} >= set(annotators.get(name).options), name


def test_drawings_masks_and_empty_canvases():
    empty = Image.new("RGBA", (32, 32))
    stroke = empty.copy()
    stroke.paste("black", (4, 4, 8, 8))
    for value in (None, "", {"picture": None, "paint": None}, {"picture": None, "paint": data_url(empty)}):
        assert canvas.is_empty(value)
        assert canvas.flattened(value) is None and canvas.painted(value) is None
    drawing = {"picture": None, "paint": data_url(stroke)}
    drawn = canvas.flattened(drawing)
    assert drawn.getpixel((5, 5)) == (0, 0, 0) and drawn.getpixel((20, 20)) == (255, 255, 255)
    assert canvas.painted(drawing).getbbox() == (4, 4, 8, 8)
    everywhere = {"picture": None, "paint": data_url(Image.new("RGBA", (8, 8), canvas.PAINT))}
    assert canvas.painted(everywhere).getextrema() == (255, 255)
    assert canvas.background(canvas.above(drawing)).getpixel((5, 5)) == (0, 0, 0)


def test_what_is_no_picture_of_a_canvas_is_refused():
    for value, sentence in (
        ({"picture": "/etc/hostname", "paint": None}, "should come from the canvas"),
        ({"picture": "data:image/png;base64,bm8gcGljdHVyZQ==", "paint": None}, "is not a picture"),
        ({"picture": None, "paint": "data:image/png;base64,bm8gcGljdHVyZQ=="}, "is no PNG of a canvas"),
        ({"picture": "data:image/png;base64," + "A" * (45 << 20), "paint": None}, "is larger than 32 MB"),
    ):
        with pytest.raises(MahlstickError, match=sentence):
            canvas.flattened(value)
        if value["picture"]:
            with pytest.raises(MahlstickError, match=sentence):
                canvas.pictures([value["picture"]])


def test_a_unit_without_a_picture_is_not_there_and_says_so_where_something_was_set(page):
    create = page.create
    values = {field: field.value for field in create.fields} | {create.prompt: "apple"}
    control, reference = create.controls[0], create.image_prompts[0]
    assert not control.is_idle(values) and not reference.is_idle(values)
    values |= {control.adapter: "another", control.scale: 0.5, reference.blocks: "style"}
    assert control.is_idle(values) and reference.is_idle(values)
    assert create.read(values).controls == create.read(values).image_prompts == []
    values |= {
        control.picture: canvas.value(Image.open(REFERENCE)),
        reference.pictures: canvas.strip_value([Image.open(REFERENCE)]),
    }
    assert not control.is_idle(values) and not reference.is_idle(values)
    assert create.read(values).controls[0].scale == 0.5


def test_a_removed_unit_comes_back_as_new(page):
    for unit in page.create.units:
        values = {field: field.value for field in page.create.fields}
        changed = {unit.shown: True, unit.scale: 0.3, unit.start: 0.5, unit.masked: True}
        cleared = {field: _value(update) for field, update in unit.write(None).items()}
        after = {**values, **changed, **cleared, unit.shown: True}
        assert not unit.is_idle(after) and not unit.filled(after)
        assert all(after[field] == values[field] for field in (unit.adapter, *unit._usual))


def _value(update):
    return update.get("value") if isinstance(update, dict) and "__type__" in update else update


def test_a_run_changes_only_what_its_event_names(page):
    create = page.create
    named = next(event.outputs for event in page.fns.values() if (create.run._id, "click") in event.targets)

    async def changed(values):
        return {component async for updates in create.make(values, None) for component in updates}

    values = {field: field.value for field in create.fields} | {create.prompt: "apple", create.steps: 1}
    values |= {create._session: "someone", create.shown: [], create.search: "", create.overlay: False}
    for prompt in ("apple", ""):
        found = asyncio.run(changed(values | {create.prompt: prompt}))
        assert found <= {*named} and create.gallery in found
    assert create.texts[0] in named


def test_words_find_references_in_the_library_and_come_back_as_pictures(tmp_path):
    library = ms.Library(tmp_path / "library.sqlite")
    library.add({REFERENCE: ["a round lollipop"], EXAMPLES / "lotus-reference.png": ["a lotus"]}, progress=False)
    page = app.build(out=tmp_path / "out", library=library.path, device="cpu")
    create, unit = page.create, page.create.image_prompts[0]
    values = {field: field.value for field in create.fields} | {create.prompt: "cactus", unit.search: " lollipop "}
    assert unit.search.visible and unit.filled(values)
    request = create.read(values).model_copy(update={"steps": 1})
    page.create._models.check(request)
    (saved,) = ms.generate(request, device="cpu", progress=False).save(tmp_path / "made")
    back = create._restore_file(str(saved), "someone", None)
    assert back[unit.search] == "" and not back[create.drop_error]
    (picture,) = canvas.pictures(back[unit.pictures])
    assert picture.tobytes() == Image.open(REFERENCE).convert("RGB").tobytes()
    both = values | {unit.pictures: canvas.strip_value([picture])}
    with pytest.raises(MahlstickError, match="search is given too; keep one"):
        create.read(both)
    page.jobs.close()
    page.train.close()
    with pytest.raises(MahlstickError, match=r"--library .*: is no file"):
        app.build(out=tmp_path / "out", library=tmp_path / "absent")


def test_chinese_browsers_read_chinese(tmp_path):
    photo = Image.open(REFERENCE)
    browser = SimpleNamespace(headers={"accept-language": "zh-CN,zh;q=0.9"})

    def unit(**fields):
        return {"controls": [{"adapter": "lineart", "image": photo, **fields}]}

    wrong = [
        {"steps": 0}, {"seed": -1}, {"guidance": 1000}, {"width": 64}, {"width": 63, "height": 64}, {"steps": 2.5},
        {"steps": 1, "init": photo, "strength": 0.1}, unit(start=0.5, end=0.5), unit(scale=50),
    ]  # fmt: skip
    for fields in wrong:
        with pytest.raises(MahlstickError) as caught:
            Request(prompt="apple", **fields)
        assert translated(str(caught.value), None) == str(caught.value)
        assert translated(str(caught.value), browser) != str(caught.value)
    assert translated("controls[0].scale: should be less than or equal to 10, not 50", browser).startswith(
        "控制 1 权重"
    )
    (tmp_path / "bad.png").write_bytes(b"none")
    photo.save(tmp_path / "plain.png")
    for make in (
        lambda: read_recipe(tmp_path / "bad.png"),
        lambda: read_recipe(tmp_path / "plain.png"),
        lambda: open_picture(str(tmp_path / "bad.png"), "picture"),
        lambda: annotators.annotate("canny", photo, low=200, high=100),
        lambda: Models(None).check(Request(prompt="apple", base="/elsewhere")),
    ):
        with pytest.raises(MahlstickError) as caught:
            make()
        assert translated(str(caught.value), browser) != str(caught.value)
    assert ":" not in translated("walk.mp4: holds no recipe; only a clip that", browser)
    assert translated("nobody has met this", browser) == "nobody has met this"


def test_the_control_lies_over_the_result(tmp_path):
    history = History(tmp_path)
    result, control = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "black")
    path, other = history.folder("mine") / "0001.png", history.folder("mine") / "0002.png"
    for target, controls in ((path, [{"adapter": "lineart", "image": control}]), (other, [])):
        request = Request(prompt="apple", seeds=[1], guidance=4, controls=controls)
        save_png(result, target, describe(request, "cpu", torch.float32).text())
    assert Image.open(history.overlaid(path)).getpixel((5, 5)) == (127, 127, 127)
    assert history.overlaid(other) == other
    assert history.pictures("mine") == [other, path]  # the overlay is none of the session's pictures


def test_code_makes_the_same_request(page, tmp_path, monkeypatch):
    from mahlstick import cli

    photo = Image.open(REFERENCE).convert("RGB")
    request = Request(
        prompt='it\'s a $HOME "apple"',
        seed=3,
        width=64,
        height=64,
        controls=[{"adapter": "lineart", "image": photo, "annotator": "canny", "scale": 0.9}],
        image_prompts=[{"images": [photo], "scale": 0.5}],
    )
    kept = page.create._with_files("someone", request)
    made = []
    monkeypatch.setattr(ms, "generate", lambda found: made.append(found) or type("R", (), {"save": lambda *_: None})())
    exec(scripts.python(kept), {})
    assert made == [kept]

    import shlex

    monkeypatch.setattr("mahlstick.pipelines.generate.generate", lambda found, **_: made.append(found) or 1 / 0)
    line = scripts.command(kept)
    assert cli.main([*shlex.split(line)[1:-1], str(tmp_path)]) == 1
    assert made[1] == kept
    assert (
        scripts.command(kept.model_copy(update={"controls": [kept.controls[0].model_copy(update={"end": 0.5})]}))
        is None
    )


def test_a_job_is_stopped_within_a_step_and_leaves_the_model_as_it_was(jobs, tmp_path):
    kept = []
    request = Request(prompt="red apple", seed=1, steps=3, controls=[{"adapter": "lineart", "image": str(DRAWING)}])

    def made() -> bytes:
        job = jobs.submit(pictures(request, lambda result: kept.append(result.images[0].tobytes()) or []))
        job.future.result(60)
        assert job.step == job.total == 3 and job.preview is not None
        return kept[-1]

    first = made()
    long = jobs.submit(pictures(request.model_copy(update={"steps": 1000}), lambda result: []))
    waiting = jobs.submit(pictures(request, lambda result: []))
    deadline = time.monotonic() + 30
    while long.step < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert jobs.ahead(waiting) == 1
    waiting.cancel()
    long.cancel()
    for job in (long, waiting):
        with pytest.raises(Cancelled):
            job.future.result(10)
    assert long.step < 100 and waiting.step == 0
    assert made() == first


class Slow(Maker):
    """What takes long to begin, and holds the queue until it is let go."""

    errors, result = [], []

    def __init__(self, jobs, history, session):
        super().__init__(jobs, history, session)
        self.status, self.may_begin, self.may_end, self.began = gr.HTML(), Event(), Event(), []

    def begin(self, values, session, browser):
        assert self.may_begin.wait(10)
        return Begun(lambda job, loader, **_: self.began.append(job) or self.may_end.wait(10))

    def made(self, found, values, session, browser):
        return {self.status: "made"}


@pytest.fixture
def slow(jobs, tmp_path):
    with gr.Blocks():
        found = Slow(jobs, History(tmp_path), gr.BrowserState(None))
    yield found
    found.may_end.set()


def test_what_is_cancelled_before_it_is_in_the_queue_is_not_made(slow):
    async def last():
        shown = slow.make({slow._session: "me"}, None)
        await anext(shown)
        await slow.cancel_all("me")
        slow.may_begin.set()
        slow.may_end.set()
        then = slow.make({slow._session: "me"}, None)
        return [[each async for each in some][-1][slow.status] for some in (shown, then)]

    cancelled, next_one = asyncio.run(last())
    assert "Cancelled" in cancelled and next_one == "made" and len(slow.began) == 1


def test_what_waits_behind_others_is_cancelled_at_once(slow, jobs):
    slow.may_begin.set()
    before = jobs.submit(lambda job, loader, **_: slow.may_end.wait(30))

    async def last():
        shown = slow.make({slow._session: "me"}, None)
        while "Waiting" not in (await anext(shown))[slow.status]:
            pass
        await slow.cancel_all("me")
        return [each async for each in shown][-1][slow.status]

    assert "Cancelled" in asyncio.run(last()) and not before.future.done()
    slow.may_end.set()
    before.future.result(10)
    assert slow.began == []


def test_what_is_cancelled_while_it_waits_leaves_its_place_to_those_behind(jobs, monkeypatch):
    monkeypatch.setattr("mahlstick.page.jobs.WAITING_LIMIT", 3)
    may_end = Event()
    works, waits, last = [jobs.submit(lambda job, loader, **_: may_end.wait(30)) for _ in range(3)]
    assert [jobs.ahead(job) for job in (works, waits, last)] == [0, 1, 2]
    with pytest.raises(MahlstickError, match="too many"):
        jobs.submit(lambda job, loader, **_: None)
    waits.cancel()
    assert jobs.ahead(last) == 1
    new = jobs.submit(lambda job, loader, **_: None)
    assert jobs.ahead(new) == 2 and waits not in jobs._line

    async def seen():
        return [shown async for shown in status.watch(jobs, waits, None)]

    with pytest.raises(Cancelled):
        asyncio.run(seen())
    assert not waits.future.done()
    may_end.set()
    new.future.result(10)


def test_sessions_are_apart_and_are_found_again(tmp_path):
    history = History(tmp_path)
    pipe_free = type("Result", (), {"save": lambda self, folder: [_saved(folder)]})()
    path = history.add("mine", pipe_free)[0]
    assert History(tmp_path).pictures("mine") == [path]
    assert history.pictures("yours") == history.pictures("../" + path.parent.name) == history.pictures("") == []
    assert history.pictures("mine", "APPLE red") == [path] and history.pictures("mine", "pear") == []


def _saved(folder):
    return save_png(Image.new("RGB", (8, 8)), folder / "0001.png", {"parameters": "red apple\nSteps: 3"})


@pytest.fixture(scope="module")
def address(page):
    yield app.launch(page, port=None)
    page.close(verbose=False)


def test_the_named_endpoint(address):
    client = Client(address, verbose=False)
    for fields, sentence in (
        ({"prompt": "x", "init": "/etc/hostname"}, "init: give the picture as a data: URL"),
        ({"prompt": "x", "base": "/etc"}, "base: /etc is not offered on this page"),
        ({"prompt": "x", "steps": 0}, "steps: should be greater than or equal to 1"),
        ({"prompt": "x", "images": 500}, "images: at most 16"),
        (["red apple"], "request: is no JSON object"),
        ("red apple", "request: is no JSON object"),
        ({"prompt": "x", "controls": 5}, "controls: should be"),
        ({"prompt": "x", "controls": [5]}, r"controls\[0\]"),
    ):
        with pytest.raises(Exception, match=sentence):
            client.predict(fields, api_name="/generate")


def test_the_examples_in_the_docs_run(address, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("drawing.png").write_bytes(DRAWING.read_bytes())
    text = (Path(__file__).parents[1] / "docs" / "page.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)).replace("http://127.0.0.1:7860", address)
    exec(code, {})
    request = read_recipe(capsys.readouterr().out.split()[-1]).request
    assert request.prompt == "penguin" and len(request.controls) == 1


def test_each_of_many_clients_gets_its_own_result(address):
    control = {"adapter": "lineart", "image": data_url(Image.open(DRAWING))}
    clients = [Client(address, verbose=False) for _ in range(4)]

    def ask(seed: int) -> str:
        fields = {"prompt": "penguin", "seed": seed, "steps": 1, "width": 64, "height": 64, "controls": [control]}
        return clients[seed % 4].predict(fields, api_name="/generate")[0]

    with ThreadPoolExecutor(12) as threads:
        paths = list(threads.map(ask, range(12)))
    assert [read_recipe(path).request.seeds for path in paths] == [[seed] for seed in range(12)]
    assert len({Path(path).read_bytes() for path in paths}) == 12


def test_only_configured_folders_can_be_read_and_only_so_much_can_be_sent(address, page):
    mine = save_png(Image.new("RGB", (8, 8)), page.history.folder("me") / "0001.png")
    for path, code in ((mine, 200), ("/etc/hostname", 403), (Path("pyproject.toml").resolve(), 403)):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code == code, path
    upload = f"{address}gradio_api/upload"
    for size, code in ((1 << 20, 200), (33 << 20, 413)):
        assert httpx.post(upload, files={"files": ("a.png", b"0" * size)}).status_code == code
    told = HTTPConnection(address.removeprefix("http://").strip("/"))
    told.putrequest("POST", "/gradio_api/queue/join")
    told.putheader("content-length", str(300 << 20))
    told.endheaders()
    assert told.getresponse().status == 413


def test_a_body_is_counted_where_it_does_not_say_its_length():
    async def take(scope, receive, send):
        while (await receive())["more_body"]:
            pass

    async def pieces():
        return {"type": "http.request", "body": b"0" * 60, "more_body": True}

    with pytest.raises(HTTPException, match="at most"):
        asyncio.run(BodyLimit(take, most=100)({"type": "http", "headers": []}, pieces, None))


def test_nobody_enters_without_the_password_where_there_is_one(tmp_path):
    with gr.Blocks() as small:
        gr.Markdown("hello")
    small.history = History(tmp_path)
    address = app.launch(small, port=None, auth=("ann", "secret"))
    try:
        assert address.startswith("http://127.0.0.1:")
        assert httpx.get(f"{address}gradio_api/info").status_code == 401
        assert httpx.get(f"{address}gradio_api/file={tmp_path}").status_code == 401
        with pytest.raises(Exception, match=r"401|[Ll]ogin|credentials|authenticat"):
            Client(address, auth=("ann", "wrong"), verbose=False)
        assert Client(address, auth=("ann", "secret"), verbose=False)
    finally:
        small.close(verbose=False)
    with pytest.raises(MahlstickError, match="--auth: give user:password"):
        app.serve(auth="ann")


def test_the_network_is_listened_to_only_when_asked(monkeypatch):
    from mahlstick import cli

    hosts = []
    monkeypatch.setattr(app, "serve", lambda host, *_: hosts.append(host))
    assert cli.main(["app"]) == cli.main(["app", "--listen"]) == 0
    assert hosts == ["127.0.0.1", "0.0.0.0"]


def test_models_are_recognised_by_their_headers(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "whatever.safetensors").symlink_to(
        embedded_folder() / "controlnet-lineart" / "diffusion_pytorch_model.safetensors"
    )
    (tmp_path / "notes.safetensors").write_bytes(b"none")
    (tmp_path / "base").symlink_to(embedded_folder())
    models = Models(tmp_path)
    assert [shown for shown, _ in models.bases] == ["embedded", "base"]
    assert "sub/whatever.safetensors" in [shown for shown, _ in models.nets]
    with pytest.raises(MahlstickError, match="is not offered"):
        models.check(Request(prompt="x", base="/elsewhere"))
    with pytest.raises(MahlstickError, match="is no folder"):
        app.build(models=tmp_path / "absent")


def test_a_picture_that_names_files_of_this_machine_is_refused(page, tmp_path):
    photo = Image.new("RGB", (8, 8))
    photo.save(tmp_path / "secret.png")
    request = Request(prompt="x", seeds=[1], width=64, height=64, guidance=1.0, init=photo)
    recipe = describe(request, "cpu", torch.float32)
    doctored = recipe.model_copy(
        update={"request": recipe.request.model_copy(update={"init": str(tmp_path / "secret.png")})}
    )
    save_png(photo, tmp_path / "doctored.png", doctored.text())
    shown = page.create._restore_file(str(tmp_path / "doctored.png"), "someone", None)
    assert "init: give the picture as a data: URL" in shown[page.create.drop_error] and page.create.init not in shown
