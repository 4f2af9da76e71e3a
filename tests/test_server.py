"""The server, over real sockets: the cycle of ComfyUI's clients, and what must not get through."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from mahlstick import __version__
from mahlstick.nodes import folders, progress
from mahlstick.nodes.cache import MemoryCache
from mahlstick.nodes.schema import Hidden, NodeType, Returned, Socket, Widget, node
from mahlstick.nodes.server import Limits, build, sockets

PATIENCE = 10.0  # seconds

Picture = Annotated[Any, Socket("IMAGE")]


@node("test")
def Sketch(
    *, shade: Annotated[int, Widget(min=0, max=255)] = 100, steps: Annotated[int, Widget(optional=True)] = 4
) -> Picture:
    """A grey picture, and how it comes about."""
    for step in range(steps):
        progress.report(step + 1, steps, Image.new("RGB", (600, 300), (shade,) * 3))
    return Image.new("RGB", (32, 16), (shade,) * 3)


@node("test", is_output=True)
def Keep(*, image: Picture, id: Annotated[str, Hidden("UNIQUE_ID")]) -> Returned:
    """Saves it."""
    output = folders.current().output
    name = f"sketch_{len(list(output.iterdir())):05}_.png"
    image.save(output / name)
    return Returned(ui={"images": [{"filename": name, "subfolder": "", "type": "output"}], "node": [id]})


@node("test", is_output=True)
def Wait(
    *, seconds: Annotated[float, Widget(optional=True)] = 20.0, tells: Annotated[bool, Widget(optional=True)] = True
) -> Returned:
    """Does nothing, and may tell of it."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(0.005)
        if tells:
            progress.report(int(1000 * (seconds - left)), int(1000 * seconds))
    return Returned(ui={"odd": [float("nan"), Path("x"), {1: b"bytes"}]})


@node("test", is_output=True)
def Break(*, image: Picture | None = None) -> Returned:
    """Fails."""
    raise ValueError("the pencil broke")


@node("test", is_output=True)
def Spin() -> Returned:
    """Shows what no JSON can hold."""
    spin: list[Any] = []
    spin.append(spin)
    return Returned(ui={"spin": spin})


NODES = {each.name: each for each in (Sketch, Keep, Wait, Break, Spin)}


def sketch(shade: int = 100, **more: Any) -> dict[str, Any]:
    return {
        "1": {"class_type": "Sketch", "inputs": {"shade": shade}},
        "2": {"class_type": "Keep", "inputs": {"image": ["1", 0]}},
        **more,
    }


def wait(**inputs: Any) -> dict[str, Any]:
    return {"1": {"class_type": "Wait", "inputs": inputs}}


@dataclass
class Served:
    """A running server and a person's use of it."""

    host: str
    folders: folders.Folders
    http: httpx.Client

    def prompt(self, prompt: Any, **more: Any) -> str:
        """The id of a workflow that is sent."""
        answer = self.http.post("/prompt", json={"prompt": prompt, **more})
        assert answer.status_code == 200, answer.text
        assert set(answer.json()) == {"prompt_id", "number", "node_errors"}
        return answer.json()["prompt_id"]

    def socket(self, client: str, query: str = "", **options: Any) -> ClientConnection:
        return connect(f"ws://{self.host}/ws?clientId={client}{query}", **options)

    def history(self, id: str) -> dict[str, Any]:
        """What became of a job, as soon as it has ended."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            found = self.http.get(f"/history/{id}").json()
            if found:
                return found[id]
            time.sleep(0.01)
        raise TimeoutError(id)

    def until_runs(self, id: str) -> None:
        end = time.monotonic() + PATIENCE
        while [each[1] for each in self.queue()[0]] != [id]:
            assert time.monotonic() < end
            time.sleep(0.005)

    def queue(self) -> tuple[list[Any], list[Any]]:
        found = self.http.get("/queue").json()
        return found["queue_running"], found["queue_pending"]


@contextmanager
def served(root: Path, nodes: Mapping[str, NodeType] = NODES, **options: Any) -> Iterator[Served]:
    where = folders.Folders(root / "models", root / "input", root / "output", root / "temp")
    for each in (where.input, where.output):
        each.mkdir()
    app = build(nodes, folders=where, **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="on"))
    thread = Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + PATIENCE
        while not server.started:
            assert thread.is_alive() and time.monotonic() < end
            time.sleep(0.005)
        host = f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with httpx.Client(base_url=f"http://{host}", timeout=PATIENCE) as http:
            yield Served(host, where, http)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("studio"), limits=Limits(prompt=1 << 20, upload=1 << 20)) as running:
        yield running


@pytest.fixture
def client() -> str:
    return uuid.uuid4().hex


def heard(connection: ClientConnection, *until: str) -> list[Any]:
    """What comes until an event of these kinds, or else until ComfyUI's sign that a workflow has ended."""
    messages: list[Any] = []
    while True:
        message = connection.recv(timeout=PATIENCE)
        messages.append(message if isinstance(message, bytes) else json.loads(message))
        kind, data = (None, {}) if isinstance(message, bytes) else (messages[-1]["type"], messages[-1]["data"])
        if kind in until or (not until and kind == "executing" and data["node"] is None):
            return messages


