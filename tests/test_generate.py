"""generate, recipes and replay, loading: on tiny random models."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import mahlstick as ms
from mahlstick.adapters import formats
from mahlstick.errors import MahlstickError
from mahlstick.pipelines.generate import generate, replay
from mahlstick.pipelines.load import Loader, adapter_path, for_task, load_pipeline
from mahlstick.pipelines.recipe import fingerprint, read_recipe
from mahlstick.pipelines.request import ControlSpec, ImagePromptSpec, Request
from tests import tiny

STEPS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def loader() -> Loader:
    return Loader()


def request_for(models: Path, **fields: Any) -> Request:
    return Request(**{"prompt": "red fox", "base": str(models / "base"), "seed": 5, "steps": STEPS, **fields})


def with_units(models: Path, **fields: Any) -> Request:
    control = ControlSpec(adapter=models / "net", image=models / "drawing.png", scale=0.9, end=0.8)
    reference = ImagePromptSpec(adapter=models / "ip", images=[models / "reference.png"], scale=0.6)
    return request_for(models, controls=[control], image_prompts=[reference], **fields)


def same(a: Any, b: Any) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The same pictures as without us


def test_words_alone_equal_the_plain_pipeline(models: Path, loader: Loader) -> None:
    ours = generate(request_for(models, negative_prompt="blur", guidance=4.0), loader=loader, progress=False)
    pipe = load_pipeline(models / "base")
    theirs = pipe("red fox", negative_prompt="blur", guidance_scale=4.0, num_inference_steps=STEPS, generator=seeded(5))
    assert same(ours.images[0], theirs.images[0])
    assert ours.images[0].size == (tiny.SIDE, tiny.SIDE)


def test_xl_with_a_scheduler_equals_the_plain_pipeline() -> None:
    pipe = tiny.sdxl()
    before = pipe.scheduler, dict(pipe.scheduler.config)
    request = Request(prompt="red fox", seed=5, steps=STEPS, scheduler="dpm++_2m_karras", width=72, height=64)
    ours = generate(request, pipe=pipe, progress=False).images[0]
    assert pipe.scheduler is before[0] and dict(pipe.scheduler.config) == before[1]
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    assert same(ours, pipe("red fox", num_inference_steps=STEPS, generator=seeded(5), width=72, height=64).images[0])


def test_img2img_equals_the_plain_pipeline(models: Path, loader: Loader) -> None:
    init = tiny.picture(seed=3)
    ours = generate(request_for(models, init=init, strength=0.7), loader=loader, progress=False).images[0]
    pipe = for_task(load_pipeline(models / "base"), "img2img")
    theirs = pipe("red fox", image=init, strength=0.7, num_inference_steps=STEPS, generator=seeded(5)).images[0]
    assert same(ours, theirs)


def test_units_equal_attach(models: Path, loader: Loader) -> None:
    ours = generate(with_units(models), loader=loader, progress=False).images[0]
    pipe = load_pipeline(models / "base")
    net, ip = ms.ControlNet.from_pretrained(models / "net"), ms.IPAdapter.from_pretrained(models / "ip")
    control = ms.Control(net, models / "drawing.png", scale=0.9, end=0.8)
    with ms.attach(pipe, control, ms.ImagePrompt(ip, [models / "reference.png"], scale=0.6)):
        theirs = pipe("red fox", num_inference_steps=STEPS, generator=seeded(5)).images[0]
    assert same(ours, theirs)
    assert not same(ours, generate(request_for(models), loader=loader, progress=False).images[0])


def test_adapters_and_pictures_as_objects(models: Path, loader: Loader) -> None:
    pipe = load_pipeline(models / "base")
    net = ms.ControlNet.from_pretrained(models / "net")
    spec = ControlSpec(adapter=net, image=np.asarray(Image.open(models / "drawing.png")), scale=0.9, end=0.8)
    by_object = generate(Request(prompt="red fox", seed=5, steps=STEPS, controls=[spec]), pipe=pipe, progress=False)
    by_path = generate(with_units(models).model_copy(update={"image_prompts": []}), loader=loader, progress=False)
    assert same(by_object.images[0], by_path.images[0])
    assert not pipe.unet._forward_pre_hooks and not pipe.unet._forward_hooks


def test_an_annotator_makes_the_control_picture(models: Path, loader: Loader) -> None:
    from mahlstick import annotators

    edges = annotators.annotate("canny", models / "reference.png", low=50)
    size = {"width": 96, "height": 40}
    given = ControlSpec(adapter=models / "net", image=edges)
    asked = ControlSpec(adapter=models / "net", image=models / "reference.png", annotator="canny", options={"low": 50})
    with pytest.warns(UserWarning, match=r"controls\[0\]: 90x40 is stretched to 96x40"):
        results = [
            generate(request_for(models, controls=[spec], **size), loader=loader, progress=False)
            for spec in (given, asked)
        ]
    assert same(results[0].images[0], results[1].images[0])
    with pytest.raises(MahlstickError, match=r"controls\[0\]: annotator 'cany' is unknown"):
        generate(request_for(models, controls=[asked.model_copy(update={"annotator": "cany"})]))


def test_the_inpaint_annotator_conditions_as_its_net_was_trained(models: Path, loader: Loader, tmp_path: Path) -> None:
    from mahlstick.annotators import inpaint_condition

    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    photo, hole = tiny.picture(seed=4), tiny.picture(seed=4)
    hole.putalpha(Image.eval(mask, lambda level: 255 - level))
    pipe = load_pipeline(models / "base")
    condition = inpaint_condition(photo, mask)
    assert condition.min() == -1
    with ms.attach(pipe, ms.Control(ms.ControlNet.from_pretrained(models / "net"), condition)):
        theirs = pipe("red fox", num_inference_steps=STEPS, generator=seeded(5)).images[0]
    for fields in ({"image": photo, "options": {"mask": mask}}, {"image": hole}):
        spec = ControlSpec(adapter=models / "net", annotator="inpaint", **fields)
        result = generate(request_for(models, controls=[spec]), loader=loader, progress=False)
        assert same(result.images[0], theirs)
    [path] = result.save(tmp_path / "out.png")
    assert same(replay(path, loader=loader, progress=False)[0], theirs)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, r"controls\[0\]: inpaint needs a part that is repainted"),
        ({"mask": Image.new("L", (8, 8), 255)}, r"controls\[0\]: inpaint needs .* one that is kept"),
        ({"low": 3}, r"controls\[0\]: annotator inpaint has no option 'low'; it takes mask"),
    ],
)
def test_what_the_inpaint_annotator_refuses(models: Path, options: dict[str, Any], sentence: str) -> None:
    spec = ControlSpec(adapter=models / "net", image=tiny.picture(), annotator="inpaint", options=options)
    with pytest.raises(MahlstickError, match=sentence):
        generate(request_for(models, controls=[spec]))


def test_windows_and_the_shape_of_references_reach_the_units(models: Path, loader: Loader) -> None:
    control = {"adapter": models / "net", "image": models / "drawing.png", "end": 0.4, "window": "noise"}
    reference = {"adapter": models / "ip", "images": [models / "reference.png"], "end": 0.4, "window": "noise"}
    reference["resize"] = "pad"
    ours = generate(request_for(models, controls=[control], image_prompts=[reference]), loader=loader, progress=False)
    pipe = load_pipeline(models / "base")
    net, ip = ms.ControlNet.from_pretrained(models / "net"), ms.IPAdapter.from_pretrained(models / "ip")
    units = [
        ms.Control(net, models / "drawing.png", end=0.4, window="noise"),
        ms.ImagePrompt(ip, models / "reference.png", end=0.4, window="noise", resize="pad"),
    ]
    with ms.attach(pipe, *units):
        theirs = pipe("red fox", num_inference_steps=STEPS, generator=seeded(5)).images[0]
    assert same(ours.images[0], theirs)


def test_a_unit_that_does_not_fit_is_named(models: Path, loader: Loader) -> None:
    good = {"adapter": models / "net", "image": models / "drawing.png"}
    with pytest.raises(MahlstickError, match=r"^controls\[1\]: .*scale"):
        generate(request_for(models, controls=[good, {**good, "scale": [1.0, 0.5]}]), loader=loader, progress=False)
    pipe = loader.pipeline(str(models / "base"))
    assert not pipe.unet._forward_pre_hooks and not pipe.unet._forward_hooks
    odd = {"adapter": models / "ip", "images": [models / "reference.png"], "blocks": {"attic": 1.0}}
    with pytest.raises(MahlstickError, match=r"^image_prompts\[0\]: .*attic"):
        generate(request_for(models, image_prompts=[odd]), loader=loader, progress=False)


# Seeds and batches


def test_pictures_equal_their_solo_runs(models: Path, loader: Loader) -> None:
    together = generate(with_units(models, images=3), loader=loader, progress=False)
    assert together.recipe.request.seeds == [5, 6, 7]
    alone = generate(with_units(models, seed=6), loader=loader, progress=False)
    assert same(together.images[1], alone.images[0])
    listed = generate(with_units(models, seed=None, seeds=[7, 6]), loader=loader, progress=False)
    assert same(listed.images[0], together.images[2]) and same(listed.images[1], together.images[1])


def test_a_batch_equals_solo_runs_up_to_rounding(models: Path, loader: Loader) -> None:
    fields = {"images": 3, "scheduler": "euler_a"}
    solo, batch = (
        generate(with_units(models, batch=count, **fields), loader=loader, progress=False).images for count in (1, 3)
    )
    for a, b in zip(solo, batch, strict=True):
        assert np.abs(np.int16(a) - np.int16(b)).max() <= 1  # of 255


def test_an_open_seed_is_drawn_and_recorded(models: Path, loader: Loader) -> None:
    first, second = (generate(request_for(models, seed=None), loader=loader, progress=False) for _ in range(2))
    assert first.recipe.request.seeds != second.recipe.request.seeds
    again = request_for(models, seed=None, seeds=first.recipe.request.seeds)
    assert same(generate(again, loader=loader, progress=False).images[0], first.images[0])


def test_callback_and_progress(models: Path, loader: Loader, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return tensors

    generate(request_for(models), loader=loader, progress=False, callback=callback)
    assert seen == [0, 1, 2] and "3/3" not in capfd.readouterr().err
    generate(request_for(models), loader=loader)
    assert "3/3" in capfd.readouterr().err


# Inpainting


@pytest.mark.parametrize("size", [(64, 64), (61, 90)])
def test_inpainting_leaves_what_is_not_masked(models: Path, loader: Loader, size: tuple[int, int]) -> None:
    init = tiny.picture(*size, seed=4)
    mask = Image.new("L", size)
    mask.paste(255, (10, 10, 40, 40))
    result = generate(request_for(models, init=init, mask=mask), loader=loader, progress=False).images[0]
    outside = np.asarray(mask) == 0
    assert result.size == size
    assert same(np.asarray(result)[outside], np.asarray(init)[outside])
    assert (np.asarray(result)[~outside] != np.asarray(init)[~outside]).mean() > 0.9


def test_inpainting_with_units_and_a_nine_channel_unet(models: Path) -> None:
    pipe = tiny.sd(in_channels=9)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    request = with_units(models, init=tiny.picture(seed=4), mask=mask)
    result = generate(request, pipe=pipe, progress=False).images[0]
    assert same(result.crop((32, 0, 64, 64)), tiny.picture(seed=4).crop((32, 0, 64, 64)))
    with pytest.raises(MahlstickError, match="inpainting model; give init and mask"):
        generate(request_for(models), pipe=pipe)


# Recipes


def test_replay_is_bit_equal_and_needs_no_pictures(models: Path, tmp_path: Path) -> None:
    drawing = shutil.copy(models / "drawing.png", tmp_path / "drawing.png")
    mask = Image.linear_gradient("L")
    control = ControlSpec(adapter=models / "net", image=drawing, mask=mask, mode="control", scale=0.9)
    request = with_units(models, prompt="(red:1.3) fox", images=3, batch=2, scheduler="euler_a")
    result = generate(request.model_copy(update={"controls": [control]}), progress=False)
    paths = result.save(tmp_path / "out.png")
    Path(drawing).unlink()
    assert [path.name for path in paths] == ["out-1.png", "out-2.png", "out-3.png"]
    for path, image in zip(paths, result.images, strict=True):
        assert same(Image.open(path), image)
        [again] = replay(path, progress=False)
        assert same(again, image)


def test_replay_runs_on_as_many_threads_as_the_picture_did(models: Path, loader: Loader, tmp_path: Path) -> None:
    request = request_for(models, width=256, height=256)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        result = generate(request, loader=loader, progress=False)
        torch.set_num_threads(1)
        [again] = replay(result.save(tmp_path / "out.png")[0], progress=False)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert result.recipe.threads == 2
    assert same(again, result.images[0])


def test_replay_of_inpainting_at_any_size(models: Path, tmp_path: Path) -> None:
    mask = Image.new("L", (61, 90), 200)
    result = generate(request_for(models, init=tiny.picture(61, 90), mask=mask), progress=False)
    [path] = result.save(tmp_path / "out.png")
    assert same(replay(path, progress=False)[0], result.images[0])


def test_the_parameters_chunk_reads_as_elsewhere(models: Path, loader: Loader, tmp_path: Path) -> None:
    result = generate(request_for(models, negative_prompt="blur", scheduler="euler"), loader=loader, progress=False)
    [path] = result.save(tmp_path / "out.png")
    with Image.open(path) as picture:
        lines = picture.text["parameters"].splitlines()  # type: ignore[attr-defined]
    assert lines[:2] == ["red fox", "Negative prompt: blur"]
    assert lines[2].startswith("Steps: 3, Sampler: euler, CFG scale: 7.5, Seed: 5, Size: 64x64, Model: base")


def test_folders_take_the_next_free_number(models: Path, loader: Loader, tmp_path: Path) -> None:
    result = generate(request_for(models), loader=loader, progress=False)
    saved = [result.save(tmp_path / "out")[0].name for _ in range(2)]
    (tmp_path / "out" / "0041.png").touch()
    assert [*saved, result.save(tmp_path / "out")[0].name] == ["0001.png", "0002.png", "0042.png"]
    with pytest.raises(MahlstickError, match=r"x\.jpg: the recipe is kept in PNG"):
        result.save(tmp_path / "x.jpg")


def test_replay_knows_changed_missing_and_moved_weights(models: Path, tmp_path: Path) -> None:
    own = tmp_path / "models"
    shutil.copytree(models, own)
    [path] = generate(with_units(own), progress=False).save(tmp_path / "out.png")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(own / "net", tmp_path / "elsewhere" / "net")
    with pytest.raises(MahlstickError, match=r"out\.png: .*net is not there"):
        replay(path)
    assert same(replay(path, weights=tmp_path / "elsewhere", progress=False)[0], Image.open(path))
    config, state = formats.read(tmp_path / "elsewhere" / "net", "controlnet")
    formats.write(own / "net", "controlnet", config, {name: value * 1.01 for name, value in state.items()})
    with pytest.raises(MahlstickError, match=r"out\.png: .*net has changed since"):
        replay(path)


def test_replay_knows_a_changed_image_encoder(models: Path, tmp_path: Path) -> None:
    encoder = tiny.sd().image_encoder
    encoder.save_pretrained(tmp_path / "encoder")
    spec = ImagePromptSpec(
        adapter=models / "ip", image_encoder=str(tmp_path / "encoder"), images=[models / "reference.png"]
    )
    result = generate(request_for(models, image_prompts=[spec]), progress=False)
    [path] = result.save(tmp_path / "out.png")
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "encoder", tmp_path / "moved" / "encoder")
    with pytest.raises(MahlstickError, match=r"encoder is not there"):
        replay(path)
    assert same(replay(path, weights=tmp_path / "moved", progress=False)[0], result.images[0])
    with torch.no_grad():
        encoder.visual_projection.weight += 1
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(MahlstickError, match=r"encoder has changed since"):
        replay(path)


def test_a_fingerprint_covers_what_is_loaded_and_nothing_else(models: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(models / "base", base)
    before = fingerprint(base)
    for idle in ("whole.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/unet.bin", "more/a.bin"):
        (base / idle).parent.mkdir(exist_ok=True)
        (base / idle).write_bytes(b"idle")
    assert fingerprint(base) == before
    for part in (
        "scheduler/scheduler_config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "tokenizer/tokenizer_config.json",
    ):
        kept = (base / part).read_bytes()
        (base / part).write_bytes(kept + b" ")
        assert fingerprint(base) != before, part
        (base / part).write_bytes(kept)


def test_a_recipe_without_fingerprints_is_refused(models: Path, loader: Loader, tmp_path: Path) -> None:
    result = generate(with_units(models), loader=loader, progress=False)
    for name in ("base", "net", "ip"):
        files = {path: value for path, value in result.recipe.files.items() if path != str(models / name)}
        recipe = result.recipe.model_copy(update={"files": files})
        [path] = type(result)(result.images, recipe).save(tmp_path / "out.png")
        with pytest.raises(MahlstickError, match=rf"out\.png: its recipe has no fingerprint of .*{name}; it was"):
            replay(path)


def test_pictures_without_a_usable_recipe(models: Path, loader: Loader, tmp_path: Path) -> None:
    with pytest.raises(MahlstickError, match=r"drawing\.png: holds no recipe"):
        replay(models / "drawing.png")
    with pytest.raises(MahlstickError, match=r"nope\.png: no such file"):
        replay(tmp_path / "nope.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(MahlstickError, match=r"text\.png: not a readable picture"):
        replay(tmp_path / "text.png")
    ms.pictures.save_png(tiny.picture(), tmp_path / "odd.png", {"mahlstick": '{"version": 9}'})
    with pytest.raises(MahlstickError, match=r"odd\.png: its recipe cannot be read \(version: 9 is not known here"):
        replay(tmp_path / "odd.png")


def test_what_lived_in_memory(models: Path, loader: Loader, tmp_path: Path) -> None:
    pipe = tiny.sd()
    result = generate(Request(prompt="fox", seed=1, steps=2), pipe=pipe, progress=False)
    [path] = result.save(tmp_path / "pipe.png")
    with pytest.raises(MahlstickError, match="passed as an object; give it again as pipe="):
        replay(path)
    assert same(replay(path, pipe=pipe, progress=False)[0], result.images[0])
    spec = ControlSpec(adapter=ms.ControlNet.from_pretrained(models / "net"), image=models / "drawing.png")
    [path] = generate(request_for(models, controls=[spec]), loader=loader, progress=False).save(tmp_path / "net.png")
    with pytest.raises(MahlstickError, match="was made with ControlNet in memory; save adapters to a file"):
        replay(path)


def test_replay_says_what_differs(models: Path, loader: Loader, tmp_path: Path) -> None:
    result = generate(request_for(models), loader=loader, progress=False)
    older = result.recipe.model_copy(update={"versions": {**result.recipe.versions, "torch": "1.0"}})
    [path] = type(result)(result.images, older).save(tmp_path / "out.png")
    with pytest.warns(
        UserWarning, match=rf"the last bits may differ \(torch 1.0 then, {torch.__version__.split('+')[0]}"
    ):
        replay(path, progress=False)


def test_the_recipe_names_what_ran(models: Path, loader: Loader) -> None:
    recipe = generate(with_units(models), loader=loader, progress=False).recipe
    assert set(recipe.files) == {str(models / name) for name in ("base", "net", "ip")}
    assert all(value.startswith("sha256:") for value in recipe.files.values())
    assert (recipe.device, recipe.dtype) == ("cpu", "float32")
    assert {"torch", "diffusers", "transformers", "compel", "pillow"} < set(recipe.versions)
    assert recipe.request.controls[0].image.startswith("data:image/png;base64,")


# What does not do is said before anything is loaded


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"controls": [{"adapter": "ip", "image": "drawing.png"}]}, r"controls\[0\]: .*ip holds a ip_adapter"),
        (
            {"controls": [{"adapter": "net", "image": "nope.png"}]},
            r"controls\[0\] picture '.*nope\.png' does not exist",
        ),
        ({"controls": [{"adapter": "gone", "image": "drawing.png"}]}, "gone does not exist"),
        (
            {"image_prompts": [{"adapter": "ip", "images": ["base"]}]},
            r"image_prompts\[0\] picture '.*base' is a folder",
        ),
        ({"init": "nope.png"}, r"init '.*nope\.png' does not exist"),
        ({"init": "drawing.png", "mask": "nope.png"}, r"mask '.*nope\.png' does not exist"),
    ],
)
def test_bad_inputs(models: Path, fields: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def path(value: Any) -> Any:
        return str(models / value) if isinstance(value, str) else [str(models / item) for item in value]

    placed = {
        name: path(value)
        if isinstance(value, str)
        else [{key: path(item) for key, item in spec.items()} for spec in value]
        for name, value in fields.items()
    }
    request = request_for(models, **placed)
    monkeypatch.setattr(Loader, "pipeline", lambda *_, **__: pytest.fail("loaded first"))
    with pytest.raises(MahlstickError, match=sentence):
        generate(request)


def test_another_bases_adapter_is_refused_from_its_header(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ms.ControlNet.from_unet(tiny.sdxl().unet).save_pretrained(tmp_path / "xl")
    request = request_for(models, controls=[ControlSpec(adapter=tmp_path / "xl", image=models / "drawing.png")])
    monkeypatch.setattr(Loader, "pipeline", lambda *_, **__: pytest.fail("loaded first"))
    with pytest.raises(MahlstickError, match=r"xl: this ControlNet was made for SDXL.*the UNet is another base"):
        generate(request)


@pytest.mark.parametrize(
    ("scheduler", "steps", "sentence"),
    [("ddim", 1000, "steps: 1000 are too many for DDIMScheduler"), ("lcm", 60, "steps: 60 do not do for LCMScheduler")],
)
def test_more_steps_than_a_scheduler_has(
    models: Path, loader: Loader, scheduler: str, steps: int, sentence: str
) -> None:
    with pytest.raises(MahlstickError, match=sentence):
        generate(request_for(models, scheduler=scheduler, steps=steps), loader=loader)


def test_nan_weights_are_named(models: Path) -> None:
    pipe = tiny.sd()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(MahlstickError, match="gave NaN pictures"):
        generate(Request(prompt="fox", steps=1), pipe=pipe, progress=False)


# Loading


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("/nowhere/model", "/nowhere/model: no such file or folder; give 'embedded'"),
        ("gone.safetensors", r"gone\.safetensors: no such file or folder"),
        ("{models}/net", r"net: no model_index\.json in it"),
        ("{models}/base/unet/diffusion_pytorch_model.safetensors", "is a unet, not a base model"),
        ("{broken}", "broken: cannot be loaded"),
        ("{flux}", "flux: a FluxPipeline has no UNet"),
        ("{listed}", r"model_index\.json: holds a list, not an object"),
        ("owner/name", "owner/name: not a folder here, and the hub did not give it"),
    ],
)
def test_bases_that_cannot_be_loaded(
    models: Path, tmp_path: Path, source: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": []}')
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "model_index.json").write_text("[]")
    shutil.copytree(models / "base", tmp_path / "broken")
    weights = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    places = {"models": models, **{name: tmp_path / name for name in ("broken", "flux", "listed")}}
    with pytest.raises(MahlstickError, match=sentence) as caught:
        load_pipeline(source.format(**places))
    assert "\n" not in str(caught.value)


def test_a_broken_unet_config_is_named(models: Path, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"in_channels": ')
    with pytest.raises(MahlstickError, match=r"config\.json: not valid JSON; download the model again"):
        generate(with_units(models, base=str(tmp_path)))


def original_unet(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tiny UNet (two levels of one layer) under the names of the original Stable Diffusion files."""
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    parts = {
        "norm1.": "in_layers.0.",
        "conv1.": "in_layers.2.",
        "time_emb_proj.": "emb_layers.1.",
        "norm2.": "out_layers.0.",
        "conv2.": "out_layers.3.",
        "conv_shortcut.": "skip_connection.",
    }
    renamed = {}
    for name, value in state.items():
        module = next(ours for ours in modules if name.startswith(f"{ours}."))
        inner = name.removeprefix(f"{module}.")
        if "resnets" in module:
            inner = next(inner.replace(ours, theirs) for ours, theirs in parts.items() if inner.startswith(ours))
        renamed[f"model.diffusion_model.{modules[module]}.{inner}"] = value
    assert len(renamed) == len(state)
    return renamed


