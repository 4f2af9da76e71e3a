"""Workflows from the command line, on the embedded model: what they make, what runs again, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import mahlstick as ms
from mahlstick import cli
from mahlstick.assets import __path__ as assets
from mahlstick.nodes import all_nodes, folders, runner
from mahlstick.nodes.cache import MemoryCache
from mahlstick.nodes.comfy.ui import to_api

ASSETS = Path(assets[0])
WORKFLOWS = ASSETS / "workflows"
RUNNABLE = ["controlnet", "hires_fix", "image_prompt", "inpaint", "text_to_image", "two_controlnets"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the example pictures as input, and results kept nowhere else."""
    shutil.copytree(ASSETS / "examples", tmp_path / "input")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    return tmp_path


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """``mahlstick run`` with two steps: its JSON."""

    def call(workflow: str | Path, *arguments: str) -> dict[str, Any]:
        assert cli.main(["run", *command(workflow), *arguments]) == 0
        return dict(json.loads(capsys.readouterr().out))

    return call


def command(workflow: str | Path) -> list[str]:
    if isinstance(workflow, Path):
        return [str(workflow), "--json"]
    samplers = ["Small", "Large"] if workflow == "hires_fix" else ["KSampler"]
    changes = [part for each in samplers for part in ("--set", f"{each}.steps=2")]
    return [str(WORKFLOWS / f"{workflow}.json"), "--json", *changes]


@pytest.mark.parametrize("name", RUNNABLE)
def test_example_workflows_make_pictures_that_carry_them(here: Path, run: Any, name: str) -> None:
    made = run(name)
    (file,) = map(Path, made["files"])
    assert file == (here / "output" / f"{name}_00001_.png") and made["cached"] == []

    nodes = all_nodes()
    asked = runner.load(WORKFLOWS / f"{name}.json", nodes)
    for step in asked.values():
        if step["class_type"] == "KSampler":
            step["inputs"]["steps"] = 2
    assert sorted(made["executed"]) == sorted(asked)
    with Image.open(file) as picture:
        assert picture.size == ((96, 96) if name == "hires_fix" else (64, 64))
        extrema = picture.convert("L").getextrema()
        assert extrema[1] - extrema[0] > 30  # type: ignore[operator]  # it shows something
        assert json.loads(picture.info["prompt"]) == asked
        assert to_api(json.loads(picture.info["workflow"]), nodes) == asked

    again = run(file)
    assert again["executed"] == [] and again["files"] == made["files"] and set(again["cached"]) == set(asked)


def test_a_lora_by_links_and_a_widget_that_the_file_leaves_out(here: Path, run: Any) -> None:
    """Links may lead to another disk, and in circles. A left-out widget takes the first model below --models."""
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {f"{layer}.lora_A.weight": torch.ones(2, 160), f"{layer}.lora_B.weight": torch.ones(160, 2)}
    (here / "elsewhere" / "loras").mkdir(parents=True)
    (here / "disk").mkdir()
    save_file(weights, here / "disk" / "mine.safetensors")
    (here / "elsewhere" / "loras" / "far").symlink_to(here / "disk")
    (here / "disk" / "back").symlink_to(here / "disk")
    ui = json.loads((WORKFLOWS / "lora.json").read_text())
    (loader,) = (node for node in ui["nodes"] if node["type"] == "LoraLoader")
    assert loader["widgets_values"] == ["style.safetensors", 0.8, 0.8]
    loader["widgets_values"][0] = None
    (sampler,) = (node for node in ui["nodes"] if node["type"] == "KSampler")
    sampler["widgets_values"][2] = 2
    (here / "lora.json").write_text(json.dumps(ui))

    pictures = []
    for strength in (0.0, 0.8):
        made = run(here / "lora.json", "--models", "elsewhere", "--set", f"LoraLoader.strength_model={strength}")
        with Image.open(made["files"][0]) as picture:
            pictures.append(picture.tobytes())
            assert json.loads(picture.info["prompt"])["2"]["inputs"]["lora_name"] == "far/mine.safetensors"
    assert pictures[0] != pictures[1]


