"""The command line: what it makes, and one line with exit code 2 for whatever does not do."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mahlstick as ms
from mahlstick import cli
from mahlstick.adapters import formats
from mahlstick.errors import MahlstickError
from tests import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with links to the models and pictures."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(path: str | Path) -> Any:
    with Image.open(path) as picture:
        return np.asarray(picture)


def run(*arguments: str) -> int:
    return cli.main(list(arguments))


def fast(*arguments: str) -> int:
    return run("generate", "-p", "red fox", "--base", "base", "--steps", "2", "--seed", "7", *arguments)


# Import and help


def test_the_command_line_starts_without_torch() -> None:
    code = (
        "import sys, mahlstick, mahlstick.cli; mahlstick.cli.main(['--help']);"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'pydantic', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_shows_every_command_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    overview = capsys.readouterr().out
    for command in ("demo", "generate", "annotate", "inspect", "convert", "replay", "evaluate"):
        assert f"\n  {command} " in overview
        assert run(command, "--help") == 0
        assert f"mahlstick {command} " in capsys.readouterr().out
    assert "..." not in overview.replace("[ARGS]...", "").replace("pose, ...", "")  # no summary is cut off


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("mahlstick 0.")


# generate


def test_generate_with_units(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    units = ["--control", "net=drawing.png:0.9", "--image-prompt", "ip=reference.png:0.6"]
    assert fast(*units, "--out", "out.png", "--save-request", "request.json") == 0
    assert capsys.readouterr().out == "out.png  seed 7\n"
    request = json.loads(Path("request.json").read_text())
    assert (request["controls"][0]["scale"], request["image_prompts"][0]["scale"]) == (0.9, 0.6)
    assert fast("--out", "plain.png") == 0
    assert not np.array_equal(pixels("out.png"), pixels("plain.png"))
    capsys.readouterr()

    assert run("generate", "--request", "request.json", "--out", "out.png", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"images": ["out.png"], "seeds": [7]}
    assert run("generate", "--request", "request.json", "--out", "again.png") == 0
    assert np.array_equal(pixels("out.png"), pixels("again.png"))
    assert not [path for path in here.iterdir() if path.name.startswith(".")]


def test_options_win_over_the_request(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.json").write_text(json.dumps({"prompt": "x", "base": "base", "steps": 2, "seeds": [1, 2]}))
    assert run("generate", "--request", "r.json", "--seed", "9", "--images", "1", "--out", "o.png") == 0
    assert "seed 9" in capsys.readouterr().out


def test_options_complete_the_request(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("r.json").write_text(json.dumps({"base": "base", "steps": 1, "seeds": [1, 2]}))
    assert run("generate", "--request", "r.json", "-p", "fox", "--seed", "9", "--out", "o.png") == 0
    assert capsys.readouterr().out == "o-1.png  seed 9\no-2.png  seed 10\n"


@pytest.mark.parametrize("name", ["moving.gif", "clear.png", "deep.png"])
def test_any_kind_of_picture_controls(here: Path, name: str) -> None:
    frames = [tiny.picture(seed=seed) for seed in (1, 2)]
    if name == "moving.gif":
        frames[0].save(name, save_all=True, append_images=frames[1:])
    elif name == "clear.png":
        frames[0].putalpha(Image.linear_gradient("L").resize(frames[0].size))
        frames[0].save(name)
    else:
        Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).save(name)
    assert fast("--steps", "1", "--control", f"net={name}:2", "--out", "o.png") == 0
    assert fast("--steps", "1", "--out", "plain.png") == 0
    assert not np.array_equal(pixels("o.png"), pixels("plain.png"))


def test_the_same_through_python(here: Path) -> None:
    import mahlstick as ms

    assert (
        fast("--size", "72x64", "--scheduler", "euler a", "--negative", "blur", "--guidance", "3", "--out", "a.png")
        == 0
    )
    request = ms.Request(
        prompt="red fox",
        negative_prompt="blur",
        base="base",
        seed=7,
        steps=2,
        guidance=3,
        width=72,
        height=64,
        scheduler="euler_a",
    )
    assert np.array_equal(pixels("a.png"), ms.generate(request, progress=False).images[0])


def test_several_pictures_and_folders(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fast("--images", "2") == 0
    assert fast("--images", "2", "--out", "x.png") == 0
    lines = capsys.readouterr().out.splitlines()
    paths = [str(Path("out", "0001.png")), str(Path("out", "0002.png")), "x-1.png", "x-2.png"]
    assert lines == [f"{path}  seed {seed}" for path, seed in zip(paths, [7, 8, 7, 8], strict=True)]
    assert fast("--out", "x-1.png") == 0
    assert "x-1.png  seed 7  (replaced)" in capsys.readouterr().out


def test_an_image_encoder_for_a_base_without_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.sd().image_encoder.save_pretrained("encoder")
    bare = json.loads(Path("base", "model_index.json").read_text())
    Path("bare").mkdir()
    for part in Path("base").iterdir():
        (Path("bare") / part.name).symlink_to(part.resolve())
    Path("bare", "model_index.json").unlink()
    Path("bare", "model_index.json").write_text(json.dumps({**bare, "image_encoder": [None, None]}))
    asked = ["--base", "bare", "--image-prompt", "ip=reference.png", "--out", "o.png"]
    assert fast(*asked) == 2
    assert "no image encoder" in capsys.readouterr().err
    assert fast(*asked, "--image-encoder", "encoder") == 0


def test_inpainting(here: Path) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save("mask.png")
    assert fast("--init", "drawing.png", "--mask", "mask.png", "--strength", "0.9", "--out", "o.png") == 0
    assert np.array_equal(pixels("o.png")[:, 32:], pixels("drawing.png")[:, 32:])


def test_an_annotator_in_the_control_option(here: Path) -> None:
    assert run("annotate", "canny", "reference.png", "--out", "edges.png") == 0
    size = ["--size", "96x40"]
    assert fast("--control", "net=edges.png", *size, "--out", "a.png") == 0
    assert fast("--control", "net@canny=reference.png", *size, "--out", "b.png") == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))


def test_a_distorted_control_picture_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fast("--control", "net=reference.png", "--out", "a.png") == 0
    error = capsys.readouterr().err
    assert error.startswith("mahlstick: warning: controls[0]: 90x40 is stretched to 64x64;") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("lineart=drawing.png:0.9", {"adapter": "lineart", "image": "drawing.png", "scale": 0.9}),
        ("lineart=drawing.png", {"adapter": "lineart", "image": "drawing.png"}),
        (
            "a/net.safetensors@canny=p.jpg:1",
            {"adapter": "a/net.safetensors", "annotator": "canny", "image": "p.jpg", "scale": 1},
        ),
        ("me@home/net=p.jpg", {"adapter": "me@home/net", "image": "p.jpg"}),
        ("net@v2.pth=p.jpg", {"adapter": "net@v2.pth", "image": "p.jpg"}),
        (r"C:\nets\a.pth=D:\p.png:0.5", {"adapter": r"C:\nets\a.pth", "image": r"D:\p.png", "scale": 0.5}),
        (r"C:\a.pth=D:\p.png", {"adapter": r"C:\a.pth", "image": r"D:\p.png"}),
        ("net=odd:name.png", {"adapter": "net", "image": "odd:name.png"}),
        ("net=data=1.png:-0.5", {"adapter": "net", "image": "data=1.png", "scale": -0.5}),
    ],
)
def test_control_grammar(text: str, spec: dict[str, Any]) -> None:
    assert cli._control(text) == spec


def test_an_existing_file_is_never_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shot:12").touch()
    Path("a=b.png").touch()
    Path("net@canny").mkdir()
    assert cli._control("net=shot:12") == {"adapter": "net", "image": "shot:12"}
    assert cli._control("net@canny=p.png") == {"adapter": "net@canny", "image": "p.png"}
    assert cli._image_prompt("a=b.png:0.5") == {"images": ["a=b.png"], "scale": 0.5}
    assert cli._image_prompt("ip=b.png:0.5") == {"adapter": "ip", "images": ["b.png"], "scale": 0.5}
    assert cli._image_prompt("b.png") == {"images": ["b.png"]}


# annotate, inspect, convert, replay


def test_annotate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("annotate", "canny", "drawing.png", "-o", "low=10", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"image": "drawing-canny.png"}
    assert set(np.unique(pixels("drawing-canny.png"))) == {0, 255}
    assert run("annotate", "--list") == 0
    table = capsys.readouterr().out
    assert "needs nothing" in table and "needs weights" in table
    assert run("annotate", "--list", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["canny"]["needs"] == "nothing" and "low" in rows["canny"]["options"]


def test_inspect(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", "net", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["layout"], facts["base"]) == ("controlnet", "diffusers", "unknown")
    assert run("inspect", "ip", "--tensors") == 0
    assert "image_proj.norm.weight  (32,)" in capsys.readouterr().out
    assert fast("--out", "o.png") == 0
    capsys.readouterr()
    assert run("inspect", "o.png") == 0
    assert capsys.readouterr().out.startswith("red fox\nSteps: 2,")


def test_convert_there_and_back(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", "net", "flat.safetensors", "--layout", "original", "--json") == 0
    assert json.loads(capsys.readouterr().out)["path"] == "flat.safetensors"
    assert run("convert", "flat.safetensors", "back") == 0
    assert run("convert", "net", "one.safetensors") == 0
    assert Path("one.safetensors").is_file()
    for net in ("net", "back", "flat.safetensors", "one.safetensors"):
        assert fast("--control", f"{net}=drawing.png:0.9", "--out", f"{net}.png") == 0
    assert np.array_equal(pixels("net.png"), pixels("back.png"))
    assert np.array_equal(pixels("net.png"), pixels("flat.safetensors.png"))
    assert np.array_equal(pixels("net.png"), pixels("one.safetensors.png"))
    assert run("convert", "net", "half", "--dtype", "float16") == 0
    capsys.readouterr()
    assert run("inspect", "half", "--json") == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float16"


def test_replay(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fast("--control", "net=drawing.png", "--out", "o.png") == 0
    capsys.readouterr()
    assert run("replay", "o.png") == 0
    assert capsys.readouterr().out == "o-replay.png  identical to o.png\n"
    assert run("replay", "o-replay.png", "--out", "third.png", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"image": "third.png", "identical": True}


# demo


def test_demo(here: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The real demo, on tiny random weights laid out as the embedded model is."""
    (here / "embedded").mkdir()
    for part in (models / "base").iterdir():
        (here / "embedded" / part.name).symlink_to(part)
    (here / "embedded" / "controlnet-lineart").symlink_to(models / "net")
    (here / "embedded" / "ip-adapter").symlink_to(models / "ip")
    (here / "examples").mkdir()
    rows = [
        {"prompt": word, "drawing": "../drawing.png", "reference": "../reference.png"} for word in ("fox", "red cat")
    ]
    (here / "examples" / "examples.json").write_text(json.dumps(rows))
    for module in ("load", "demo"):
        monkeypatch.setattr(f"mahlstick.pipelines.{module}.files", lambda _: here)
    assert run("demo", "--steps", "2") == 0
    shown = capsys.readouterr().out
    assert "Look at out/contact_sheet.png" in shown.replace(os.sep, "/") and shown.count("\n  mahlstick generate ") == 2
    made = {path.name for path in Path("out").iterdir()}
    ways = ("words", "drawing", "reference", "both")
    assert made == {"contact_sheet.png", *(f"{row}-{way}.png" for row in ("fox", "red-cat") for way in ways)}
    assert len({pixels(Path("out", f"fox-{way}.png")).tobytes() for way in ways}) == 4
    with Image.open(Path("out", "contact_sheet.png")) as sheet:
        assert sheet.width > 6 * 160 and sheet.height > 2 * 160
    assert run("replay", str(Path("out", "fox-both.png"))) == 0
    assert "identical" in capsys.readouterr().out