def test_a_single_file_base_with_local_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    whole = tiny.sd(**levels)
    whole.save_pretrained(tmp_path / "base")
    save_file(original_unet(whole.unet.state_dict()), tmp_path / "model.safetensors")
    parts = {name: part for name, part in whole.components.items() if name not in ("unet", "scheduler")}
    single = load_pipeline(tmp_path / "model.safetensors", config=str(tmp_path / "base"), **parts)
    assert type(single).__name__ == "StableDiffusionPipeline"
    for name, value in whole.unet.state_dict().items():
        assert torch.equal(single.unet.state_dict()[name], value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        MahlstickError, match=r"model\.safetensors: its configs and tokenizer come from the hub.*config="
    ):
        load_pipeline(tmp_path / "model.safetensors")


def test_devices_and_dtypes_that_are_not(models: Path) -> None:
    with pytest.raises(MahlstickError, match="device 'quantum' is not available"):
        load_pipeline(models / "base", device="quantum")
    with pytest.raises(MahlstickError, match="dtype 'int3' is unknown"):
        load_pipeline(models / "base", dtype="int3")
    assert load_pipeline(models / "base", dtype="bf16").unet.dtype == torch.bfloat16


def test_tasks_share_modules_but_no_scheduler() -> None:
    pipe = tiny.sd()
    assert load_pipeline(pipe) is pipe
    for task, name in (("img2img", "Img2Img"), ("inpaint", "Inpaint")):
        other = load_pipeline(pipe, task=task)
        assert type(other).__name__ == f"StableDiffusion{name}Pipeline"
        assert other.unet is pipe.unet and other.scheduler is not pipe.scheduler
        assert type(load_pipeline(other)) is type(pipe)


