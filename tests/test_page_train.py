"""Training from the page: what may be learned from, and a run that is begun, stopped, found again and finished."""

from __future__ import annotations

import io
import json
import signal
import stat
import time
import zipfile
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import gradio as gr
import psutil
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from benchmarks import tiny
from mahlstick.errors import MahlstickError
from mahlstick.page import datasets
from mahlstick.page.history import History
from mahlstick.page.jobs import WAITING_LIMIT, Cancelled, Jobs
from mahlstick.page.models import Models, trained
from mahlstick.page.runs import TAIL, Run, runs
from mahlstick.page.train import Train
from mahlstick.training.checkpoint import Checkpoints
from mahlstick.training.config import TrainConfig

PATIENCE = 300  # seconds


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "shapes").mkdir()
    for i in range(4):
        (folder / "shapes" / f"{i}.png").write_bytes(shape(i))
        (folder / "shapes" / f"{i}.txt").write_text("a round thing\n")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.quiet(StableDiffusionPipeline(**tiny.components("sd1"))).save_pretrained(folder / "tiny")
    return folder


class Nets:
    """A tab on which control nets are chosen."""

    def __init__(self) -> None:
        self.chooser = gr.Dropdown([])
        self.choosers = [self.chooser]

    def offer(self, models: Models) -> dict[Any, Any]:
        return {self.chooser: gr.update(choices=models.nets)}


@pytest.fixture(scope="module")
def tab(pictures: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    jobs, history = Jobs(device="cpu"), History(tmp_path_factory.mktemp("sessions"))
    with gr.Blocks():
        found = Train(Models(models), jobs, history, gr.BrowserState(None), pictures, "cpu", [Nets()])
    yield found
    found.close()
    jobs.close()


@pytest.fixture
def me() -> str:
    """A session of one's own."""
    return History.new_session()


def shape(i: int) -> bytes:
    picture, buffer = Image.new("RGB", (tiny.SIZE, tiny.SIZE), "white"), io.BytesIO()
    ImageDraw.Draw(picture).ellipse((2 * i, 2 * i, 2 * i + 30, 2 * i + 30), fill=(60 * i, 90, 200 - 40 * i))
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def values(tab: Train, session: str, **changes: Any) -> dict[Any, Any]:
    """What the browser sends: what it was shown, but for ``changes``."""
    own = {name: getattr(tab, name) for name in ("task", "data", "control", "reference", "annotator", "name", "base")}
    own |= {name: getattr(tab, name) for name in ("steps", "batch", "rate", "resolution")} | tab.more
    assert changes.keys() <= own.keys()
    shown = {component: changes.get(name, component.value) for name, component in own.items()}
    return {**shown, tab._session: session}


def start(tab: Train, session: str, **changes: Any) -> dict[Any, Any]:
    import asyncio

    return asyncio.run(tab._start(values(tab, session, **changes), None))  # type: ignore[arg-type]


def settings(tab: Train, **changes: Any) -> dict[str, Any]:
    base = dict(tab._models.bases)["tiny"]
    fields = {"data": "shapes", "name": "my-net", "base": base, "batch": 1, "resolution": tiny.SIZE}
    return {**fields, "validate_every": 0, "log_every": 1, **changes}


def until(happened: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_is_begun_stopped_found_again_and_finished(tab: Train, me: str) -> None:
    run = Run(tab._history.results(me), "my-net")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it runs in the background
    try:
        begun = start(tab, me, **settings(tab, steps=2000, checkpoint_every=2000))
        until(lambda: run.state == "running")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not any(begun.get(line) for line in tab._errors), begun
    until(lambda: run.step >= 2)
    view = tab._view(me, "my-net", None)  # type: ignore[arg-type]
    assert "Step" in view[tab.status] and "2000" in view[tab.status] and "about " in view[tab.status]
    assert view[tab.stop]["visible"] and not view[tab.resume]["visible"]
    assert list(view[tab.loss]["value"]["measure"].unique()) == ["loss"]
    again = start(tab, me, **settings(tab, name="other"))
    assert "is at work" in again[tab.error]

    tab._stop(me, "my-net", None)  # type: ignore[arg-type]
    until(lambda: run.state == "stopped")
    step = run.step
    assert not trained(run.folder)
    assert step <= Checkpoints(run.out / "checkpoints", 2).newest() <= step + 1  # the step that was under way
    with gr.Blocks():  # the page begun anew
        other = Train(tab._models, tab._jobs, tab._history, gr.BrowserState(None), tab._data, "cpu")
    shown = other.enter(me, None)  # type: ignore[arg-type]
    assert f"Stopped at step {step}" in shown[other.status] and shown[other.resume]["visible"]
    assert other.run not in other.enter("yours", None)  # type: ignore[arg-type]
    other.close()

    path = run.folder / ".runs" / "my-net.config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": step + 1}))  # a run may be made shorter
    tab._resume(me, "my-net", None)  # type: ignore[arg-type]
    until(lambda: not run.is_live)
    assert run.state == "done", run.reason()
    done = tab._view(me, "my-net", None)  # type: ignore[arg-type]
    assert any(name.endswith(".safetensors") for name in done[tab.result]["value"])
    net = tab._others[0].chooser
    assert "my-net" in [shown for shown, _ in done[net]["choices"]]
    assert "my-net" not in [shown for shown, _ in tab.enter("yours", None)[net]["choices"]]  # type: ignore[arg-type]


