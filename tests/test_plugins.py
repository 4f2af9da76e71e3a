"""mahlstick as diffusers' own kinds of plug-in: custom pipelines and a modular-pipeline block."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

import mahlstick as ms
from mahlstick.pipelines import custom
from mahlstick.pipelines.modular import with_units
from tests import zoo


def units(unet: Any) -> list[Any]:
    """One for the whole run, and one that acts in the first of three steps."""
    control = zoo.control(unet)
    control.end = 0.5
    return [control, zoo.image_prompt(unet)]


def attached(pipe: Any, name: str, *units: Any, **options: Any) -> np.ndarray:
    with ms.attach(pipe, *units):
        return zoo.generate(pipe, name, **options)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("StableDiffusionPipeline", custom.STABLE_DIFFUSION),
        ("StableDiffusionXLPipeline", custom.STABLE_DIFFUSION_XL),
    ],
)
def test_custom_pipeline_takes_units(name: str, file: str, tmp_path: Path) -> None:
    plain = zoo.build(name)
    plain.save_pretrained(tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=file, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, custom.UnitsMixin)

    before = zoo.generate(plain, name)
    clipped = units(plain.unet)
    assert np.array_equal(zoo.generate(pipe, name), before)
    assert np.array_equal(zoo.generate(pipe, name, units=clipped), attached(plain, name, *clipped))
    assert np.array_equal(zoo.generate(pipe, name), before)


def test_mixin_serves_any_pipeline() -> None:
    class Inpaint(custom.UnitsMixin, diffusers.StableDiffusionInpaintPipeline):
        pass

    name = "StableDiffusionInpaintPipeline"
    plain = zoo.build(name)
    pipe = Inpaint(**plain.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    clipped = units(plain.unet)
    assert np.array_equal(zoo.generate(pipe, name, units=clipped), attached(plain, name, *clipped))


def test_custom_pipeline_shows_the_signature_of_diffusers() -> None:
    class Pipeline(custom.UnitsMixin, diffusers.StableDiffusionPipeline):
        pass

    class Own(custom.UnitsMixin, diffusers.StableDiffusionPipeline):
        def __call__(self, words: str) -> Any:
            return super().__call__(words, units=[])

    theirs = inspect.signature(diffusers.StableDiffusionPipeline.__call__).parameters
    ours = inspect.signature(Pipeline.__call__).parameters
    assert {name: entry for name, entry in ours.items() if name != "units"} == dict(theirs)
    assert ours["units"].default == ()
    assert list(inspect.signature(Own.__call__).parameters) == ["self", "words"]

    pipe = Pipeline(**zoo.build("StableDiffusionPipeline").components, requires_safety_checker=False)
    request = ms.Request(prompt="red fox", steps=1, width=zoo.SIZE, height=zoo.SIZE)
    assert ms.generate(request, pipe=pipe, progress=False).recipe.request.guidance == 7.5


def test_custom_pipeline_leaves_no_trace_of_a_failed_call() -> None:
    pipe = zoo.build("StableDiffusionPipeline")
    net = ms.ControlNet.from_unet(zoo.unet(**zoo.SDXL))

    class Pipeline(custom.UnitsMixin, diffusers.StableDiffusionPipeline):
        pass

    pipe = Pipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(ms.MahlstickError):
        pipe("a red fox", units=[zoo.control(pipe.unet), ms.Control(net, zoo.picture())])
    with pytest.raises(ValueError, match="strange"):
        pipe("a red fox", units=[zoo.control(pipe.unet)], output_type="strange", callback_on_step_end=strange)
    assert not pipe.unet._forward_pre_hooks


def strange(*arguments: Any) -> dict[str, Any]:
    raise ValueError("strange")


@pytest.fixture(scope="module")
def modular(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("modular")
    zoo.build("StableDiffusionXLPipeline").save_pretrained(folder)
    pipe = with_units(StableDiffusionXLAutoBlocks()).init_pipeline(str(folder))
    pipe.load_components()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("StableDiffusionXLPipeline", {}),
        ("StableDiffusionXLImg2ImgPipeline", zoo.IMAGE),
    ],
)
def test_modular_block_equals_attach(modular: Any, name: str, options: dict[str, Any]) -> None:
    """A guider calls the UNet once for each half of the batch that the plain pipeline stacks."""

    def generate(**more: Any) -> np.ndarray:
        return np.asarray(
            modular(
                prompt="a red fox",
                num_inference_steps=3,
                height=zoo.SIZE,
                width=zoo.SIZE,
                strength=0.8,
                generator=zoo.generator(),
                output_type="np",
                output="images",
                **options,
                **more,
            )
        )

    plain = zoo.build(name)
    clipped = units(plain.unet)
    before = generate()
    with_both = generate(units=clipped)
    assert np.abs(with_both - before).max() > 1e-2
    scale = modular.guider.config.guidance_scale
    assert np.abs(with_both - attached(plain, name, *clipped, guidance_scale=scale)).max() < 1e-5
    assert np.array_equal(generate(), before)
