"""The page without a browser: what is on the screen and a request are the same, jobs stop, sessions are apart."""

from __future__ import annotations

import threading
import time

import pytest
from gradio_client import Client
from PIL import Image

import mahlstick as ms
from mahlstick import annotators
from mahlstick.errors import MahlstickError
from mahlstick.page import app, canvas, scripts
from mahlstick.page.create import Create
from mahlstick.page.history import History
from mahlstick.page.jobs import Cancelled, Jobs, pictures
from mahlstick.page.models import Models
from mahlstick.page.units import SLIDERS, _shown_options
from mahlstick.pipelines.load import embedded_folder
from mahlstick.pipelines.recipe import read_recipe
from mahlstick.pipelines.request import Request, open_picture

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


def on_the_screen(create: Create, updates: dict, folder) -> dict:
    """What the server is told after the browser has shown the updates."""
    values = {field: field.value for field in create.fields}
    for field, update in updates.items():
        is_update = isinstance(update, dict) and update.get("__type__") == "update"
        values[field] = update.get("value", values.get(field)) if is_update else update
    for unit in create.image_prompts:
        paths = [folder / f"{unit.number}-{i}.png" for i, _ in enumerate(values[unit.pictures] or [])]
        for path, picture in zip(paths, values[unit.pictures] or [], strict=True):
            picture.save(path)
        values[unit.pictures] = [(str(path), None) for path in paths]
        if values[unit.negative] is not None:
            values[unit.negative].save(folder / "negative.png")
            values[unit.negative] = str(folder / "negative.png")
    return values


def test_every_setting_comes_back(page, tmp_path):
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
    values = on_the_screen(page.create, page.create.write(request), tmp_path)
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
    assert canvas.flattened({"background": empty, "layers": [empty], "composite": None}) is None
    assert canvas.flattened(None) is None and canvas.painted(None) is None
    drawn = canvas.flattened({"background": None, "layers": [stroke], "composite": None})
    assert drawn.getpixel((5, 5)) == (0, 0, 0) and drawn.getpixel((20, 20)) == (255, 255, 255)
    assert canvas.painted({"background": None, "layers": [stroke]}).getbbox() == (4, 4, 8, 8)


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


def test_sessions_are_apart_and_are_found_again(tmp_path):
    history = History(tmp_path)
    pipe_free = type("Result", (), {"save": lambda self, folder: [_saved(folder)]})()
    path = history.add("mine", pipe_free)[0]
    assert History(tmp_path).pictures("mine") == [path]
    assert history.pictures("yours") == history.pictures("../" + path.parent.name) == history.pictures("") == []
    assert history.pictures("mine", "APPLE red") == [path] and history.pictures("mine", "pear") == []


def _saved(folder):
    from mahlstick.pictures import save_png

    return save_png(Image.new("RGB", (8, 8)), folder / "0001.png", {"parameters": "red apple\nSteps: 3"})


def test_the_named_endpoint(page):
    address = app.launch(page, port=None)
    client = Client(address, verbose=False)
    request = Request(
        prompt="penguin", seed=4, steps=2, controls=[{"adapter": "lineart", "image": open_picture(str(DRAWING), "")}]
    )
    results = {}
    threads = [
        threading.Thread(target=lambda seed=seed: results.update({seed: _asked(address, request, seed)}))
        for seed in (4, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed, path in results.items():  # each its own
        assert read_recipe(path).request.seeds == [seed]
    for fields, sentence in (
        ({"prompt": "x", "init": "/etc/hostname"}, "init: give the picture as a data: URL"),
        ({"prompt": "x", "base": "/etc"}, "base: /etc is not offered on this page"),
        ({"prompt": "x", "steps": 0}, "steps: should be greater than or equal to 1"),
        ({"prompt": "x", "images": 500}, "images: at most 16"),
    ):
        with pytest.raises(Exception, match=sentence):
            client.predict(fields, api_name="/generate")
    page.close(verbose=False)


def _asked(address: str, request: Request, seed: int) -> str:
    import json

    fields = json.loads(request.to_json())
    return Client(address, verbose=False).predict(fields | {"seed": seed}, api_name="/generate")[0]


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