def test_a_run_that_fails_says_why(tab: Train, pictures: Path, me: str) -> None:
    run = Run(tab._history.results(me), "bad")
    run.begin(TrainConfig(task="controlnet", data=str(pictures), out=str(run.out), annotator="canny"))
    tab._submit(run, me)
    until(lambda: "process" in run._kept())
    psutil.Process(run._kept()["process"]["pid"]).kill()
    until(lambda: not run.is_live)
    assert "was killed (signal 9)" in tab._view(me, "bad", None)[tab.status]  # type: ignore[arg-type]
    run._keep("failed", code=2)
    run._beside("log").write_text(f"encoding: 10%\rmahlstick: {run.out}/x: cannot be read\n")
    assert "It failed: bad/x: cannot be read" in tab._view(me, "bad", None)[tab.status]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "line", "sentence"),
    [
        ({"data": None}, "data_error", "Choose a folder"),
        ({"data": "../elsewhere"}, "data_error", "Choose a folder"),
        ({"task": "motion"}, "data_error", "shapes holds pictures; put the frames of each clip into a subfolder"),
        ({"name": "../my-net"}, "name_error", "Give the result a name"),
        ({"base": "/etc"}, "name_error", "is not offered"),
        ({"task": "qformer", "momentum": 1.5}, "more_error", "momentum: should be less than 1"),
        ({"steps": 0}, "error", "steps: should be greater than or equal to 1"),
        ({"ema": 2.0}, "more_error", "ema: should be less than 1"),
        ({"annotator_options": "model=/etc"}, "more_error", "give NAME=VALUE"),
    ],
)
def test_a_fault_is_said_beside_its_field(
    tab: Train, changes: dict[str, Any], line: str, sentence: str, me: str
) -> None:
    said = start(tab, me, **settings(tab, **changes))
    assert sentence.replace(">", "&gt;") in said[getattr(tab, line)].replace("&#x27;", "")
    assert runs(tab._history.results(me)) == []


def test_every_setting_that_names_no_file_is_there_with_its_description(tab: Train) -> None:
    listed = {
        name for name, component in tab.more.items() if component.info == TrainConfig.model_fields[name].description
    }
    assert listed == set(tab.more) >= {"ema", "optimiser", "precision", "seed", "min_snr", "rank", "frames", "compile"}
    assert not listed & {"out", "cache", "start", "image_encoder", "data", "control", "reference"}


def test_an_archive_gives_its_pictures_and_captions_and_nothing_else(tab: Train, tmp_path: Path, me: str) -> None:
    entries = {
        "my/0.png": shape(0),
        "my/0.txt": b"round",
        "my/run.py": b"1",
        "__MACOSX/my/0.png": b"",
        "my/.x.png": b"",
    }
    found = tab._unpack(str(packed(tmp_path / "my set.zip", entries)), me, None)  # type: ignore[arg-type]
    assert found[tab.data]["value"] == "my-set" and "2 files, 3 left out" in found[tab.data_note]
    folder = tab._all_data(me)["my-set"]
    assert sorted(path.name for path in folder.iterdir()) == ["0.png", "0.txt"]
    assert "my-set" not in tab._all_data("yours")


