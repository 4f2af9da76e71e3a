"""AnimateDiff-Evolved's nodes and mahlstick's own: what they make of a model is what the units make by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

import mahlstick as ms
from benchmarks import tiny
from mahlstick.adapters.context import Context
from mahlstick.nodes import folders
from mahlstick.nodes.builtin import control, motion, sampling, suite
from mahlstick.nodes.builtin.image_prompts import Loaded
from mahlstick.nodes.builtin.latents import EmptyLatentImage
from mahlstick.nodes.builtin.video import VHS_VideoCombine
from mahlstick.nodes.engine import Engine
from mahlstick.nodes.sampling.models import model_from_unet
from mahlstick.nodes.sampling.noise import RandomNoise, prepare_noise
from mahlstick.nodes.sampling.schedules import schedule, timestep_at
from mahlstick.nodes.schema import catalogue, node
from mahlstick.nodes.values import Clip, ClipT, ClipVision, Model, ModelT, Vae, VaeT
from mahlstick.pipelines.noise import free_init
from mahlstick.pipelines.prompts import embeddings
from mahlstick.pipelines.video import video_comment, video_info
from tests.test_motion_lora import published
from tests.test_sparse_control import reference

FRAMES = 6
NODES = catalogue(motion, suite, control, sampling)
CONTEXTS = {
    "ADE_StandardStaticContextOptions": "static",
    "ADE_StandardUniformContextOptions": "uniform",
    "ADE_LoopedUniformContextOptions": "uniform",
    "ADE_AnimateDiffUniformContextOptions": "uniform",
    "ADE_BatchedContextOptions": "static",
}


@cache
def unet() -> Any:
    """As wide as the published heads and groups need, which a file in AnimateDiff's layout does not tell."""
    return tiny.unet(
        "sd1", block_out_channels=(32, 32), norm_num_groups=32, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


@cache
def module() -> ms.MotionAdapter:
    torch.manual_seed(6)
    made = ms.MotionAdapter.from_unet(unet(), max_frames=8)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    module().save_pretrained(models / "animatediff_models" / "folder")
    module().save_pretrained(models / "animatediff_models" / "file.safetensors", layout="original")
    (models / "animatediff_motion_lora").mkdir()
    torch.save(published(module()), models / "animatediff_motion_lora" / "pan.ckpt")
    return models


@pytest.fixture(autouse=True)
def there(home: Path) -> Iterator[None]:
    with folders.using(folders.Folders(models=home)):
        yield


def run(kind: str, /, **inputs: Any) -> Any:
    """A node's first output."""
    return NODES[kind](**inputs)[0]


def model() -> Model:
    return model_from_unet(unet())


@cache
def narrow() -> Model:
    return model_from_unet(tiny.unet("sd1"))


@cache
def loaded(model_name: str) -> Any:
    return run("ADE_LoadAnimateDiffModel", model_name=model_name)


def gen2(model_name: str = "folder", context: Any = None, **dose: Any) -> Model:
    applied = run("ADE_ApplyAnimateDiffModel", motion_model=loaded(model_name), **dose)
    return run("ADE_UseEvolvedSampling", model=model(), m_models=applied, context_options=context)


def settings(found: Model) -> list[tuple[Any, ...]]:
    """All that a unit says but for its module."""
    return [tuple(value for name, value in vars(unit).items() if name != "module") for unit in found.units]


@torch.no_grad()
def output(*units: Any, frames: int = FRAMES) -> Tensor:
    inputs = tiny.unet_inputs("sd1", batch=frames)
    with ms.attach(unet(), *units):
        return unet()(**inputs).sample


# motion modules


def test_one_node_and_its_parts_make_the_same_unit() -> None:
    context = run("ADE_StandardUniformContextOptions", context_length=4, context_overlap=2)
    loras = run("ADE_AnimateDiffLoRALoader", name="pan.ckpt", strength=0.7)
    first = run(
        "ADE_AnimateDiffLoaderGen1", model=model(), model_name="file.safetensors", context_options=context,
        motion_lora=loras, scale_multival=0.8,
    )  # fmt: skip
    second = gen2("file.safetensors", context, motion_lora=loras, scale_multival=0.8)
    assert settings(first) == settings(second)
    torch.testing.assert_close(first.sigmas, second.sigmas)
    wanted = ms.Motion(first.units[0].module, scale=0.8, context=4, overlap=2, window="noise")
    assert settings(first) == settings(model().with_units(wanted))
    assert torch.equal(output(*first.units), output(*second.units))


def test_the_unit_does_what_motion_does_by_hand() -> None:
    found = output(*gen2(scale_multival=0.6).units)
    assert torch.equal(found, output(ms.Motion(module(), scale=0.6)))
    assert not torch.allclose(found, output(), atol=1e-3)
    assert not model().units, "what came in stays as it was"


def test_a_strength_may_be_a_mask() -> None:
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1.0
    multival = run("ADE_MultivalDynamic", float_val=1.5, mask_optional=mask)
    (unit,) = gen2(scale_multival=multival).units
    assert torch.equal(output(unit), output(ms.Motion(module(), scale=1.5, mask=mask)))
    (flat,) = gen2(scale_multival=multival[0]).units
    assert torch.equal(output(flat), output(unit))
    (nothing,) = gen2(scale_multival=0 * mask).units
    assert torch.equal(output(nothing), output())


def test_motion_loras_add_up() -> None:
    first = run("ADE_AnimateDiffLoRALoader", name="pan.ckpt", strength=0.7)
    both = run("ADE_AnimateDiffLoRALoader", name="pan.ckpt", strength=-0.2, prev_motion_lora=first)
    path = folders.find("animatediff_motion_lora", "pan.ckpt")
    (unit,) = gen2(motion_lora=both).units
    wanted = module().with_lora(path, 0.5).state_dict()
    for name, value in unit.module.state_dict().items():
        torch.testing.assert_close(value, wanted[name])
    assert any(not torch.equal(value, module().state_dict()[name]) for name, value in wanted.items())


def test_two_modules_act_one_after_the_other() -> None:
    first = run("ADE_ApplyAnimateDiffModelSimple", motion_model=loaded("folder"), scale_multival=0.5)
    both = run(
        "ADE_ApplyAnimateDiffModel",
        motion_model=loaded("folder"),
        start_percent=0.2,
        end_percent=0.6,
        prev_m_models=first,
    )
    units = run("ADE_UseEvolvedSampling", model=model(), m_models=both).units
    assert [(unit.scale, unit.start, unit.end, unit.window) for unit in units] == [
        (1.0, 0.2, 0.6, "noise"),
        (0.5, 0.0, 1.0, "noise"),
    ]


@pytest.mark.parametrize("name", CONTEXTS)
def test_windows_arrive(name: str) -> None:
    overlap = {} if name == "ADE_BatchedContextOptions" else {"context_overlap": 1}
    fusion = {"fuse_method": "pyramid"} if name == "ADE_AnimateDiffUniformContextOptions" else {}
    context = run(name, context_length=4, **overlap, **fusion)
    assert context == Context(4, overlap.get("context_overlap", 0), CONTEXTS[name])  # type: ignore[arg-type]
    (unit,) = gen2(context=context).units
    assert (unit.context, unit.overlap, unit.schedule) == (context.length, context.overlap, context.schedule)
    if "closed_loop" in [each.name for each in NODES[name].inputs]:
        assert run(name, closed_loop=True, **fusion).schedule == "looped"


# noise schedules


def sigmas(**config: Any) -> Tensor:
    signal = DDIMScheduler(beta_start=0.00085, beta_end=0.012, **config).alphas_cumprod
    return ((1 - signal) / signal).sqrt()


def test_noise_schedules() -> None:
    """AnimateDiff's own files bring its schedule along, modules for another base keep that of the base."""
    linear, root = sigmas(beta_schedule="linear"), sigmas(beta_schedule="scaled_linear")
    torch.testing.assert_close(gen2("file.safetensors").sigmas, linear)
    torch.testing.assert_close(gen2("folder").sigmas, model().sigmas)
    named = {"use existing": model().sigmas, "linear (HotshotXL/default)": root, "sqrt_linear (AnimateDiff)": linear}
    for name, wanted in (named | {"avg(sqrt_linear,linear)": (linear + root) / 2}).items():
        found = run("ADE_UseEvolvedSampling", model=model(), beta_schedule=name, m_models=(loaded("file.safetensors"),))
        torch.testing.assert_close(found.sigmas, wanted, rtol=1e-4, atol=1e-5)


# what is refused


@pytest.mark.parametrize(
    ("name", "inputs", "said"),
    [
        ("ADE_StandardStaticContextOptions", {"fuse_method": "relative"}, "fuse_method 'relative'.*pyramid or flat"),
        ("ADE_LoopedUniformContextOptions", {"context_stride": 2}, "context_stride"),
        ("ADE_StandardUniformContextOptions", {"start_percent": 0.5}, "start_percent"),
        ("ADE_StandardUniformContextOptions", {"use_on_equal_length": True}, "use_on_equal_length"),
        ("ADE_StandardUniformContextOptions", {"prev_context": Context(4, 1)}, "prev_context.*leave it open"),
        ("ADE_StandardUniformContextOptions", {"context_length": 4, "context_overlap": 4}, "overlap"),
        ("ADE_AnimateDiffSamplingSettings", {"noise_type": "empty", "seed_gen": "comfy"}, "noise_type: noise is"),
        ("ADE_AnimateDiffSamplingSettings", {"noise_type": "default", "seed_gen": "auto1111"}, "seed_gen: noise is"),
        (
            "ADE_AnimateDiffSamplingSettings",
            {"noise_type": "default", "seed_gen": "comfy", "noise_layers": 1},
            "noise_layers.*leave it open",
        ),
        ("ADE_LoadAnimateDiffModel", {"model_name": "../../etc/passwd"}, "leads outside"),
        ("ADE_LoadAnimateDiffModel", {"model_name": "nothing.ckpt"}, "no such model"),
        ("ADE_LoadAnimateDiffModel", {"model_name": "embedded:walk"}, "embedded:walk"),
        ("ADE_LoadAnimateDiffModel", {"model_name": "folder", "ad_settings": 1}, "ad_settings.*leave it open"),
        ("ADE_AnimateDiffLoRALoader", {"name": "nothing.ckpt"}, "no such model"),
    ],
)
def test_refusals(name: str, inputs: dict[str, Any], said: str) -> None:
    with pytest.raises(ms.MahlstickError, match=said):
        NODES[name](**inputs)


def test_schedules_of_distilled_models_are_refused() -> None:
    with pytest.raises(ms.MahlstickError, match="beta_schedule 'lcm'"):
        run("ADE_UseEvolvedSampling", model=model(), beta_schedule="lcm")


# sampling


def conditioning(seed: int) -> list[Any]:
    return [[torch.randn(1, 7, tiny.WIDTH, generator=torch.Generator().manual_seed(seed)), {}]]


def sampled(model: Model, positive: Any = None, negative: Any = None, latent: dict[str, Any] | None = None) -> Tensor:
    latent = latent or {"samples": torch.zeros(FRAMES, 4, 8, 8)}
    made = run(
        "KSampler", model=model, seed=3, steps=2, cfg=3.0, sampler_name="euler", scheduler="normal",
        positive=positive or conditioning(1), negative=negative or conditioning(2), latent_image=latent,
    )  # fmt: skip
    assert made.keys() == latent.keys()
    return made["samples"]


@torch.no_grad()
def by_hand(model: Model, unit: ms.Motion) -> Tensor:
    """What `sampled` makes, by Euler's method on the UNet with the unit clipped on."""
    levels = schedule("normal", model.sigmas, 2, sampler="euler")
    text = torch.cat([conditioning(2)[0][0], conditioning(1)[0][0]]).repeat_interleave(FRAMES, 0)
    x = prepare_noise(torch.zeros(FRAMES, 4, 8, 8), 3) * (1 + levels[0] ** 2).sqrt()
    with ms.attach(model.unet, unit, guidance=True):
        for level, lower in pairwise(levels):
            both = (x / (1 + level**2).sqrt()).repeat(2, 1, 1, 1)
            time = timestep_at(model.sigmas, level)
            uncond, cond = model.unet(both, time, encoder_hidden_states=text).sample.chunk(2)
            x = x + (lower - level) * (uncond + 3.0 * (cond - uncond))
    return x / model.latent_scale


def test_a_clip_is_sampled_in_windows() -> None:
    context = run("ADE_StandardStaticContextOptions", context_length=4, context_overlap=2)
    found = sampled(gen2(context=context))
    wanted = by_hand(model(), ms.Motion(module(), context=4, overlap=2, schedule="static"))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, sampled(model()), atol=1e-2)
    assert not torch.allclose(found, sampled(gen2()), atol=1e-2), "the windows make a difference"


