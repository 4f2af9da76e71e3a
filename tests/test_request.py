"""The request: JSON round trips, every check with its sentence; schedulers and prompts, which it names."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mahlstick.errors import MahlstickError
from mahlstick.pipelines import prompts, schedulers
from mahlstick.pipelines.request import ControlSpec, ImagePromptSpec, Request, data_url, open_picture
from tests import tiny

# A request as version 1 wrote it on its first day. It stays readable; never edit it.
FIRST_DAY = """{
  "version": 1, "prompt": "red fox", "negative_prompt": "blur", "base": "sd15", "base_config": null, "seed": 7,
  "seeds": null, "images": 2, "batch": 1, "steps": 20, "guidance": 7.5, "width": 512, "height": 768,
  "scheduler": "dpm++_2m_karras", "init": "init.png", "strength": 0.6, "mask": "mask.png",
  "controls": [{"start": 0.1, "end": 0.9, "mask": null, "scale": [1.0, 0.5], "adapter": "lineart",
    "image": "drawing.png", "annotator": "canny", "options": {"low": 50}, "mode": "guess", "resize": "crop"}],
  "image_prompts": [{"start": 0.0, "end": 1.0, "mask": "face.png", "scale": 0.6, "adapter": "ip.safetensors",
    "image_encoder": "encoder", "images": ["a.png", "b.png"], "blocks": {"up_blocks.1": 0.5}, "negative": "n.png"}]
}"""


def test_json_round_trip_of_the_first_days_request() -> None:
    request = Request.from_json(FIRST_DAY)
    written = json.loads(request.to_json())
    for spec, later in (
        (written["controls"][0], {"window": "steps"}),
        (
            written["image_prompts"][0],
            {
                "window": "steps",
                "resize": "crop",
                "search": None,
                "library": None,
                "count": 1,
                "least": None,
                "found": [],
            },
        ),
    ):
        assert {name: spec.pop(name) for name in later} == later
    assert written == json.loads(FIRST_DAY)
    assert request.controls[0].scale == [1.0, 0.5] and request.image_prompts[0].blocks == {"up_blocks.1": 0.5}
    assert request.task == "inpaint"


def test_save_and_load(tmp_path: Any) -> None:
    request = Request(prompt="é \N{RED APPLE}", seeds=[3, 1])
    assert Request.load(request.save(tmp_path / "new" / "r.json")) == request
    assert request.images == 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.json"]


def test_objects_become_data_urls() -> None:
    source = tiny.picture(5, 7)
    mask = Image.new("L", (5, 7), 128)
    spec = ControlSpec(adapter="lineart", image=np.asarray(source), mask=mask)
    again = Request.from_json(Request(prompt="x", controls=[spec], init=source).to_json())
    for url in (again.controls[0].image, again.init):
        assert np.array_equal(open_picture(url, "picture"), source)
    assert open_picture(again.controls[0].mask, "mask").getpixel((0, 0)) == (128, 128, 128)


def test_an_adapter_object_is_taken_but_not_written() -> None:
    class Adapter:
        def attach(self) -> None: ...

    request = Request(prompt="x", controls=[{"adapter": Adapter(), "image": "a.png"}])
    with pytest.raises(MahlstickError, match=r"Adapter objects cannot be written as JSON; save_pretrained it"):
        request.to_json()


CONTROL = {"adapter": "lineart", "image": "a.png"}
BAD = [
    ({"promt": "x"}, "promt: is not a field; did you mean prompt?"),
    ({"prompt": 3}, "prompt: should be a valid string"),
    ({"version": 2}, "version: 2 is not known here; it was written by a newer mahlstick"),
    ({"width": 63, "height": 64}, "width: should be a multiple of 8, not 63"),
    ({"width": 64}, "width and height: give both or neither"),
    ({"width": 8200, "height": 64}, "width: should be less than or equal to 8192"),
    ({"width": 64, "height": -8}, "height: should be greater than or equal to 8"),
    ({"steps": 0}, "steps: should be greater than or equal to 1"),
    ({"steps": 1001}, "steps: should be less than or equal to 1000"),
    ({"steps": "many"}, "steps: should be a valid integer"),
    ({"seed": -1}, "seed: should be greater than or equal to 0"),
    ({"seed": 2**53}, "seed: should be less than or equal to 9007199254740991"),
    ({"seed": 1, "seeds": [2]}, "seed and seeds are both given"),
    ({"seeds": [1, 2], "images": 3}, "seeds: 2 seeds for 3 images"),
    ({"seeds": []}, "seeds: "),
    ({"images": 0}, "images: should be greater than or equal to 1"),
    ({"batch": 0}, "batch: should be greater than or equal to 1"),
    ({"guidance": float("nan")}, "guidance: should be a finite number"),
    ({"guidance": -1}, "guidance: should be greater than or equal to 0"),
    ({"mask": "m.png"}, "mask: inpainting needs init"),
    ({"init": "a.png", "strength": 0.01}, "strength: 0.01 of 20 steps leaves no step"),
    ({"init": "a.png", "strength": 0}, "strength: should be greater than 0"),
    ({"init": 3}, "init: should be a path, a PIL picture, a NumPy array or a data URL"),
    ({"controls": "x"}, "controls: should be a valid list"),
    ({"controls": [{"adapter": "lineart"}]}, "controls[0].image: is missing"),
    ({"controls": [{**CONTROL, "adapter": 3}]}, "controls[0].adapter: should be a path"),
    ({"controls": [{**CONTROL, "scle": 1}]}, "controls[0].scle: is not a field; did you mean scale?"),
    ({"controls": [CONTROL, {**CONTROL, "scale": float("inf")}]}, "controls[1].scale: should be a finite number"),
    ({"controls": [{**CONTROL, "scale": [1, 99]}]}, "controls[0].scale[1]: should be less than or equal to 10"),
    ({"controls": [{**CONTROL, "start": 0.5, "end": 0.2}]}, "controls[0]: start 0.5 is not before end 0.2"),
    ({"controls": [{**CONTROL, "start": 0.5, "end": 0.5}]}, "controls[0]: start 0.5 is not before end 0.5"),
    ({"controls": [{**CONTROL, "window": "time"}]}, "controls[0].window: should be 'steps' or 'noise'"),
    ({"image_prompts": [{"images": ["a"], "resize": "fill"}]}, "image_prompts[0].resize: should be 'crop', 'pad'"),
    ({"controls": [{**CONTROL, "end": 1.1}]}, "controls[0].end: should be less than or equal to 1"),
    ({"controls": [{**CONTROL, "mode": "soft"}]}, "controls[0].mode: should be 'balanced', 'prompt', 'control' or"),
    ({"controls": [{**CONTROL, "resize": "fill"}]}, "controls[0].resize: should be 'stretch', 'crop' or 'pad'"),
    ({"image_prompts": [{"images": []}]}, "image_prompts[0].images: "),
    ({"image_prompts": [{"images": ["a"], "blocks": "x"}]}, "image_prompts[0].blocks: should be 'all', 'style'"),
    ({"image_prompts": [{"images": ["a"], "scale": [1.0]}]}, "image_prompts[0].scale: should be a valid number"),
]


@pytest.mark.parametrize(("fields", "sentence"), BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_every_fault_is_one_sentence_that_names_the_field(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MahlstickError) as caught:
        Request(**{"prompt": "x", **fields})
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


def test_faults_of_json_and_files(tmp_path: Any) -> None:
    with pytest.raises(MahlstickError, match=r"^request: not valid JSON"):
        Request.from_json("{")
    with pytest.raises(MahlstickError, match=r"^prompt: is missing"):
        Request.from_json("{}")
    with pytest.raises(MahlstickError, match=r"nope\.json: cannot be read"):
        Request.load(tmp_path / "nope.json")
    (tmp_path / "bad.json").write_text('{"prompt": "x", "steps": 0}')
    with pytest.raises(MahlstickError, match=r"bad\.json: steps: should be"):
        Request.load(tmp_path / "bad.json")
    with pytest.raises(MahlstickError, match=r"^init: the data URL is not base64; embed a PNG or JPEG"):
        open_picture("data:image/png;base64,?", "init")
    with pytest.raises(MahlstickError, match=r"^init is not a picture"):
        open_picture("data:image/png;base64,AAAA", "init")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(MahlstickError, match=r"list\.json: request: should be a JSON object, not a list"):
        Request.load(tmp_path / "list.json")


def test_a_bomb_in_a_data_url_is_refused_from_its_header() -> None:
    url = data_url(Image.new("1", (12000, 16000)))
    with pytest.raises(MahlstickError, match=r"^init is too large"):
        open_picture(url, "init")


@settings(max_examples=50, deadline=None)
@given(
    prompt=st.text(max_size=50),
    seed=st.none() | st.integers(0, 2**53 - 1),
    steps=st.integers(1, 1000),
    guidance=st.none() | st.floats(0, 100),
    scale=st.floats(-10, 10) | st.lists(st.floats(-10, 10), max_size=13),
    window=st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda ends: ends[0] != ends[1]).map(sorted),
)
def test_any_request_survives_json(
    prompt: str, seed: int | None, steps: int, guidance: float | None, scale: Any, window: list[float]
) -> None:
    spec = ControlSpec(adapter="net", image="a.png", scale=scale, start=window[0], end=window[1])
    reference = ImagePromptSpec(images=["b.png"])
    request = Request(
        prompt=prompt, seed=seed, steps=steps, guidance=guidance, controls=[spec], image_prompts=[reference]
    )
    assert Request.from_json(request.to_json()) == request


# Schedulers


@pytest.mark.parametrize("name", schedulers.names())
def test_every_short_name_samples_with_a_list_of_generators(name: str) -> None:
    pipe = tiny.sd()
    pipe.scheduler = schedulers.build(name, pipe.scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    images = pipe("x", num_inference_steps=4, num_images_per_prompt=2, generator=generators, output_type="np").images
    assert np.isfinite(images).all() and type(pipe.scheduler).__name__ == schedulers.TABLE[name][0]


@pytest.mark.parametrize(
    ("name", "class_name", "option"),
    [
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("dpmpp_2m_sde_exponential", "DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("Euler a", "EulerAncestralDiscreteScheduler", {}),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", {}),
        ("k_euler", "EulerDiscreteScheduler", {}),
        ("euler_beta", "EulerDiscreteScheduler", {"use_beta_sigmas": True}),
        ("euler_trailing", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("uni_pc", "UniPCMultistepScheduler", {}),
        ("DDIMScheduler", "DDIMScheduler", {}),
    ],
)
def test_other_spellings_and_suffixes(name: str, class_name: str, option: dict[str, Any]) -> None:
    scheduler = schedulers.build(name, tiny.sd().scheduler)
    assert type(scheduler).__name__ == class_name
    assert {entry: scheduler.config[entry] for entry in option} == option
    assert scheduler.config.beta_end == 0.012  # the base's own noise schedule stays


def test_a_suffix_replaces_the_bases_spacing_and_none_is_a_fresh_copy() -> None:
    karras = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    beta = schedulers.build("euler_beta", karras).config
    assert beta.use_beta_sigmas and not beta.use_karras_sigmas
    again = schedulers.build(None, karras)
    assert again is not karras and again.config == karras.config


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("eulr", "did you mean euler or euler_a"),
        ("DDIMSchedular", "did you mean DDIMScheduler"),
        ("zzz", "known are ddim, ddpm"),
        ("ddim_karras", "DDIMScheduler has no use_karras_sigmas"),
    ],
)
def test_unknown_schedulers(name: str, sentence: str) -> None:
    with pytest.raises(MahlstickError, match=sentence):
        schedulers.build(name, tiny.sd().scheduler)


# Prompts


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("a red fox", [("a red fox", 1.0)]),
        ("a (red:1.5) fox", [("a ", 1.0), ("red", 1.5), (" fox", 1.0)]),
        ("a (red) fox", [("a (red) fox", 1.0)]),
        (r"\(red:1.5\)", [("(red:1.5)", 1.0)]),
        ("(a (red:1.5) fox:2)", [("a ", 2.0), ("red", 3.0), (" fox", 2.0)]),
        ("time 12:30) and (so on", [("time 12:30) and (so on", 1.0)]),
        ("(blue sky :.5)", [("blue sky ", 0.5)]),
        ("", []),
    ],
)
def test_weights_are_parsed(prompt: str, fragments: list[tuple[str, float]]) -> None:
    assert prompts.parse_weights(prompt) == fragments


@given(st.text(alphabet="ab ():.1\\-", max_size=30))
def test_the_parser_takes_any_text(prompt: str) -> None:
    try:
        fragments = prompts.parse_weights(prompt)
    except MahlstickError as error:
        assert "outside 0 to 10" in str(error)
    else:
        assert all(0 <= weight <= prompts.MAX_WEIGHT**15 for _, weight in fragments)


@pytest.mark.parametrize("build", [tiny.sd, tiny.sdxl])
def test_encodings(build: Any) -> None:
    pipe = build()
    assert prompts.encode(pipe, "a (red) fox", None, True) == {"prompt": "a (red) fox", "negative_prompt": None}
    theirs = pipe.encode_prompt(
        "red fox", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt="blur"
    )
    ours = prompts._encode_texts(pipe, ["red fox", "blur"])
    for mine, reference in zip([*ours[0], *ours[1]], theirs, strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("build", [tiny.sd, tiny.sdxl])
def test_weighted_and_long_prompts_reach_the_picture(build: Any) -> None:
    pipe = build()
    window = pipe.tokenizer.model_max_length

    def image(prompt: str, negative: str | None = None) -> Any:
        arguments = prompts.encode(pipe, prompt, negative, guided=True)
        generator = torch.Generator().manual_seed(0)
        return pipe(**arguments, num_inference_steps=2, generator=generator, output_type="np").images

    assert not np.array_equal(image("red fox"), image("(red:1.5) fox"))
    assert not np.array_equal(image("(red:0.2) fox"), image("(red:1.5) fox"))
    long = "a red fox, " * 20
    arguments = prompts.encode(pipe, long + "blue", "(bad:1.2)", guided=True)
    assert arguments["prompt_embeds"].shape == arguments["negative_prompt_embeds"].shape
    assert arguments["prompt_embeds"].shape[1] % window == 0 and arguments["prompt_embeds"].shape[1] > window
    assert not np.array_equal(image(long + "blue"), image(long + "green"))  # what lies behind the window counts


def test_sdxl_without_a_negative_prompt_is_zeros_as_in_diffusers() -> None:
    arguments = prompts.encode(tiny.sdxl(), "(red:1.5) fox", None, guided=True)
    assert not arguments["negative_prompt_embeds"].any() and not arguments["negative_pooled_prompt_embeds"].any()
