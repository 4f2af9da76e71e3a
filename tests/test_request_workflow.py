"""A request as a workflow of nodes: the same picture, and a word for all that it does not say."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import mahlstick as ms
from mahlstick import nodes
from mahlstick.errors import MahlstickError
from mahlstick.nodes.comfy.request import from_request
from mahlstick.nodes.folders import Folders
from mahlstick.pipelines.load import Loader, embedded_folder
from mahlstick.pipelines.request import Request

EXAMPLES = embedded_folder().parent / "examples"
DRAWING, REFERENCE = str(EXAMPLES / "penguin-drawing.png"), str(EXAMPLES / "lollipop-reference.png")
CONTROL = {"adapter": "lineart", "image": DRAWING, "scale": 0.9}


@pytest.fixture(scope="module")
def loader():
    return Loader()


def run(request, folder):
    """The workflow's picture, and what it leaves out."""
    where = Folders(models=folder, input=EXAMPLES, output=folder)
    api, left_out = from_request(request)
    (path,) = nodes.saved(nodes.run(api, where=where), where)
    return np.asarray(Image.open(path).convert("RGB")).astype(int), left_out


@pytest.mark.parametrize(
    "fields",
    [
        {"controls": [CONTROL | {"start": 0.25, "end": 0.5}, CONTROL | {"mode": "prompt"}]},
        {"image_prompts": [{"images": [REFERENCE], "scale": 0.6, "blocks": "style"}], "scheduler": "euler"},
        {"controls": [CONTROL | {"annotator": "canny", "options": {"low": 50}, "mask": DRAWING}]},
    ],
    ids=["window", "reference", "annotator"],
)
def test_a_workflow_makes_the_picture_of_its_request(fields, loader, tmp_path):
    request = Request(prompt="red penguin", negative_prompt="blue", seed=7, steps=4, **fields)
    made, left_out = run(request, tmp_path)
    wanted = np.asarray(ms.generate(request, loader=loader, progress=False).images[0]).astype(int)
    assert left_out == []
    assert abs(made - wanted).max() <= 2  # ComfyUI cuts fractions of a level off
    without = request.model_copy(update={"controls": [], "image_prompts": []})
    plain = np.asarray(ms.generate(without, loader=loader, progress=False).images[0]).astype(int)
    assert abs(plain - wanted).max() > 20


def test_painting_over_a_picture_runs_and_says_what_differs(tmp_path):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    Image.open(REFERENCE).convert("RGB").resize((64, 64)).save(tmp_path / "init.png")
    request = Request(
        prompt="apple", seed=1, steps=4, init=str(tmp_path / "init.png"), mask=str(tmp_path / "mask.png"), strength=0.5
    )
    api, left_out = from_request(request)
    where = Folders(models=tmp_path, input=tmp_path, output=tmp_path)
    (path,) = nodes.saved(nodes.run(api, where=where), where)
    made, init = (np.asarray(Image.open(each).convert("RGB")) for each in (path, tmp_path / "init.png"))
    assert (made[:, 32:] == init[:, 32:]).all() and (made[:, :32] != init[:, :32]).any()
    assert left_out == ["the very noise of a picture that begins from another"]


def test_an_adapter_that_reads_the_prompt_is_told_it():
    prompt = {"adapter": "someone/reader", "images": [REFERENCE]}
    api, _ = from_request(Request(prompt="apple", seed=1, image_prompts=[prompt]))
    (node,) = (each for each in api.values() if each["class_type"] == "MahlstickImagePrompt")
    assert node["inputs"]["prompt"] == "apple"


def test_what_a_workflow_does_not_say_is_told():
    unit = {"adapter": "lineart", "image": DRAWING}
    for fields, said in (
        ({"images": 2}, "the pictures after the first"),
        ({"seed": None}, "a new seed each time"),
        ({"prompt": "a (red:1.2) apple"}, "prompt weights"),
        ({"scheduler": "unipc"}, "the very steps of UniPCMultistepScheduler"),
        ({"base": "somewhere/model.safetensors"}, "put it into models/checkpoints"),
        ({"controls": [unit | {"scale": [0.5] * 13}]}, r"controls[0].scale"),
        ({"image_prompts": [{"images": [REFERENCE], "negative": REFERENCE}]}, "image_prompts[0].negative"),
    ):
        _, left_out = from_request(Request(**{"prompt": "apple", "seed": 1} | fields))
        assert any(said in each for each in left_out), said
    with pytest.raises(MahlstickError, match=r"controls\[0\].image: a workflow names files"):
        from_request(Request(prompt="apple", seed=1, controls=[unit | {"image": Image.new("RGB", (64, 64))}]))
