"""Workflows on the page: which inputs a form has, what a run says and leaves, and whose files it may touch."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
import torch
from gradio_client import Client
from PIL import Image

from mahlstick.nodes.builtin import all_nodes, loaders
from mahlstick.nodes.comfy.ui import read
from mahlstick.page import app, canvas, forms
from mahlstick.page.history import History
from mahlstick.page.jobs import Jobs, pictures
from mahlstick.page.workflows import Workflows, _Form, examples
from mahlstick.pipelines.request import Request

NODES = all_nodes()
PICTURES = examples()["controlnet"].parents[1] / "examples"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Any:
    jobs = Jobs(device="cpu")
    with gr.Blocks():
        found = Workflows(None, jobs, History(tmp_path_factory.mktemp("sessions")), gr.BrowserState(None))
    yield found
    jobs.close()


def workflow(tab: Workflows, name: str, session: str = "mine") -> dict[str, Any]:
    """An example, as the tab holds it, with two steps."""
    found: dict[str, Any] = tab._take_example(name, session, None)[tab.workflow]
    for step in found["api"].values():
        if step["class_type"] == "KSampler":
            step["inputs"]["steps"] = 2
    return found


def laid(tab: Workflows, shown: dict[str, Any], session: str = "mine") -> _Form:
    form = _Form(tab, session)
    with gr.Blocks():
        for group in [group for both in forms.groups(shown["api"], tab._nodes) for group in both]:
            form.lay(group)
    return form


def entered(
    tab: Workflows, form: _Form, shown: dict[str, Any], session: str = "mine", **changes: Any
) -> dict[Any, Any]:
    """What the browser sends: what it was shown, but for ``changes`` by ``title__input``."""
    values = {form.components[place]: value for place, value in form.shown.items()}
    nodes = {title: node for node, title in forms.titles(shown["api"], NODES).items()}
    for place, value in changes.items():
        title, _, name = place.partition("__")
        values[form.components[f"{nodes[title]}.{name}"]] = value
    return {**values, tab.workflow: shown, tab._session: session}


def run(tab: Workflows, form: _Form, values: dict[Any, Any]) -> list[dict[Any, Any]]:
    async def all_of_it() -> list[dict[Any, Any]]:
        return [each async for each in form.make(values, None)]

    return asyncio.run(all_of_it())


def test_texts_pictures_and_seeds_come_first_and_plumbing_last() -> None:
    first, rest = forms.groups(read(examples()["controlnet"], NODES), NODES)
    assert [group.title for group in first[:3]] == ["Positive", "Negative", "Drawing"]
    assert {entry.name for group in first for entry in group.entries} >= {"seed", "steps", "cfg", "strength", "width"}
    assert {entry.name for group in rest for entry in group.entries} >= {"sampler_name", "filename_prefix"}
    joined = {"model", "positive", "latent_image", "control_net"}
    assert not joined & {entry.name for group in (*first, *rest) for entry in group.entries}


def test_a_form_that_nobody_touched_is_the_workflow(tab: Workflows) -> None:
    shown = workflow(tab, "two_controlnets")
    shown["api"]["99"] = {"class_type": "KSampler", "inputs": {"seed": 2**64 - 1}}  # which no browser can show
    form = laid(tab, shown)
    values = entered(tab, form, shown)
    values[form.components["99.seed"]] = float(2**64 - 1)
    assert tab.changed(form, values) == shown["api"]


def test_what_is_entered_is_run_saved_and_carried_by_the_picture(tab: Workflows) -> None:
    shown = workflow(tab, "controlnet")
    form = laid(tab, shown)
    drawn = canvas.value(Image.open(PICTURES / "tree-drawing.png").convert("RGB"))
    told = run(tab, form, entered(tab, form, shown, Positive__text="tree", KSampler__seed=8, Drawing__image=drawn))
    assert any("KSampler" in each.get(tab.status, "") for each in told)
    saved = Path(told[-1][tab.gallery]["value"][0])
    assert saved.is_relative_to(tab._where("mine").output)
    api = read(saved, NODES)
    assert api["2"]["inputs"]["text"] == "tree" and api["8"]["inputs"]["seed"] == 8
    kept = Image.open(tab._where("mine").input / api["4"]["inputs"]["image"])
    assert kept.convert("RGB").tobytes() == Image.open(PICTURES / "tree-drawing.png").convert("RGB").tobytes()
    assert tab.enter("mine")[tab.gallery]["value"] == [str(saved)]  # found again
    assert tab.enter("yours")[tab.gallery]["value"] == []
    assert tab.picture("yours", "penguin-drawing.png") is None


def test_a_fault_is_said_beside_its_node_and_nothing_runs(tab: Workflows) -> None:
    shown = workflow(tab, "text_to_image")
    form = laid(tab, shown)
    last = run(tab, form, entered(tab, form, shown, KSampler__steps=0))[-1]
    (sampler,) = [node for node, step in shown["api"].items() if step["class_type"] == "KSampler"]
    assert "smaller than min" in last[form.lines[sampler]] and last[tab.status] == ""


def test_cancelled_within_a_step_it_says_so_and_the_next_run_works(tab: Workflows) -> None:
    shown = workflow(tab, "text_to_image")
    form = laid(tab, shown)

    async def cancelled() -> list[dict[Any, Any]]:
        told = []
        values = entered(tab, form, shown, KSampler__steps=1000, KSampler__seed=77)
        async for each in form.make(values, None):
            told.append(each)
            if "Step" in each.get(tab.status, ""):
                tab._jobs.cancel("yours/workflows")  # has no such run
                tab._jobs.cancel("mine/workflows")
        return told

    assert "Cancelled" in asyncio.run(cancelled())[-1][tab.status]
    assert run(tab, form, entered(tab, form, shown))[-1][tab.gallery]["value"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"class_type": "FluxMagic"}, "needs nodes that are not here: FluxMagic"),
        ({"inputs": {"ckpt_name": "sd15.safetensors"}}, "Not here: sd15.safetensors"),
    ],
)
def test_what_is_missing_is_named(tab: Workflows, change: dict[str, Any], sentence: str) -> None:
    shown = workflow(tab, "text_to_image")
    shown["api"]["1"] |= change
    assert sentence in tab._note_missing(shown, "mine", None)  # type: ignore[arg-type]
    laid(tab, shown)  # and there is a form for the rest


def test_both_of_comfyuis_forms_and_a_picture_are_taken_and_a_script_is_not(tab: Workflows, tmp_path: Path) -> None:
    shown = workflow(tab, "text_to_image")
    form = laid(tab, shown)
    written = tab._writing(form)(entered(tab, form, shown, Positive__text="a boat"), None)[tab.written]["value"]
    ui, api, script = map(Path, written)
    for path in (ui, api):
        dropped = tab._take_drop(str(path), None, None)  # type: ignore[arg-type]
        assert dropped[tab.workflow]["api"]["2"]["inputs"]["text"] == "a boat"
    assert "a boat" in script.read_text()
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "Give a .json" in tab._take_drop(str(script), None, None)[tab.error]  # type: ignore[arg-type]
    assert not (tmp_path / "ran").exists()
    junk = tmp_path / "junk.json"
    junk.write_text("[1]")
    said = tab._take_drop(str(junk), None, None)[tab.error]  # type: ignore[arg-type]
    assert "junk.json holds no workflow" in said and str(tmp_path) not in said


def test_no_workflow_reads_outside_of_its_session(tab: Workflows, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    shown = workflow(tab, "controlnet")
    for name in (str(secret), "../../../" + secret.name):
        shown["api"]["4"]["inputs"]["image"] = name
        assert tab.picture("mine", name) is None
        form = laid(tab, shown)
        last = run(tab, form, entered(tab, form, shown))[-1]
        assert any("leads outside" in str(said) for said in last.values())


def test_uploaded_files_keep_their_names_and_make_the_workflow_whole(tab: Workflows, tmp_path: Path) -> None:
    shown = workflow(tab, "controlnet", "another")
    shown["api"]["4"]["inputs"]["image"] = "mine.png"
    assert "Not here: mine.png" in tab._note_missing(shown, "another", None)  # type: ignore[arg-type]
    shutil.copyfile(PICTURES / "tree-drawing.png", tmp_path / "mine.png")
    again = tab._take_files([str(tmp_path / "mine.png")], "another", shown)[tab.workflow]
    assert again["turn"] > shown["turn"]  # so that the form is laid again
    assert tab._note_missing(again, "another", None) == ""  # type: ignore[arg-type]


def test_a_workflow_shares_the_base_device_and_dtype_of_the_other_tabs(tmp_path: Path) -> None:
    jobs, history, others = Jobs("cpu", "bfloat16"), History(tmp_path), loaders._OWN.loader._pipeline.cache_info()
    with gr.Blocks():
        found = Workflows(None, jobs, history, gr.BrowserState(None))
    request = Request(prompt="tree", seed=1, steps=1)
    jobs.submit(pictures(request, lambda result: [])).future.result()
    shown = workflow(found, "text_to_image")
    form = laid(found, shown)
    assert run(found, form, entered(found, form, shown, KSampler__steps=1))[-1][found.gallery]["value"]
    pipe = jobs._loader.pipeline("embedded", device="cpu", dtype="bfloat16")
    assert pipe.unet.dtype == torch.bfloat16 and jobs._loader._pipeline.cache_info().misses == 1
    assert loaders._OWN.loader._pipeline.cache_info() == others
    jobs.close()


def test_the_named_endpoint(tmp_path: Path) -> None:
    page = app.build(out=tmp_path)
    client = Client(app.launch(page, port=None), verbose=False)
    api = json.loads(examples()["controlnet"].read_text())
    drawing = "data:image/png;base64," + base64.b64encode((PICTURES / "tree-drawing.png").read_bytes()).decode()
    changes = {"KSampler.steps": 1, "Drawing.image": drawing, "Positive.text": "tree"}
    (made,) = client.predict(api, changes, api_name="/run_workflow")
    assert read(Path(made), NODES)["2"]["inputs"]["text"] == "tree"
    with pytest.raises(Exception, match="the workflow has no node 'Nobody'"):
        client.predict(api, {"Nobody.steps": 1}, api_name="/run_workflow")
    with pytest.raises(Exception, match="changes: are no JSON object"):
        client.predict(api, ["KSampler.steps"], api_name="/run_workflow")
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for named in (str(script), [str(script)]):  # a file of this machine
        with pytest.raises(Exception, match="give the JSON itself"):
            client.predict(named, {}, api_name="/run_workflow")
    assert not (tmp_path / "ran").exists()
    page.train.close()
    page.jobs.close()
    page.close(verbose=False)