def kinds(messages: list[Any], *but: str) -> list[str]:
    return [each["type"] for each in messages if not isinstance(each, bytes) and each["type"] not in but]


def png(shade: int = 100, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, (shade,) * len(mode)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_client_sends_a_workflow_follows_it_and_fetches_the_picture(studio: Served, client: str) -> None:
    """As ComfyUI's example scripts do."""
    with studio.socket(client) as connection:
        hello = json.loads(connection.recv())
        assert hello == {"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": client}}
        connection.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))
        assert json.loads(connection.recv()) == {"type": "feature_flags", "data": studio.http.get("/features").json()}
        connection.send("no JSON")  # is no reason to stop

        prompt = sketch(30)
        id = studio.prompt(prompt, client_id=client, extra_data={"extra_pnginfo": {"workflow": {"nodes": []}}})
        messages = heard(connection)
        entry = studio.history(id)

    told = [each for each in messages if not isinstance(each, bytes) and each["type"] != "status"]
    assert all(each["data"]["prompt_id"] == id for each in told)
    assert kinds(told, "progress") == [
        *("execution_start", "execution_cached", "executing", "executing", "executed", "execution_success", "executing")
    ]
    assert [each["data"]["node"] for each in told if each["type"] == "executing"] == ["1", "2", None]
    steps = [each["data"] for each in told if each["type"] == "progress"]
    assert [(each["value"], each["max"], each["node"]) for each in steps] == [(step, 4, "1") for step in (1, 2, 3, 4)]

    previews = [each for each in messages if isinstance(each, bytes)]
    assert previews
    for each in previews:
        assert struct.unpack(">II", each[:8]) == (1, 1)
        shown = Image.open(io.BytesIO(each[8:]))
        assert (shown.format, shown.size) == ("JPEG", (512, 256))
        assert abs(int(np.asarray(shown).mean()) - 30) <= 1

    assert entry["prompt"][1:3] == [id, prompt] and entry["prompt"][4] == ["2"]
    assert entry["prompt"][3]["client_id"] == client and entry["prompt"][3]["extra_pnginfo"] == {
        "workflow": {"nodes": []}
    }
    assert entry["status"]["status_str"] == "success" and entry["status"]["completed"]
    assert [each[0] for each in entry["status"]["messages"]] == [
        "execution_start",
        "execution_cached",
        "execution_success",
    ]
    assert all(each[1]["timestamp"] > 1.7e12 for each in entry["status"]["messages"])
    assert entry["meta"]["2"]["node_id"] == entry["meta"]["2"]["display_node"] == "2"
    (image,) = entry["outputs"]["2"]["images"]
    assert image in [each["data"]["output"]["images"][0] for each in told if each["type"] == "executed"]
    picture = studio.http.get("/view", params=image)
    assert picture.content == (studio.folders.output / image["filename"]).read_bytes()
    assert picture.headers["content-type"] == "image/png"
    assert studio.http.get("/api/view", params=image).content == picture.content
    assert studio.http.get(f"/api/history/{id}").json() == {id: entry}