# What does not do


BAD: list[tuple[list[str], str]] = [
    (["generate"], "--prompt is missing"),
    (["generate", "--frob"], "No such option: --frob"),
    (["frob"], "No such command 'frob'"),
    (["generate", "-p", "x", "--steps", "many"], "'--steps'"),
    (["G", "--steps", "0"], "steps: should be greater than or equal to 1"),
    (["G", "--steps", "9999999"], "steps: should be less than or equal to 1000"),
    (["G", "--seed", "-1"], "seed: should be"),
    (["G", "--guidance", "nan"], "guidance: should be a finite number"),
    (["G", "--size", "63"], "width: should be a multiple of 8"),
    (["G", "--size", "99992x99992"], "width: should be less than"),
    (["G", "--size", "big"], "--size big: give width x height"),
    (["G", "--scheduler", "eulr"], "did you mean euler"),
    (["G", "--device", "quantum"], "device 'quantum' is not available"),
    (["G", "--dtype", "int3"], "dtype 'int3' is unknown"),
    (["G", "--out", "a.jpg"], "a.jpg: the recipe is kept in PNG"),
    (["G", "--out", "drawing.png/x"], "drawing.png/x: "),
    (["G", "--save-request", "r.json", "--control", "net=nope.png"], "'nope.png' does not exist"),
    (["G", "--save-request", "r.json", "--out", "a.jpg"], "a.jpg: the recipe is kept in PNG"),
    (["G", "--save-request", "drawing.png/r.json"], "drawing.png is no folder"),
    (["G", "--save-request", "base"], "base: is a folder; give the name of a file"),
    (["demo", "--out", "x.png"], "x.png: the demo writes several pictures; give a folder"),
    (["demo", "--out", "drawing.png/x"], "drawing.png is no folder"),
    (["G", "--base", "nope"], "nope: no such file or folder"),
    (["G", "--base", "notes.safetensors"], "notes.safetensors"),
    (["G", "--base", "net"], "net: no model_index.json"),
    (["G", "--request", "nope.json"], "nope.json: cannot be read"),
    (["G", "--request", "notes.safetensors"], "notes.safetensors: request: not valid JSON"),
    (["G", "--control", "net"], "--control net: give NET=PICTURE"),
    (["G", "--control", "net=nope.png"], "'nope.png' does not exist"),
    (["G", "--control", "net=notes.safetensors"], "'notes.safetensors' is not a picture"),
    (["G", "--control", "net=truncated.png"], "'truncated.png' is damaged or truncated"),
    (["G", "--control", "net=bomb.png"], "'bomb.png' is too large"),
    (["G", "--control", "net=net"], "'net' is a folder"),
    (["G", "--control", "net=drawing.png:nan"], "controls[0].scale: should be a finite number"),
    (["G", "--control", "net=drawing.png:99"], "controls[0].scale: should be less than or equal to 10"),
    (["G", "--control", "net@cany=drawing.png"], "annotator 'cany' is unknown"),
    (["G", "--control", "gone=drawing.png"], "gone: neither"),
    (["G", "--control", "notes.safetensors=drawing.png"], "notes.safetensors"),
    (["G", "--control", "evil.bin=drawing.png"], "evil.bin"),
    (["G", "--control", "nan.safetensors=drawing.png"], "nan.safetensors"),
    (["G", "--control", "xl=drawing.png"], "xl: this ControlNet was made for SDXL"),
    (["G", "--control", "ip=drawing.png"], "ip holds a ip_adapter; give a controlnet"),
    (["G", "--image-prompt", "net=drawing.png"], "net holds a controlnet; give a ip_adapter"),
    (["G", "--image-prompt", "ip=nope.png"], "'nope.png' does not exist"),
    (["G", "--mask", "drawing.png"], "mask: inpainting needs init"),
    (["G", "--init", "nope.png"], "'nope.png' does not exist"),
    (["G", "--init", "drawing.png", "--strength", "0"], "strength: should be greater than 0"),
    (["G", "-p", "(fox:99)"], "prompt: weight 99 is outside 0 to 10"),
    (["annotate"], "give an annotator and a picture"),
    (["annotate", "cany", "drawing.png"], "annotator 'cany' is unknown"),
    (["annotate", "canny", "nope.png"], "'nope.png' does not exist"),
    (["annotate", "canny", "drawing.png", "-o", "low"], "--option low: give NAME=VALUE"),
    (["annotate", "canny", "drawing.png", "-o", "frob=1"], "has no option 'frob'"),
    (["annotate", "canny", "drawing.png", "--out", "a.jpg"], "a.jpg"),
    (["inspect", "nope"], "nope does not exist"),
    (["inspect", "notes.safetensors"], "notes.safetensors"),
    (["inspect", "evil.bin"], "evil.bin"),
    (["inspect", "drawing.png"], "drawing.png: holds no recipe"),
    (["convert", "net", "base"], "base: exists already"),
    (["convert", "nope", "x"], "nope does not exist"),
    (["convert", "net", "x.pth", "--layout", "original"], "x.pth was not written: give a folder or"),
    (["convert", "net", "x.bin"], "x.bin was not written"),
    (["convert", "net", "x", "--layout", "odd"], "layout 'odd' is not known"),
    (["replay", "nope.png"], "nope.png: no such file"),
    (["replay", "drawing.png"], "drawing.png: holds no recipe"),
    (["replay", "truncated.png"], "truncated.png: not a readable picture"),
]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pwned",))