def packed(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"../out.png": b"x"}, "leads outside"),
        ({"/tmp/out.png": b"x"}, "leads outside"),
        ({"a\\..\\..\\out.png": b"x"}, "leads outside"),
        ({"metadata.jsonl": b'{"file_name": "../../secret.png"}'}, "leads outside"),
        ({"metadata.jsonl": '{"file_name": "../../secret.png", "text": "a\u2028b"}'.encode()}, "leads outside"),
        ({"metadata.jsonl": '\ufeff{"file_name": "../../secret.png"}'.encode()}, "leads outside"),
        ({"metadata.jsonl": b'{"file_name": "a\\u0000.png"}'}, "leads outside"),
        ({"metadata.jsonl": b"nonsense"}, "is not JSON"),
        ({".": b"x", "a.png": b"x", "a.png/b.png": b"x"}, "bad.zip: cannot be unpacked"),
        ({f"{i}.png": b"" for i in range(4)}, "holds 4 files"),
        ({"a.png": b"0" * 2000}, "holds more than"),
    ],
)
def test_an_archive_that_would_do_harm_leaves_nothing(tmp_path: Path, entries: dict[str, bytes], sentence: str) -> None:
    archive = packed(tmp_path / "bad.zip", entries)
    with pytest.raises(MahlstickError, match=sentence) as told:
        datasets.unpack(archive, tmp_path / "home", most_files=3, most_bytes=1000)
    assert str(told.value).count("bad.zip") == 1 and str(tmp_path) not in str(told.value)
    assert set(tmp_path.rglob("*")) == {archive, tmp_path / "home"}


def test_no_zip_and_links_in_one_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("nothing")
    with pytest.raises(MahlstickError, match=r"text\.zip: cannot be unpacked"):
        datasets.unpack(tmp_path / "text.zip", tmp_path / "home")
    torn = bytearray(packed(tmp_path / "torn.zip", {"a.txt": b"words, and words again " * 50}).read_bytes())
    torn[35:45] = b"\xff" * 10
    (tmp_path / "torn.zip").write_bytes(torn)
    with pytest.raises(MahlstickError, match=r"torn\.zip: cannot be unpacked") as told:
        datasets.unpack(tmp_path / "torn.zip", tmp_path / "home")
    assert str(tmp_path) not in str(told.value)
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/hostname")
        archive.writestr("a.png", shape(0))
    folder, left = datasets.unpack(tmp_path / "link.zip", tmp_path / "home")
    assert left == 1 and [path.name for path in folder.iterdir()] == ["a.png"]


def test_folders_are_those_below_the_configured_one(pictures: Path) -> None:
    (pictures / ".hidden").mkdir(exist_ok=True)
    assert list(datasets.folders(pictures)) == [f"{pictures.name}/", "shapes"] and datasets.folders(None) == {}


def test_a_run_that_waits_and_is_stopped_never_begins(tab: Train, tmp_path: Path, me: str) -> None:
    blocked, gate = tab._jobs.submit(lambda job, loader, **_: _hold(job)), Run(tab._history.results(me), "late")
    gate.begin(TrainConfig(task="controlnet", data=str(tmp_path), out=str(gate.out), annotator="canny"))
    tab._submit(gate, me)
    assert gate.state == "waiting" and "Waiting" in tab._view(me, "late", None)[tab.status]  # type: ignore[arg-type]
    tab._stop(me, "late", None)  # type: ignore[arg-type]
    assert gate.state == "stopped" and not gate.out.exists()
    blocked.cancel()
    with pytest.raises(Cancelled):
        blocked.future.result(PATIENCE)


def _hold(job: Any) -> None:
    while True:
        job.tell(0, 1)
        time.sleep(0.01)


def test_a_run_that_found_no_place_in_the_queue_can_be_begun_again(tab: Train, tmp_path: Path, me: str) -> None:
    run = Run(tab._history.results(me), "refused")
    run.begin(TrainConfig(task="controlnet", data=str(tmp_path), out=str(run.out), annotator="canny"))
    blocked = tab._jobs.submit(lambda job, loader, **_: _hold(job))
    waiting = [tab._jobs.submit(lambda job, loader, **_: None) for _ in range(WAITING_LIMIT - 1)]
    with pytest.raises(MahlstickError, match="try again"):
        tab._submit(run, me)
    assert run.state == "stopped"
    for job in (blocked, *waiting):
        job.cancel()
    wait([job.future for job in (blocked, *waiting)], PATIENCE)