@pytest.mark.parametrize(
    ("prompt", "kind", "node", "fault"),
    [
        (sketch(999), "prompt_outputs_failed_validation", "1", "value_bigger_than_max"),
        (
            {"2": {"class_type": "Keep", "inputs": {}}},
            "prompt_outputs_failed_validation",
            "2",
            "required_input_missing",
        ),
        ({"1": {"class_type": "Sketch", "inputs": {}}}, "prompt_no_outputs", None, None),
        ({}, "prompt_no_outputs", None, None),
    ],
)
def test_an_invalid_workflow_is_answered_as_comfyui_answers(
    studio: Served, prompt: Any, kind: str, node: str | None, fault: str | None
) -> None:
    answer = studio.http.post("/prompt", json={"prompt": prompt})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == kind
    assert set(answer.json()["error"]) == {"type", "message", "details", "extra_info"}
    if node is None:
        assert answer.json()["node_errors"] == {}
    else:
        told = answer.json()["node_errors"][node]
        assert told["class_type"] == prompt[node]["class_type"] and told["dependent_outputs"] == ["2"]
        assert [each["type"] for each in told["errors"]] == [fault]
    assert studio.queue() == ([], [])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"prompt": NaN}',
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": {}, "number": "first"}',
        b'{"prompt": {}, "number": ' + b"9" * 400 + b"}",
        b'{"prompt": {}, "extra_data": 1}',
        b'{"prompt": {}, "prompt_id": 7}',
        b'{"prompt": {}, "partial_execution_targets": 1}',
        b'{"prompt": {"1": {"class_type": "\\ud800", "inputs": {}}}}',
        b"\xff\xfe{",
    ],
    ids=range(13),
)
def test_what_is_no_workflow_gets_a_sentence(studio: Served, body: bytes) -> None:
    answer = studio.http.post("/prompt", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] and answer.json()["node_errors"] == {}
    assert "Traceback" not in answer.text


def test_clients_hear_of_their_own_jobs_only(studio: Served) -> None:
    mine, theirs = uuid.uuid4().hex, uuid.uuid4().hex
    with studio.socket(mine) as one, studio.socket(mine) as twin, studio.socket(theirs) as other:
        first = studio.prompt(sketch(1), client_id=mine)
        second = studio.prompt(sketch(2), client_id=theirs)
        heard_by = {"one": heard(one), "twin": heard(twin), "other": heard(other)}
    for name, id in (("one", first), ("twin", first), ("other", second)):
        told = [each for each in heard_by[name] if not isinstance(each, bytes)]
        assert {each["data"]["prompt_id"] for each in told if each["type"] != "status"} == {id}
        assert (
            max(each["data"]["status"]["exec_info"]["queue_remaining"] for each in told if each["type"] == "status")
            >= 1
        )


def test_a_client_that_comes_back_goes_on(studio: Served, client: str) -> None:
    with studio.socket(client) as connection:
        id = studio.prompt(wait(seconds=0.5), client_id=client)
        heard(connection, "progress")
    with studio.socket(client) as connection:
        messages = heard(connection)
    told = [each for each in messages if each["type"] == "executing"]
    assert [each["data"]["node"] for each in told] == ["1", None]
    assert {"progress", "execution_success"} <= set(kinds(messages))
    assert studio.history(id)["outputs"]["1"] == {"odd": [None, "x", {"1": "b'bytes'"}]}


