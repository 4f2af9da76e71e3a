"""The embedded model as shipped."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from mahlstick.pipelines.load import adapter_path, embedded_adapters
from mahlstick.training.recipes.assemble import LIMIT

ASSETS = Path(__file__).resolve().parents[1] / "assets"
FOLDER = ASSETS / "embedded"
shipped = pytest.mark.skipif(
    not (FOLDER / "model_index.json").exists(),
    reason="assets/embedded is missing: python -m mahlstick.training.recipes --help tells how it is made",
)


# ---- the shipped model


@pytest.fixture(scope="module")
def pipe():
    """The embedded model through plain diffusers."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt: str, seed: int = 3, **kwargs) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=4, generator=generator, output_type="np", **kwargs).images


@shipped
def test_loads_without_warnings(caplog):
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    ours = [str(w.message) for w in caught if "torch" not in w.filename]
    assert not ours
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    assert (
        {p.dtype for p in pipe.unet.parameters()}
        == {p.dtype for p in pipe.text_encoder.parameters()}
        == {torch.float32}
    )
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.safety_checker is None and not pipe.config.requires_safety_checker


@shipped
def test_is_small():
    assert sum(f.stat().st_size for f in ASSETS.rglob("*") if f.is_file()) <= LIMIT


@shipped
def test_draws_finite_and_deterministic(pipe):
    first, second = draw(pipe, "red apple"), draw(pipe, "red apple")
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    assert first.shape == (1, side, side, 3) and np.isfinite(first).all() and first.std() > 0.02
    assert np.array_equal(first, second)
    assert not np.array_equal(first, draw(pipe, "red apple", seed=4))


@shipped
def test_controlnet_and_ip_adapter_load_in_diffusers(pipe):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    net = ControlNetModel.from_pretrained(adapter_path("lineart"))
    controlled = StableDiffusionControlNetPipeline(**pipe.components, controlnet=net, requires_safety_checker=False)
    controlled.set_progress_bar_config(disable=True)
    lines = torch.zeros(1, 3, *draw(pipe, "cactus").shape[1:3])
    lines[..., 16:48, 16:18] = 1
    assert not np.array_equal(draw(controlled, "cactus", image=lines), draw(pipe, "cactus"))
    before = draw(pipe, "cactus")
    encoder, processor = pipe.image_encoder, pipe.feature_extractor
    pipe.load_ip_adapter(
        str(FOLDER), subfolder="ip-adapter", weight_name="ip_adapter.safetensors", image_encoder_folder=None
    )
    try:
        features = torch.zeros(2, 1, encoder.config.projection_dim)
        features[1] = 1
        assert not np.array_equal(draw(pipe, "cactus", ip_adapter_image_embeds=[features]), before)
    finally:
        pipe.unload_ip_adapter()
        pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
    assert np.array_equal(draw(pipe, "cactus"), before)


@shipped
def test_every_adapter_fits(pipe):
    import mahlstick as ms
    from mahlstick.adapters.load import load_adapter

    black = np.zeros((64, 64, 3), np.uint8)
    black[16:48, 16:18] = 255
    without = draw(pipe, "cactus")
    assert {"lineart", "ip-adapter"} <= {*embedded_adapters()}
    for path in {*embedded_adapters().values()}:
        adapter = load_adapter(path)
        unit = ms.Control(adapter, black) if path.name.startswith("controlnet") else ms.ImagePrompt(adapter, [black])
        with ms.attach(pipe, unit):
            assert not np.array_equal(draw(pipe, "cactus"), without), path.name


@shipped
def test_names_no_machine():
    for path in FOLDER.rglob("*.json"):
        assert "/work" not in path.read_text() and "_name_or_path" not in path.read_text()