def test_a_run_is_removed_for_good_but_not_while_it_is_at_work(tab: Train, tmp_path: Path, me: str) -> None:
    run, longer = (Run(tab._history.results(me), name) for name in ("mine", "mine.log"))
    for each in (longer, run):
        each.begin(TrainConfig(task="controlnet", data=str(tmp_path), out=str(each.out), annotator="canny"))
        (each.out / "checkpoints").mkdir(parents=True)
        each._keep("stopped")
    assert tab._view(me, "mine", None)[tab.remove_run.ask]["visible"]  # type: ignore[arg-type]
    run.wait()
    assert not tab._view(me, "mine", None)[tab.remove_run.ask]["visible"]  # type: ignore[arg-type]
    assert "mine is at work" in tab._remove_run(me, "mine", None)[tab.error]  # type: ignore[arg-type]
    run.leave()
    shown = tab._remove_run("yours", "mine", None)  # type: ignore[arg-type]
    assert runs(run.folder) and shown[tab.run]["value"] is None
    shown = tab._remove_run(me, "mine", None)  # type: ignore[arg-type]
    assert shown[tab.run]["value"] == "mine.log" and runs(run.folder) == [longer] and longer.out.is_dir()
    assert [path for path in run.folder.rglob("mine*") if not path.name.startswith("mine.log")] == []


def test_a_step_is_read_from_the_end_of_a_long_log_whose_last_line_is_being_written(tmp_path: Path) -> None:
    run = Run(tmp_path, "long")
    assert run.step == 0
    run.out.mkdir()
    lines = "".join(f'{{"step": {step}, "loss": 0.0123456789}}\n' for step in range(1, 5001))
    (run.out / "log.jsonl").write_text(lines + '{"step": 50')
    assert len(lines) > 2 * TAIL and run.step == 5000


def test_an_archive_is_removed_but_not_while_a_run_reads_it(
    tab: Train, pictures: Path, tmp_path: Path, me: str
) -> None:
    tab._unpack(str(packed(tmp_path / "set.zip", {"my/0.png": shape(0)})), me, None)  # type: ignore[arg-type]
    assert tab._choose_data(me, "set")[tab.remove_data.ask]["visible"]
    assert not tab._choose_data(me, "shapes")[tab.remove_data.ask]["visible"], "it is the server's"
    run = Run(tab._history.results(me), "reader")
    data = tab._all_data(me)["set"]
    run.begin(TrainConfig(task="controlnet", data=str(data), out=str(run.out), annotator="canny"))
    run.wait()
    assert "is at work" in tab._remove_data(me, "set", None)[tab.data_error] and data.is_dir()  # type: ignore[arg-type]
    run.leave()
    for name in ("shapes", "..", "../.runs"):
        tab._remove_data(me, name, None)  # type: ignore[arg-type]
    assert (pictures / "shapes").is_dir() and runs(run.folder) == [run]
    shown = tab._remove_data(me, "set", None)  # type: ignore[arg-type]
    assert shown[tab.data]["value"] is None and not data.exists() and "set" not in tab._all_data(me)


def test_each_task_shows_its_own_settings(tab: Train) -> None:
    shown = {task: tab._choose_task(task) for task in ("ip-adapter", "qformer", "lora")}
    visible = {
        task: {name for name, component in tab.more.items() if update.get(component, {}).get("visible")}
        for task, update in shown.items()
    }
    assert {"tokens", "depth", "heads", "momentum"} <= visible["qformer"] and "projector" not in visible["qformer"]
    assert {"tokens", "projector"} <= visible["ip-adapter"] and "momentum" not in visible["ip-adapter"]
    assert visible["lora"] == {"rank", "train_text"}


def test_a_run_that_goes_on_is_not_stopping_any_more(tab: Train, tmp_path: Path, me: str) -> None:
    run = Run(tab._history.results(me), "again")
    run.begin(TrainConfig(task="controlnet", data=str(tmp_path), out=str(run.out), annotator="canny"))
    blocked = tab._jobs.submit(lambda job, loader, **_: _hold(job))
    tab._stopping.add(run.out)  # as where it ended in the moment that it was to be stopped
    tab._submit(run, me)
    assert run.out not in tab._stopping
    tab._stop(me, "again", None)  # type: ignore[arg-type]
    blocked.cancel()