@pytest.mark.parametrize("tells", [True, False])
def test_the_running_job_is_interrupted(studio: Served, client: str, tells: bool) -> None:
    """Within a node that reports progress, or behind one that does not."""
    prompt = wait(seconds=20.0 if tells else 0.3, tells=tells) | {
        "2": {"class_type": "Wait", "inputs": {"seconds": 20.0}}
    }
    with studio.socket(client) as connection:
        id = studio.prompt(prompt, client_id=client)
        heard(connection, "executing")
        studio.http.post("/interrupt", json={"prompt_id": "another"})
        assert not studio.http.get(f"/history/{id}").json()
        begun = time.monotonic()
        assert studio.http.post("/interrupt", json={"prompt_id": id} if tells else None).status_code == 200
        messages = heard(connection)
    assert time.monotonic() - begun < 5
    (told,) = (each["data"] for each in messages if each["type"] == "execution_interrupted")
    assert told["prompt_id"] == id and {"node_id", "node_type", "executed"} <= set(told)
    assert "execution_success" not in kinds(messages)
    status = studio.history(id)["status"]
    assert (status["status_str"], status["completed"]) == ("error", False)
    assert studio.history(studio.prompt(sketch(3)))["status"]["completed"]


def test_a_node_that_fails_is_told_and_the_next_job_runs(studio: Served, client: str) -> None:
    with studio.socket(client) as connection:
        id = studio.prompt(sketch(9, **{"3": {"class_type": "Break", "inputs": {"image": ["1", 0]}}}), client_id=client)
        messages = heard(connection)
    (told,) = (each["data"] for each in messages if not isinstance(each, bytes) and each["type"] == "execution_error")
    assert (told["node_id"], told["node_type"], told["exception_type"]) == ("3", "Break", "ValueError")
    assert "the pencil broke" in told["exception_message"]
    assert {"executed", "traceback", "current_inputs", "current_outputs"} <= set(told)
    status = studio.history(id)["status"]
    assert (status["status_str"], status["completed"]) == ("error", False)
    assert status["messages"][-1] == ["execution_error", told]
    assert studio.history(studio.prompt(sketch(4)))["status"]["completed"]


def test_what_a_node_shows_cannot_stop_the_server(studio: Served) -> None:
    entry = studio.history(studio.prompt({"1": {"class_type": "Spin", "inputs": {}}}))
    assert entry["status"]["status_str"] == "error"
    assert studio.history(studio.prompt(sketch(4)))["status"]["completed"]


def test_what_is_cached_does_not_run_again(tmp_path: Path, client: str) -> None:
    """Unless its file is gone, or memory was to be freed."""
    with served(tmp_path, cache=MemoryCache(1 << 20)) as running, running.socket(client) as connection:

        def run() -> tuple[list[str], list[str], Any]:
            id = running.prompt(sketch(), client_id=client)
            told = [each for each in heard(connection) if not isinstance(each, bytes)]
            (cached,) = (each["data"]["nodes"] for each in told if each["type"] == "execution_cached")
            ran = [each["data"]["node"] for each in told if each["type"] == "executing"]
            assert "executed" in kinds(told)
            return sorted(cached), ran, running.history(id)["outputs"]["2"]["images"][0]

        cached, ran, image = run()
        assert (cached, ran) == ([], ["1", "2", None])
        assert run() == (["1", "2"], [None], image)
        (running.folders.output / image["filename"]).unlink()
        assert run()[:2] == (["1"], ["2", None])
        assert running.http.post("/free", json={"free_memory": True}).status_code == 200
        assert run()[:2] == ([], ["1", "2", None])


def test_jobs_wait_in_order_and_can_be_taken_out(studio: Served) -> None:
    running = studio.prompt(wait())
    studio.until_runs(running)
    last, gone = studio.prompt(sketch(5)), studio.prompt(sketch(5), prompt_id=str(uuid.uuid4()))
    first = studio.prompt(sketch(5), front=True)
    named = studio.prompt(sketch(5), number=-1e9)
    assert [each[1] for each in studio.queue()[1]] == [named, first, last, gone]
    assert studio.http.get("/prompt").json() == {"exec_info": {"queue_remaining": 5}}

    assert studio.http.post("/queue", json={"delete": [gone, "unknown"]}).status_code == 200
    assert [each[1] for each in studio.queue()[1]] == [named, first, last]
    studio.http.post("/queue", json={"clear": True})
    assert [[each[1] for each in part] for part in studio.queue()] == [[running], []]
    studio.http.post("/interrupt")
    assert not studio.history(running)["status"]["completed"]
    assert not any(studio.http.get(f"/history/{id}").json() for id in (last, gone, first, named))
    assert studio.queue() == ([], [])