def test_frames_share_noise() -> None:
    """The sampler draws what it would for latents of these places in a batch; those that have places keep them."""
    latent = {"samples": torch.zeros(FRAMES, 4, 8, 8)}
    free = run("MahlstickFreeNoise", samples=latent, context_length=4, context_overlap=2, noise_seed=3)["batch_index"]
    context = run("ADE_StandardStaticContextOptions", context_length=4, context_overlap=2)

    def animated(noise_type: str, batch_offset: int, context: Context | None = context) -> Model:
        settings = run(
            "ADE_AnimateDiffSamplingSettings", noise_type=noise_type, seed_gen="comfy", batch_offset=batch_offset
        )
        return run("ADE_UseEvolvedSampling", model=model(), context_options=context, sample_settings=settings)

    for noise_type, windowed, alone in (
        ("default", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]), ("constant", [0] * 6, [0] * 6),
        ("repeated_context", [0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5]), ("FreeNoise", free, [0, 1, 2, 3, 4, 5]),
    ):  # fmt: skip
        order = animated(noise_type, 2).noise_order
        assert order is not None and order(FRAMES, 3) == [2 + place for place in windowed]
        order = animated(noise_type, 0, None).noise_order
        assert order is not None and order(FRAMES, 3) == alone
    found = animated("FreeNoise", 0)
    torch.testing.assert_close(sampled(found), sampled(model(), latent=latent | {"batch_index": free}))
    other = latent | {"batch_index": [8, 8, 8, 9, 9, 9]}
    torch.testing.assert_close(sampled(found, latent=other), sampled(model(), latent=other))