def test_a_clip_with_a_module_of_ones_own(here: Path, run: Any) -> None:
    unet = ms.load_pipeline("embedded", device="cpu").unet
    ms.MotionAdapter.from_unet(unet, max_frames=16).save_pretrained(here / "models" / "animatediff_models" / "mine")
    size = ("--set", "EmptyLatentImage.width=32", "--set", "EmptyLatentImage.height=32")
    made = run("animate", "--set", "ADE_LoadAnimateDiffModel.model_name=mine", *size)
    (file,) = made["files"]
    with Image.open(file) as clip:
        assert clip.n_frames == 16 and clip.size == (32, 32)  # type: ignore[attr-defined]


def test_a_new_process_executes_nothing(here: Path, run: Any) -> None:
    made = run("text_to_image")
    again = subprocess.run(
        [sys.executable, "-m", "mahlstick.cli", "run", *command("text_to_image")], capture_output=True, check=True
    )
    assert json.loads(again.stdout)["executed"] == [] and json.loads(again.stdout)["files"] == made["files"]
    assert len(run("text_to_image", "--fresh")["executed"]) == 7


def test_an_edited_text_executes_what_depends_on_it(here: Path) -> None:
    cache = MemoryCache(runner.IN_MEMORY)

    def executed(**changes: Any) -> set[str]:
        changed = {"KSampler.steps": 2, **{place.replace("__", "."): value for place, value in changes.items()}}
        return set(runner.run(WORKFLOWS / "controlnet.json", changed, cache=cache).executed)

    assert len(executed()) == 10
    assert executed(Positive__text="a blue penguin") == {"2", "6", "8", "9", "10"}
    assert executed(Positive__text="a blue penguin", SaveImage__filename_prefix="blue") == {"10"}
    assert executed() == set()


def test_a_kept_result_is_of_this_file_and_no_other_of_its_name(here: Path, run: Any) -> None:
    """A picture was deleted, or lies in another folder; since then another workflow has saved one of that name."""

    def seeded(seed: int, *arguments: str) -> tuple[bytes, list[str]]:
        made = run("text_to_image", "--set", f"KSampler.seed={seed}", *arguments)
        return Path(made["files"][0]).read_bytes(), made["executed"]

    first, _ = seeded(1)
    (here / "output" / "text_to_image_00001_.png").unlink()
    second, _ = seeded(2)
    assert [each.name for each in (here / "output").glob("*.png")] == ["text_to_image_00001_.png"] and first != second
    assert seeded(1) == (first, ["7"])
    assert seeded(1, "--output", "others") == (first, ["7"])
    assert seeded(1) == (first, ["7"])


def test_files_are_found_among_whatever_nodes_show(here: Path) -> None:
    odd = [{"filename": 3}, {"filename": "../x.png"}, {"filename": "x.png", "type": "models"}, "x.png", None]
    shown = {"images": [{"filename": "a.png", "subfolder": None}, *odd], "text": ["a"], "number": 5}
    assert folders.shown_files(shown) == [here / "output" / "a.png"]