def test_only_the_targets_run(studio: Served) -> None:
    prompt = sketch(6, **{"3": {"class_type": "Break", "inputs": {}}})
    entry = studio.history(studio.prompt(prompt, partial_execution_targets=["2"]))
    assert entry["status"]["completed"] and set(entry["outputs"]) == {"2"} and entry["prompt"][4] == ["2"]


def test_the_history_has_pages_and_an_end(tmp_path: Path) -> None:
    with served(tmp_path, limits=Limits(history=4, waiting=2)) as running:

        def page(**query: int) -> list[str]:
            return list(running.http.get("/history", params=query).json())

        ids = [running.prompt(wait(seconds=0.0)) for _ in range(1)]
        running.history(ids[0])
        for _ in range(5):
            ids.append(running.prompt(wait(seconds=0.0)))
            running.history(ids[-1])
        ids = ids[2:]  # as the history forgets
        assert page() == page(max_items=9) == page(max_items=10**30) == ids
        assert page(max_items=2) == ids[2:] == page(offset=2)
        assert page(max_items=2, offset=1) == ids[1:3]
        assert page(max_items=2, offset=9) == page(max_items=0) == []
        assert running.http.get("/history?offset=x").status_code == 400
        running.http.post("/history", json={"delete": [ids[1]]})
        assert page() == [ids[0], *ids[2:]]
        running.http.post("/history", json={"clear": True})
        assert page() == []

        first = running.prompt(wait())
        running.until_runs(first)
        assert [running.prompt(wait()) for _ in range(2)]
        refused = running.http.post("/prompt", json={"prompt": wait()})
        assert refused.status_code == 400 and "2 jobs wait" in refused.json()["error"]["message"]


def test_pictures_are_uploaded(studio: Served) -> None:
    def upload(name: str, content: bytes, **form: str) -> Any:
        return studio.http.post("/upload/image", files={"image": (name, content)}, data=form).json()

    where = studio.folders.input
    assert upload("a.png", png(1)) == {"name": "a.png", "subfolder": "", "type": "input"}
    assert upload("a.png", png(1))["name"] == "a.png"
    assert upload("a.png", png(2))["name"] == "a (1).png"
    assert upload("a.png", png(3))["name"] == "a (2).png"
    assert upload("a.png", png(2))["name"] == "a (1).png"
    assert sorted(each.name for each in where.iterdir()) == ["a (1).png", "a (2).png", "a.png"]
    assert upload("a.png", png(4), overwrite="true")["name"] == "a.png"
    assert (where / "a.png").read_bytes() == png(4)
    assert upload("clip.mp4", b"frames")["name"] == "clip.mp4" and (where / "clip.mp4").read_bytes() == b"frames"
    told = upload("b.png", png(5), subfolder="deep/er", type="temp")
    assert told == {"name": "b.png", "subfolder": "deep/er", "type": "temp"}
    assert studio.http.get("/view", params={"filename": "b.png", **told}).content == png(5)


@pytest.mark.parametrize(
    ("name", "content", "form", "status"),
    [
        ("../out.png", png(), {}, 400),
        ("/tmp/out.png", png(), {}, 400),
        ("out.png", png(), {"subfolder": "../.."}, 400),
        ("out.png", png(), {"subfolder": "/tmp"}, 400),
        ("out.png", png(), {"type": "models"}, 400),
        ("out.png", b"no picture", {}, 400),
        ("out.png", png()[:50], {}, 400),
        ("out.html", png(), {}, 400),
        ("out.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", {}, 400),
        ("x" * 300 + ".png", png(), {}, 400),
        ("out.png", bytes(2 << 20), {}, 413),
    ],
    ids=range(11),
)
def test_what_is_no_picture_or_leads_outside_is_not_kept(
    studio: Served, name: str, content: bytes, form: dict[str, str], status: int
) -> None:
    before = sorted(studio.folders.input.parent.rglob("*"))
    answer = studio.http.post("/upload/image", files={"image": (name, content)}, data=form)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert sorted(studio.folders.input.parent.rglob("*")) == before