def test_a_loader_loads_once_until_the_file_changes(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "net", tmp_path / "net")
    loader = Loader()
    first = loader.adapter(str(tmp_path / "net"))
    assert loader.adapter(str(tmp_path / "net")) is first
    config, state = formats.read(tmp_path / "net", "controlnet")
    formats.write(tmp_path / "net", "controlnet", config, state)
    assert loader.adapter(str(tmp_path / "net")) is not first


def test_a_loader_loads_in_the_dtype_asked_for(models: Path, tmp_path: Path) -> None:
    ms.ControlNet.from_pretrained(models / "net").half().save_pretrained(tmp_path / "half")
    loader, source = Loader(), str(tmp_path / "half")
    assert loader.adapter(source, dtype=torch.float32).dtype == torch.float32
    assert loader.adapter(source, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_units_run_in_the_dtype_of_the_base(models: Path, tmp_path: Path) -> None:
    ms.ControlNet.from_pretrained(models / "net").half().save_pretrained(tmp_path / "half")
    loader = Loader()
    spec = ControlSpec(adapter=tmp_path / "half", image=models / "drawing.png")
    generate(request_for(models, controls=[spec]), loader=loader, progress=False)
    before = loader._adapter.cache_info().hits
    loader.adapter(str(tmp_path / "half"), dtype=torch.float32)
    assert loader._adapter.cache_info().hits == before + 1


def test_a_loader_keeps_no_unet_alive(models: Path) -> None:
    loader, unet = Loader(), tiny.sd().unet
    loader.adapter(str(models / "net"), base=unet)
    gone = weakref.ref(unet)
    del unet
    gc.collect()
    assert gone() is None


def test_a_difference_file_is_added_to_the_base_given(models: Path, tmp_path: Path) -> None:
    unet, loader = tiny.sd().unet, Loader()
    config, state = formats.read(models / "net", "controlnet")
    own = unet.state_dict()
    difference = {k: v - own[k] if k in own and not k.startswith("controlnet_") else v for k, v in state.items()}
    path = formats.write(tmp_path / "net.safetensors", "controlnet", config, difference, "original")
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    save_file(tensors | {"difference": torch.empty(0)}, path, metadata)
    assert formats.inspect(path).layout == "original difference"
    net = loader.adapter(str(path), base=unet)
    for name, value in net.state_dict().items():
        assert torch.allclose(value, state[name], atol=1e-6)


def test_names_of_embedded_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mahlstick.pipelines.load.files", lambda _: tmp_path)
    for folder in ("controlnet-lineart", "controlnet-mask+pose", "ip-adapter", "ip-adapter-plus", "unet"):
        (tmp_path / "embedded" / folder).mkdir(parents=True)
    (tmp_path / "lineart").mkdir()
    monkeypatch.chdir(tmp_path)
    net = str(tmp_path / "embedded" / "controlnet-lineart")
    assert adapter_path("lineart") == adapter_path("embedded:lineart") == net
    for name in ("ip-adapter", "ip-adapter-plus"):
        assert adapter_path(name) == str(tmp_path / "embedded" / name)
    both = str(tmp_path / "embedded" / "controlnet-mask+pose")
    assert adapter_path("mask") == adapter_path("pose") == both, "one net for several controls"
    for path in ("./lineart", "owner/name", "net.safetensors"):
        assert adapter_path(path) == path
    with pytest.raises(
        MahlstickError, match=r"canny: neither .* nor an embedded adapter \(those are lineart, mask, pose, ip-adapter"
    ):
        adapter_path("canny")


def test_read_recipe_returns_the_whole_request(models: Path, loader: Loader, tmp_path: Path) -> None:
    [path] = generate(with_units(models, images=1), loader=loader, progress=False).save(tmp_path / "out.png")
    recipe = read_recipe(path)
    assert recipe.request.seeds == [5] and recipe.request.prompt == "red fox" and recipe.index == 0