@pytest.fixture(scope="module")
def unfit(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that nothing can be made of: NaN weights, weights for SDXL, a pickle that runs code, damaged pictures."""
    folder = tmp_path_factory.mktemp("unfit")
    config, state = formats.read(models / "net", "controlnet")
    state["conv_in.bias"] = torch.full_like(state["conv_in.bias"], float("nan"))
    formats.write(folder / "nan.safetensors", "controlnet", config, state)
    ms.ControlNet.from_unet(tiny.sdxl().unet).save_pretrained(folder / "xl")
    (folder / "notes.safetensors").write_text("not what the name says")
    (folder / "truncated.png").write_bytes((models / "drawing.png").read_bytes()[:3000])
    (folder / "evil.bin").write_bytes(pickle.dumps(Evil()))
    Image.new("1", (12000, 12000)).save(folder / "bomb.png")
    return folder


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(
    here: Path, unfit: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in unfit.iterdir():
        (here / path.name).symlink_to(path)
    if arguments[0] == "G":
        arguments = ["generate", "-p", "x", "--base", "base", "--steps", "2", *arguments[1:]]
    before = sorted(here.iterdir())
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err and printed.err.startswith("mahlstick: ")
    assert printed.err.count("\n") == 1 and printed.out == ""
    assert sorted(here.iterdir()) == before  # nothing half-written, nothing executed


def test_a_process_exits_2_without_a_traceback(here: Path) -> None:
    command = [sys.executable, "-m", "mahlstick.cli", "generate", "-p", "x", "--steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mahlstick: steps: should be") and done.stderr.count("\n") == 1
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, timeout=120)
    assert "Traceback" in debug.stderr and "MahlstickError" in debug.stderr and debug.returncode != 0


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory; take a smaller --size"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "out of memory; take a smaller --size"),
        (RuntimeError("odd\nand long"), 1, "unexpected RuntimeError: odd; --debug shows the traceback"),
        (MahlstickError("two\nlines"), 2, "two lines"),
    ],
)
def test_failures_on_the_way(
    here: Path,
    error: BaseException,
    code: int,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("mahlstick.pipelines.generate._run", fail)
    before = sorted(here.iterdir())
    assert fast("--out", "o.png") == code
    printed = capsys.readouterr().err
    assert printed.startswith(f"mahlstick: {sentence}") and printed.count("\n") == 1
    assert sorted(here.iterdir()) == before