def test_a_mask_is_joined_to_its_picture(studio: Served) -> None:
    original = Image.new("RGB", (4, 2), (10, 20, 30))
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "{}")
    original.save(studio.folders.output / "face.png", pnginfo=text)
    mask = io.BytesIO()
    alpha = np.arange(8, dtype=np.uint8).reshape(2, 4)
    Image.fromarray(np.dstack([np.zeros((2, 4, 3), np.uint8), alpha])).save(mask, "PNG")

    def upload(content: bytes, **form: str) -> httpx.Response:
        return studio.http.post("/upload/mask", files={"image": ("masked.png", content)}, data=form)

    reference = {"filename": "face.png", "type": "output"}
    told = upload(mask.getvalue(), subfolder="clipspace", original_ref=json.dumps(reference)).json()
    assert told == {"name": "masked.png", "subfolder": "clipspace", "type": "input"}
    with Image.open(studio.folders.input / "clipspace" / "masked.png") as kept:
        pixels = np.asarray(kept)
        assert kept.text == {"workflow": "{}"}  # type: ignore[attr-defined]
    assert (pixels[..., :3] == (10, 20, 30)).all() and (pixels[..., 3] == alpha).all()

    assert upload(mask.getvalue()).status_code == 400
    assert upload(mask.getvalue(), original_ref="[]").status_code == 400
    clip = studio.http.post("/upload/mask", files={"image": ("m.mp4", b"x")}, data={"original_ref": "{}"})
    assert clip.status_code == 400 and "no picture" in clip.json()["error"]["message"]
    assert upload(png(), original_ref=json.dumps(reference)).status_code == 400  # of another size
    assert upload(mask.getvalue(), original_ref='{"filename": "../face.png"}').status_code == 400
    assert upload(mask.getvalue(), original_ref='{"filename": "nobody.png"}').status_code == 404


def test_pictures_are_viewed_and_nothing_else_is(studio: Served) -> None:
    output, secret = studio.folders.output, studio.folders.output.parent / "secret.png"
    secret.write_bytes(png())
    (output / "link.png").unlink(missing_ok=True)
    (output / "link.png").symlink_to(secret)
    (output / "page.html").write_text("<script>alert(1)</script>")
    Image.new("RGBA", (4, 4), (200, 100, 50, 128)).save(output / "half.png")

    def view(**query: str) -> httpx.Response:
        return studio.http.get("/view", params=query)

    def picture(**query: str) -> Image.Image:
        return Image.open(io.BytesIO(view(filename="half.png", **query).content))

    assert view(filename="half.png [output]", type="input").content == (output / "half.png").read_bytes()
    colours, alpha = picture(channel="rgb"), picture(channel="a")
    assert (colours.mode, colours.getpixel((0, 0))) == ("RGB", (200, 100, 50))
    assert (alpha.mode, alpha.getpixel((0, 0))) == ("RGBA", (0, 0, 0, 128))
    assert picture(channel="rgba").getpixel((0, 0)) == (200, 100, 50, 128)
    shown = picture(preview="webp;90")
    assert (shown.format, shown.mode) == ("WEBP", "RGBA")
    assert picture(preview="jpeg").format == "JPEG"
    assert picture(preview="jpeg;50", channel="a").format == "WEBP"
    assert picture(preview="webp;x", channel="rgb").mode == "RGB"

    page = view(filename="page.html")
    assert page.headers["content-type"] == "application/octet-stream"
    assert page.headers["content-disposition"].startswith("attachment")
    assert page.headers["x-content-type-options"] == "nosniff"
    assert view(filename="page.html", preview="webp").status_code == 400
    assert view(filename="nothing.png").status_code == 404
    for query in (
        {"filename": "../secret.png"},
        {"filename": str(secret)},
        {"filename": "secret.png", "subfolder": ".."},
        {"filename": "link.png"},
        {"filename": "half.png", "type": "models"},
        {"filename": "a\0b"},
        {"subfolder": ""},
    ):
        answer = view(**query)
        assert answer.status_code == 400 and answer.json()["error"]["message"], query
    assert view(filename="x" * 1000).status_code == 404