def test_the_run_is_shown(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    arguments = [each for each in command("text_to_image") if each != "--json"]
    assert cli.main(["run", *arguments, "--set", "Positive.text=a fox"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{here / 'output' / 'text_to_image_00001_.png'}\n"
    assert "7/7 |" in shown.err and "Positive" in shown.err and "KSampler 2/2" in shown.err
    assert shown.err.endswith("7 nodes ran, 0 had not changed\n")

    assert cli.main(["run", *arguments, "--set", "Positive.text=a fox", "--target", "5"]) == 0
    assert capsys.readouterr().err.endswith("0 nodes ran, 5 had not changed\n")


@pytest.mark.parametrize(
    ("change", "node", "value"),
    [
        ("5.seed=8", "5", {"seed": 8}),
        ("KSampler.cfg=4", "5", {"cfg": 4}),
        ('Positive.text=a "red" fox, 1.5 = x', "2", {"text": 'a "red" fox, 1.5 = x'}),
        ("Negative.text=7", "3", {"text": "7"}),
        ("KSampler.sampler_name=euler_ancestral", "5", {"sampler_name": "euler_ancestral"}),
    ],
)
def test_inputs_are_set(change: str, node: str, value: dict[str, Any]) -> None:
    nodes = all_nodes()
    api = runner.load(WORKFLOWS / "text_to_image.json", nodes)
    changed = runner.with_changes(api, dict([cli._change(change)]), nodes)
    assert changed == api | {node: api[node] | {"inputs": api[node]["inputs"] | value}}


BAD = {
    "nothing.json": None,
    "nothing.py": None,
    "broken.json": "{",
    "empty.json": '{"version": 1}',
    "list.json": "[]",
    "text.png": "no picture",
    "none.py": "x = 1",
    "exit.py": "raise SystemExit",
    "wrong.py": "1 / 0",
    "unknown.json": '{"1": {"class_type": "NobodyKnows", "inputs": {}}}',
    "faulty.json": '{"1": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}}}',
}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "5.seed"], "--set 5.seed: give NODE.INPUT=VALUE"),
        (["--set", "seed=1"], "--set seed=1: give NODE.INPUT=VALUE"),
        (["--set", ".seed=1"], "--set .seed=1: give NODE.INPUT=VALUE"),
        (["--set", "9.seed=1"], "no node '9'; it has 1 (CheckpointLoaderSimple), 2 (Positive)"),
        (["--set", "CLIPTextEncode.text=x"], "several nodes are called 'CLIPTextEncode'; give an id, one of 2, 3."),
        (["--set", "KSampler.sead=1"], "node 5 has no input 'sead'; it has model, seed"),
        (["--set", "KSampler.model=1"], "takes another node's MODEL"),
        (["--set", "KSampler.seed=x"], "KSampler.seed: 'x' is no INT"),
        (["--set", "KSampler.steps=0"], "Node 5 (KSampler), input steps: Value 0 smaller than min of 1"),
        (["--set", "KSampler.sampler_name=magic"], "Node 5 (KSampler), input sampler_name: Value not in list"),
        (["--set", "1.ckpt_name=my.ckpt"], "Node 1 (CheckpointLoaderSimple), input ckpt_name: Value not in list"),
        (["--set", "SaveImage.filename_prefix=../x"], "Node 7 (SaveImage): '../x' leads outside"),
        (["--target", "99"], "no node 99"),
        *(([name], name) for name in list(BAD)[:-2]),
        (["unknown.json"], "Node 1 (NobodyKnows) is unknown here; install or name the node pack that brings it"),
        (["faulty.json"], "Node 1 (SaveImage), input images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_will_not_run_is_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    if arguments[0] in BAD:
        content = BAD[arguments[0]]
        if content is not None:
            Path(arguments[0]).write_text(content)
    else:
        arguments = [*command("text_to_image"), *arguments]
    assert cli.main(["run", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and says in shown.err
    assert shown.err.count("\n") == 1 and "Traceback" not in shown.err
    assert not list(here.glob("output/*.png"))


def test_a_workflow_is_rewritten_without_loss(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def convert(*arguments: str | Path) -> int:
        return cli.main(["convert", *map(str, arguments)])

    api = runner.load(WORKFLOWS / "two_controlnets.json", all_nodes())
    ways = [("a.json",), ("b.py",), ("c.json", "--layout", "ui"), ("d.json",)]
    source = WORKFLOWS / "two_controlnets.json"
    for target, *options in ways:
        assert convert(source, target, *options) == 0 and capsys.readouterr().out == f"{target}\n"
        source = here / target
    assert json.loads(Path("a.json").read_text()) == api == json.loads(Path("d.json").read_text())
    assert list(json.loads(Path("c.json").read_text()))[:2] == ["last_node_id", "last_link_id"]
    assert "ControlNetApplyAdvanced(" in Path("b.py").read_text()

    assert convert("a.json", "b.py") == 2 and "b.py: exists already" in capsys.readouterr().err
    assert convert("a.json", "b.py", "--overwrite") == 0
    assert convert("nothing.json", "e.py") == 2 and "nothing.json" in capsys.readouterr().err
    assert convert("a.json", "e.json", "--layout", "original") == 2 and "api or ui" in capsys.readouterr().err
    assert not Path("e.py").exists() and not Path("e.json").exists()