# mahlstick's own


@cache
def clip() -> Clip:
    return Clip((tiny.tokenizer(),), (tiny.text_encoder(),))


def test_words_that_change() -> None:
    """As PromptTravel on a pipeline, and each frame is made under its own words."""
    pipe = tiny.quiet(StableDiffusionPipeline(**tiny.components("sd1")))
    ((text, options),) = run("MahlstickPromptTravel", clip=clip(), prompts="0: spring\n\n 4: winter", frames=FRAMES)
    spring, winter = embeddings(pipe, ["spring", "winter"])[0]
    assert text.shape[0] == len(options["pooled_output"]) == FRAMES
    for frame, share in enumerate((0, 0.25, 0.5, 0.75, 1, 1)):
        torch.testing.assert_close(text[frame], (1 - share) * spring + share * winter, rtol=1e-3, atol=1e-4)
    changing = sampled(model(), [[text, {}]])
    alone = sampled(model(), [[text[4:5], {}]])
    torch.testing.assert_close(changing[4:], alone[4:], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(changing[0], alone[0], atol=1e-2)


@pytest.mark.parametrize("prompts", ["", "spring", "-1: spring", "x: y"])
def test_prompts_that_are_none(prompts: str) -> None:
    with pytest.raises(ms.MahlstickError, match="prompts"):
        run("MahlstickPromptTravel", clip=clip(), prompts=prompts)


def test_free_noise_is_a_shuffle_of_the_first_window() -> None:
    latent = {"samples": torch.zeros(11, 4, 8, 8), "noise_mask": torch.ones(1, 8, 8)}
    free = run("MahlstickFreeNoise", samples=latent, context_length=4, context_overlap=1)
    order = free["batch_index"]
    assert order[:4] == [0, 1, 2, 3] and set(order) == {0, 1, 2, 3} and "batch_index" not in latent
    for start in (4, 7):
        assert sorted(order[start : start + 3]) == sorted(order[start - 4 : start - 1])
    noise = RandomNoise(5).draw(free)
    torch.testing.assert_close(noise, prepare_noise(torch.zeros(4, 4, 8, 8), 5)[order])
    with pytest.raises(ms.MahlstickError, match="context_overlap"):
        run("MahlstickFreeNoise", samples=latent, context_length=4, context_overlap=4)


def test_free_init_keeps_the_slow_part_of_the_last_pass() -> None:
    latent = {"samples": torch.zeros(FRAMES, 4, 8, 8)}
    made = torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    noise = run("MahlstickFreeInit", model=model(), noise=RandomNoise(5), samples={"samples": made}, noise_seed=6)
    signal = float(DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod[-1])
    first, fresh = RandomNoise(5).draw(latent), RandomNoise(6).draw(latent)
    torch.testing.assert_close(
        noise.draw(latent), free_init(made * 0.18215, first, fresh, signal), atol=1e-4, rtol=1e-3
    )
    assert not torch.allclose(noise.draw(latent), fresh, atol=1e-2)


def test_sparse_pictures(tmp_path: Path) -> None:
    reference("scribble").save_pretrained(tmp_path)
    net: Any = ms.load_adapter(tmp_path)
    pictures = torch.rand(2, 64, 64, 3).mul(255).floor().div(255)
    inputs = {"model": narrow(), "control_net": net, "image": pictures, "strength": 0.5}
    (unit,) = run("MahlstickSparseControl", frames="0, -2", **inputs).units
    call = tiny.unet_inputs("sd1", batch=FRAMES)
    outputs = []
    for each in (unit, ms.Control(net, pictures.movedim(-1, 1), scale=0.5, at=[0, 4])):
        with torch.no_grad(), ms.attach(narrow().unet, each):
            outputs.append(narrow().unet(**call).sample)
    torch.testing.assert_close(*outputs)
    for frames, said in (("0", "1 numbers for 2 pictures"), ("0, x", "no whole numbers")):
        with pytest.raises(ms.MahlstickError, match=said):
            run("MahlstickSparseControl", frames=frames, **inputs)
    with pytest.raises(ms.MahlstickError, match="Apply SparseCtrl"):
        run("MahlstickControl", positive=[], negative=[], control_net=net, image=pictures)


def test_sparse_latents_are_the_models_own(tmp_path: Path) -> None:
    reference("rgb").save_pretrained(tmp_path)
    net: Any = ms.load_adapter(tmp_path)
    inputs = {"model": model(), "control_net": net, "image": torch.rand(1, 64, 64, 3)}
    with pytest.raises(ms.MahlstickError, match="connect the VAE"):
        run("MahlstickSparseControl", **inputs)
    (unit,) = run("MahlstickSparseControl", vae=Vae(tiny.vae()), **inputs).units
    with torch.no_grad():
        wanted = tiny.vae().encode(2 * inputs["image"].movedim(-1, 1) - 1).latent_dist.mean * 0.18215
    torch.testing.assert_close(unit.image, wanted)


def test_a_picture_for_every_frame() -> None:
    """Each frame is as if its picture were the only one; another number of them is seen by all."""
    torch.manual_seed(5)
    adapter = ms.IPAdapter.from_unet(unet(), tokens=2, feature_dim=tiny.WIDTH)
    vision = ClipVision(tiny.image_encoder(), tiny.feature_extractor())
    pictures = torch.rand(3, 40, 32, 3)

    def made(image: Tensor, **more: Any) -> Tensor:
        return output(*run("MahlstickImagePrompt", model=model(), image=image, **more).units, frames=3)

    loaded = {"ipadapter": Loaded(adapter), "clip_vision": vision}
    each = made(pictures, **loaded)
    for frame in range(3):
        torch.testing.assert_close(
            each[frame], made(pictures[frame : frame + 1], **loaded)[frame], rtol=1e-4, atol=1e-5
        )
    assert not torch.allclose(each[1], made(pictures[:2], **loaded)[1], atol=1e-3)
    assert torch.equal(each, made(pictures, ipadapter=Loaded(adapter, vision)))
    assert torch.equal(made(pictures, weight=0.0, **loaded), output(frames=3))
    with pytest.raises(ms.MahlstickError, match="no image encoder"):
        made(pictures, ipadapter=Loaded(adapter))


def test_an_adapter_that_reads_is_told_the_prompt() -> None:
    torch.manual_seed(5)
    sizes: dict[str, Any] = {"feature_dim": tiny.WIDTH, "tokens": 2, "depth": 2, "heads": 2, "head_dim": 16}
    adapter = ms.IPAdapter.from_unet(unet(), "instruct_qformer", vocabulary=515, **sizes)
    adapter.tokenizer = tiny.tokenizer()
    loaded = Loaded(adapter, ClipVision(tiny.image_encoder(), tiny.feature_extractor()))

    def made(prompt: str) -> Tensor:
        picture = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(0))
        node = run("MahlstickImagePrompt", model=model(), image=picture, ipadapter=loaded, prompt=prompt)
        return output(*node.units, frames=1)

    assert not torch.allclose(made("ab"), made("cd"), atol=1e-4)