def test_what_the_server_says_of_itself(studio: Served) -> None:
    get = studio.http.get
    assert get("/object_info").json() == {name: json.loads(json.dumps(each.info)) for name, each in NODES.items()}
    assert get("/api/object_info/Sketch").json()["Sketch"]["input"]["required"]["shade"] == [
        "INT",
        {"default": 100, "min": 0, "max": 255},
    ]
    assert get("/object_info/Unknown").json() == {}

    models = studio.folders.models
    (models / "embeddings").mkdir(parents=True)
    weights = {"x": np.zeros(3, np.float32)}
    save_file(weights, models / "embeddings" / "bad-hands.safetensors", {"made_by": "a test"})
    save_file(weights, models / "embeddings" / "silent.safetensors")
    (models / "embeddings" / "torn.safetensors").write_bytes(b"\xff" * 100)
    assert get("/embeddings").json() == ["bad-hands", "silent", "torn"]
    assert {"checkpoints", "loras", "embeddings"} <= set(get("/models").json())
    assert get("/models/embeddings").json()[0] == "bad-hands.safetensors"
    assert get("/models/unknown").status_code == 404
    assert get("/view_metadata/embeddings?filename=bad-hands.safetensors").json() == {"made_by": "a test"}
    for query in ("embeddings?filename=silent.safetensors", "embeddings?filename=torn.safetensors", "embeddings", "x"):
        assert get(f"/view_metadata/{query}").status_code == 404
    assert get("/view_metadata/embeddings?filename=../../output/x.safetensors").status_code == 404

    stats = get("/system_stats").json()
    assert stats["system"]["comfyui_version"] == __version__
    assert {"os", "ram_total", "ram_free", "python_version", "pytorch_version", "argv"} <= set(stats["system"])
    for device in stats["devices"]:
        assert set(device) == {
            *("name", "type", "index", "vram_total", "vram_free", "torch_vram_total", "torch_vram_free")
        }
    assert get("/extensions").json() == []
    assert get("/features").json()["max_upload_size"] == 1 << 20
    assert __version__ in get("/").text and "token" not in get("/").headers.get("set-cookie", "")
    assert studio.http.post("/free", json={"unload_models": True, "free_memory": True}).status_code == 200
    unknown, wrong = get("/nowhere"), studio.http.delete("/queue")
    assert (unknown.status_code, wrong.status_code) == (404, 405)
    assert unknown.json()["error"]["type"] == "not_found"


def test_a_node_that_cannot_be_described_hides_no_other(tmp_path: Path) -> None:
    def choices() -> list[str]:
        raise OSError("the disk is gone")

    @node("test")
    def Choose(*, one: Annotated[str, Widget(choices=choices)]) -> str:
        return one

    with served(tmp_path, {"Choose": Choose, "Sketch": Sketch}) as running:
        assert list(running.http.get("/object_info").json()) == ["Sketch"]
        broken = running.http.post("/prompt", json={"prompt": {"1": {"class_type": "Choose", "inputs": {"one": "a"}}}})
        assert broken.status_code in (400, 500) and "Traceback" not in broken.text


