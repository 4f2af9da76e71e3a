"""The page's clips without a browser."""

from __future__ import annotations

import asyncio
import time

import diffusers
import pytest
import torch
from gradio_client import Client, handle_file
from PIL import Image

import mahlstick as ms
from mahlstick.errors import MahlstickError
from mahlstick.page import app
from mahlstick.page.animate import FRAMES, KIND, _limited, clip, clip_request, travel
from mahlstick.page.jobs import Cancelled
from mahlstick.pipelines.load import embedded_folder
from mahlstick.pipelines.request import VideoRequest, data_url
from mahlstick.pipelines.video import VideoWriter, video_info


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A folder of models with a motion module for the embedded UNet, which mixes the frames a little."""
    folder = tmp_path_factory.mktemp("models")
    unet = diffusers.UNet2DConditionModel.from_pretrained(embedded_folder() / "unet")
    torch.manual_seed(6)
    made = ms.MotionAdapter.from_unet(unet, max_frames=8, heads=2)
    for name, parameter in made.named_parameters():
        if "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    made.save_pretrained(folder / "sway")
    return folder


@pytest.fixture(scope="module")
def page(module, tmp_path_factory):
    built = app.build(models=module, out=tmp_path_factory.mktemp("out"), device="cpu")
    yield built
    built.jobs.close()


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """Six frames of a square that moves."""
    path = tmp_path_factory.mktemp("clips") / "walk.mp4"
    with VideoWriter(path, 8, (64, 64)) as writer:
        for frame in range(6):
            picture = Image.new("RGB", (64, 64), "navy")
            picture.paste("orange", (8 * frame, 20, 8 * frame + 16, 40))
            writer.write(picture)
    return path


def screen(page, session="someone", **given):
    """What the server is told."""
    animate = page.animate
    values = {field: field.value for field in animate.fields}
    values |= {animate._session: session, animate.steps: 2, animate.frames: 3, animate.seed: 3, animate.prompt: "fox"}
    return values | {getattr(animate, name): value for name, value in given.items()}


def run(page, values):
    """The last that the browser is shown of each component."""

    async def collect():
        shown = {}
        async for updates in page.animate.make(values, None):
            shown |= updates
        return shown

    return asyncio.run(collect())


def shown_again(values, updates):
    """The values after the browser has shown the updates."""
    plain = {
        field: update.get("value", values.get(field)) if isinstance(update, dict) and "__type__" in update else update
        for field, update in updates.items()
    }
    return values | plain


def test_a_clip_is_made_shown_and_its_settings_come_back(page, walk, tmp_path):
    animate = page.animate
    assert "sway" in [name for name, _ in animate.motion.choices]
    values = screen(
        page,
        format="gif",
        travel="2: an owl\n\n1\uff1aa cat",
        negative="blue",
        motion_scale=0.5,
        control=str(walk),
        annotator="canny",
        control_end=0.5,
        init=str(walk),
        strength=0.9,
        context=2,
        overlap=1,
    )
    shown = run(page, values)
    assert shown[animate.status] == "" and not any(shown[line] for line in animate.errors)
    (saved,) = page.history.others("someone", KIND)
    assert saved.suffix == ".gif" and video_info(saved).frames == 3
    assert shown[animate.picture]["value"] == str(saved) and shown[animate.picture]["visible"]
    assert not shown[animate.video]["visible"] and shown[animate.strip]["value"].width > 3 * 96
    assert "consistency" in shown[animate.figures] and "seam" in shown[animate.figures]
    assert not page.animate.enter("another", None)[animate.clips]["visible"], "one does not see another's"

    kept = clip_request(saved)
    assert kept.prompts == {1: "a cat", 2: "an owl"} and kept.motion_scale == 0.5 and kept.context == 2
    elsewhere = tmp_path / "clip.gif"
    elsewhere.write_bytes(saved.read_bytes())
    back = animate._restore_file(str(elsewhere), "another", None)
    assert "The settings of this clip are back" in back[animate.status]
    read = animate.read(shown_again(screen(page), back))
    left_open = {"width", "height", "guidance", "frames", "fps", "audio"}
    assert read.model_dump(exclude=left_open) == animate.read(values).model_dump(exclude=left_open)
    assert kept.model_dump(exclude={"audio"}) == read.model_dump(exclude={"audio"})


@pytest.mark.parametrize(
    "given, line, sentence",
    [
        ({"travel": "1: a cat\nan owl"}, "travel_error", "line 2: 'an owl' is no change of words; write a frame"),
        ({"travel": "9: an owl"}, "travel_error", "frame 9 is none of the clip's"),
        ({"context": 1}, "context_error", "context: should be greater than or equal to 2"),
        ({"prompt": ""}, "error", "Say what to paint first."),
        ({"motion": "elsewhere"}, "error", "motion: elsewhere is not offered on this page; choose one of: "),
        ({"frames": FRAMES + 1}, "error", f"ask for at most {FRAMES}"),
        ({"init": "WALK", "strength": 0.05}, "init_error", "leaves no step"),
        ({"init": "WALK", "frames": 60}, "init_error", "walk.mp4 has 6 frames"),
        ({"control": "WALK", "control_start": 1.0}, "control_error", "is not before end"),
        ({"control": "BROKEN"}, "control_error", "broken.mp4"),
    ],
)
def test_a_fault_is_told_beside_its_field(page, walk, tmp_path, given, line, sentence):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    files = {"WALK": str(walk), "BROKEN": str(broken)}
    shown = run(page, screen(page, "faulty", **{name: files.get(value, value) for name, value in given.items()}))
    told = {found: text for found, text in shown.items() if found in page.animate.errors and text}
    assert list(told) == [getattr(page.animate, line)]
    (text,) = told.values()
    assert sentence in text.replace("&#x27;", "'") and "/" not in text.replace("</p>", "")
    assert page.history.others("faulty", KIND) == []


def test_a_clip_is_cancelled_within_a_step_and_leaves_nothing(page):
    request = VideoRequest(prompt="fox", frames=3, steps=900, seed=1, motion=page.animate._models.motions[0][1])
    job = page.jobs.submit(clip(request, page.history, "hasty", "mp4"), "hasty clips")
    deadline = time.monotonic() + 120
    while job.step < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert job.total == 900 and job.preview.width > 2 * 96
    page.jobs.cancel("hasty clips")
    with pytest.raises(Cancelled):
        job.future.result(60)
    folder = page.history.folder("hasty")
    assert not folder.exists() or [*folder.rglob("*.*")] == []


def test_what_the_net_sees_of_a_video(page, walk, tmp_path):
    plain, edges = (page.animate._see(str(walk), annotator, None)[0]["value"] for annotator in ("", "canny"))
    assert plain.size == edges.size and plain.tobytes() != edges.tobytes()
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    picture, sentence = page.animate._see(str(tmp_path / "bad.mp4"), "", None)
    assert not picture["visible"] and "bad.mp4" in sentence and str(tmp_path) not in sentence


def test_a_clip_cannot_name_files_of_this_machine(page, walk, tmp_path):
    secret = str(walk)  # any file that the page did not get
    request = VideoRequest(
        prompt="fox",
        init=secret,
        motion=page.animate._models.motions[0][1],
        controls=[{"adapter": "lineart", "image": secret}],
        free_init=0,
        schedule="looped",
    )
    with VideoWriter(tmp_path / "doctored.gif", 8, (16, 16), comment=request.to_json()) as writer:
        for _ in range(2):
            writer.write(Image.new("RGB", (16, 16)))
    back = page.animate._restore_file(str(tmp_path / "doctored.gif"), "someone", None)
    assert back[page.animate.init] is None and back[page.animate.control] is None
    assert "schedule, init, controls" in back[page.animate.status]
    alien = back | page.animate._restore_file(str(walk), "someone", None)
    assert "walk.mp4: holds no recipe" in alien[page.animate.drop_error]


def test_pictures_of_a_clip_are_counted_and_no_video_is_sought_in_them():
    picture = data_url(Image.effect_noise((128, 128), 50))
    one = VideoRequest(prompt="fox", controls=[{"adapter": "lineart", "image": picture}])
    assert _limited(one) is one


def test_a_clip_whose_net_is_not_offered_comes_back_without_it(page, walk):
    kept = str(page.history.keep_video(walk))
    requests = [VideoRequest(prompt="fox", controls=[{"adapter": net, "image": kept}]) for net in ("lineart", "/net")]
    assert [page.animate.lost(request, page.animate._models) for request in requests] == [[], ["controls"]]
    assert page.animate.write(requests[1], page.animate._models)[page.animate.control] is None


def test_what_a_session_trained_brings_the_tab_and_is_chosen(module, tmp_path, monkeypatch):
    monkeypatch.setattr("mahlstick.page.models.embedded_adapters", dict)
    built = app.build(out=tmp_path, device="cpu")
    animate, results = built.animate, built.history.results("trainer")
    results.mkdir(parents=True)
    (results / "mine").symlink_to(module / "sway")
    seen = built.train.enter("trainer", None)
    assert not animate._tab.visible and seen[animate._tab]["visible"]
    assert not built.train.enter("another", None)[animate._tab]["visible"]
    opened = animate._open("trainer", None)[animate.motion]
    assert opened["value"] == str(results / "mine") and [name for name, _ in opened["choices"]] == ["mine"]
    assert animate._open("trainer", "sway")[animate.motion]["value"] == "sway"
    values = screen(built, "trainer", motion=opened["value"])
    animate.begin(values, "trainer", None)
    with pytest.raises(MahlstickError, match="is not offered on this page"):
        animate.begin(values, "another", None)
    built.train.close()
    built.jobs.close()


def test_words_that_change():
    assert travel(" 0: a\n16\uff1ab: c\n\n") == {0: "a", 16: "b: c"}
    for wrong in ("x: a", "5", "5:", "-1: a"):
        with pytest.raises(MahlstickError, match="prompt travel, line 2"):
            travel(f"0: a\n{wrong}")


def test_the_named_endpoint(page, walk):
    client = Client(app.launch(page, port=None), verbose=False)
    request = {"prompt": "fox", "seed": 4, "steps": 1, "frames": 2, "motion": page.animate._models.motions[0][1]}
    made = client.predict(request | {"controls": [{"adapter": "lineart", "annotator": "canny", "image": "data:"}]},
                          None, handle_file(walk), "webp", api_name="/animate")  # fmt: skip
    assert video_info(made).frames == 2
    for changed, sentence in (
        ({"init": "/etc/hostname"}, "init: give the picture as a data: URL"),
        ({"motion": "/etc"}, "motion: /etc is not offered"),
        ({"audio": "/etc/hostname"}, "audio: is not for this page"),
        ({"motion_loras": [{"path": "/etc"}]}, "motion_loras: is not for this page"),
    ):
        with pytest.raises(Exception, match=sentence):
            client.predict(request | changed, None, None, "mp4", api_name="/animate")
    for wrong, sentence in (([1], "request: is no JSON object"), (request | {"controls": [5]}, r"controls\[0\]")):
        with pytest.raises(Exception, match=sentence):
            client.predict(wrong, None, handle_file(walk), "mp4", api_name="/animate")
    page.close(verbose=False)