def test_a_control_with_mode_and_mask() -> None:
    """Without effect under a black mask; under a white one as ControlNetApplyAdvanced, but for the mode."""
    net: Any = tiny.awake(ms.ControlNet.from_unet(unet(), conditioning_embedding_out_channels=(4, 6, 6, 8)))
    texts = {"positive": conditioning(1), "negative": conditioning(2)}
    white, one = torch.ones(1, 64, 64), {"samples": torch.zeros(1, 4, 8, 8)}

    def made(kind: str, **more: Any) -> Tensor:
        both = NODES[kind](**texts, control_net=net, image=torch.ones(1, 64, 64, 3), **more)
        return sampled(model(), *both, latent=one)

    plain, followed = made("ControlNetApplyAdvanced", strength=0.0), made("ControlNetApplyAdvanced")
    torch.testing.assert_close(made("MahlstickControl", mask=0 * white), plain)
    torch.testing.assert_close(made("MahlstickControl", mask=white), followed)
    assert not torch.allclose(followed, plain, atol=1e-2)
    assert not torch.allclose(made("MahlstickControl", mode="control"), followed, atol=1e-3)
    assert texts["positive"][0][1] == {}, "what came in stays as it was"


# as a workflow


@node("tests")
def TinyModels() -> tuple[ModelT, ClipT, VaeT]:
    """What CheckpointLoaderSimple gives."""
    return model(), clip(), Vae(tiny.vae())