def test_requests_from_other_sites_are_refused(studio: Served, client: str) -> None:
    port = studio.host.rpartition(":")[2]
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
        {"Origin": "http://[", "Host": studio.host},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"},  # DNS rebinding
        {"Host": f"evil.example:{port}"},
        {"Host": "["},
    ):
        for answer in (
            studio.http.get("/queue", headers=headers),
            studio.http.post("/prompt", json={"prompt": sketch()}, headers=headers),
        ):
            assert answer.status_code == 403 and answer.json()["error"]["type"] == "forbidden", headers
    with pytest.raises(InvalidStatus) as refused:
        studio.socket(client, origin="http://evil.example")  # type: ignore[arg-type]
    assert refused.value.response.status_code == 403
    for headers in (
        {"Origin": f"http://{studio.host}", "Sec-Fetch-Site": "same-origin"},
        {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"},
        {"Host": f"[::1]:{port}"},
        {"Host": "localhost", "Origin": "http://localhost:8188"},
    ):
        assert studio.http.get("/queue", headers=headers).status_code == 200, headers


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_a_request_is_refused(studio: Served, chunked: bool) -> None:
    body = json.dumps({"prompt": sketch(), "extra_data": {"x": "x" * (1 << 20)}}).encode()
    content = (body[at : at + 10_000] for at in range(0, len(body), 10_000)) if chunked else body
    answer = studio.http.post("/prompt", content=content)
    assert answer.status_code == 413 and "1,048,576" in answer.json()["error"]["message"]


def test_a_token_opens_the_server(tmp_path: Path, client: str) -> None:
    with served(tmp_path, token="open sesame") as running:
        for headers in ({}, {"Authorization": "Bearer shut"}, {"Authorization": "open sesame"}, {"Cookie": "x"}):
            answer = running.http.get("/queue", headers=headers)
            assert answer.status_code == 401 and "token" in answer.json()["error"]["message"]
        with pytest.raises(InvalidStatus):
            running.socket(client)
        known = {"Authorization": "Bearer open sesame"}
        assert running.http.get("/queue", headers={**known, "Host": "a.name"}).status_code == 200
        with running.socket(client, "&token=open%20sesame") as connection:
            assert json.loads(connection.recv())["data"]["sid"] == client

        page = running.http.get("/?token=open sesame")  # which sets a cookie
        assert page.status_code == 200 and "HttpOnly" in page.headers["set-cookie"]
        assert running.http.get("/queue").status_code == 200
        crossing = running.http.get("/queue", headers={"Origin": "http://evil.example"})
        assert crossing.status_code == 403


def test_serve_announces_itself_and_stops_when_interrupted() -> None:
    """Reached from elsewhere it makes a token; a job that runs and a client that listens hold it up no longer."""
    script = """
import time
from mahlstick.nodes import progress
from mahlstick.nodes.folders import Folders
from mahlstick.nodes.schema import Returned, node
from mahlstick.nodes.server import serve

@node("test", is_output=True)
def Wait() -> Returned:
    while True:
        time.sleep(0.01)
        progress.report(0, 1)

serve({"Wait": Wait}, folders=Folders(), host="0.0.0.0", port=0, token="")
"""
    process = subprocess.Popen(
        [sys.executable, "-uc", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        port, token = int(address.rpartition(":")[2].partition("/")[0]), address.partition("token=")[2]
        assert len(token) >= 24
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {token}"}) as http:
            assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 401
            with connect(f"ws://127.0.0.1:{port}/ws?clientId=me&token={token}") as connection:
                http.post("/prompt", json={"prompt": wait(), "client_id": "me"})
                heard(connection, "progress")
                begun = time.monotonic()
                process.send_signal(signal.SIGINT)
                assert process.wait(PATIENCE) == 0
        assert time.monotonic() - begun < 5
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_a_taken_port_is_told() -> None:
    from mahlstick.errors import MahlstickError
    from mahlstick.nodes.server import serve

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(MahlstickError, match="choose another"):
        serve(NODES, folders=folders.Folders(), port=taken.getsockname()[1], announce=lambda _: None)


def test_a_client_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_LINE", 50)

    class Stuck:
        sent = 0

        async def send_bytes(self, _: bytes) -> None:
            self.sent += 1
            await asyncio.Event().wait()

        send_text = send_bytes
        receive = asyncio.Event().wait

    async def run() -> int:
        line = sockets.Socket(Stuck())  # type: ignore[arg-type]
        listening = asyncio.create_task(line.listen(lambda _: None))
        for _ in range(100):
            line.say(b"a preview")
        await asyncio.sleep(0)
        waiting = line._line.qsize()
        assert not listening.done()
        for _ in range(100):
            line.say("progress")
        await asyncio.wait_for(listening, PATIENCE)
        return waiting

    assert asyncio.run(run()) < 10