def test_a_workflow_from_words_to_a_file(home: Path, tmp_path: Path) -> None:
    sampler = {"seed": 3, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    windows = {"context_length": 4, "context_overlap": 1, "fuse_method": "pyramid"}
    words = {"clip": ["1", 1], "prompts": "0: fox\n5: hen", "frames": FRAMES}
    steps: dict[str, tuple[str, dict[str, Any]]] = {
        "1": ("TinyModels", {}),
        "2": ("ADE_LoadAnimateDiffModel", {"model_name": "folder"}),
        "3": ("ADE_ApplyAnimateDiffModelSimple", {"motion_model": ["2", 0]}),
        "4": ("ADE_StandardStaticContextOptions", windows),
        "5": ("ADE_UseEvolvedSampling", {"model": ["1", 0], "beta_schedule": "autoselect", "m_models": ["3", 0],
                                         "context_options": ["4", 0]}),
        "6": ("MahlstickPromptTravel", words),
        "7": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": FRAMES}),
        "8": ("MahlstickFreeNoise", {"samples": ["7", 0], "context_length": 4, "context_overlap": 1, "noise_seed": 1}),
        "9": ("KSampler", {"model": ["5", 0], "positive": ["6", 0], "negative": ["6", 0], "latent_image": ["8", 0],
                           **sampler}),
        "10": ("VHS_VideoCombine", {"images": ["9", 0], "vae": ["1", 2], "frame_rate": 8, "loop_count": 0,
                                    "filename_prefix": "walk", "format": "video/h264-mp4", "pingpong": False,
                                    "save_output": True, "pix_fmt": "yuv420p", "crf": 19}),
    }  # fmt: skip
    prompt = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in steps.items()}
    known = NODES | {each.name: each for each in (TinyModels, EmptyLatentImage, VHS_VideoCombine)}
    with folders.using(folders.Folders(models=home, output=tmp_path)):
        outcome = Engine(known).run(prompt)
    assert outcome.error is None
    (shown,) = outcome.ui["10"]["gifs"]
    assert video_info(tmp_path / shown["filename"]).frames == FRAMES
    assert json.loads(video_comment(tmp_path / shown["filename"]) or "")["prompt"] == prompt
