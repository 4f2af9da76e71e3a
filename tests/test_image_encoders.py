"""Image encoders: CLIP, SigLIP and DINOv2 through transformers' own classes, and adapters that read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

import mahlstick as ms
from benchmarks import tiny
from mahlstick.adapters.image_encoder import ImageEncoder, Layer, load_encoder
from mahlstick.pipelines.load import embedded_folder
from mahlstick.training.config import TrainConfig
from mahlstick.training.run import train
from tests.tiny import picture, sd

SIDE, PATCH, WIDTH, LAYERS = 28, 14, 32, 3
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 37,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 37,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 514,
    "bos_token_id": 512,
    "eos_token_id": 513,
}
PROJECTED = 24

# By name: what makes the tower, and how many of its tokens are no patches.
TOWERS: dict[str, tuple[Callable[[], Any], int]] = {
    "clip": (
        lambda: transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**VISION, projection_dim=PROJECTED)
        ),
        1,
    ),
    "clip without projection": (lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)), 1),
    "siglip": (lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)), 0),
    "dinov2": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**VISION)), 1),
    "dinov2 with registers": (
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**VISION, num_register_tokens=4)
        ),
        5,
    ),
}


def tower(name: str) -> Any:
    torch.manual_seed(0)
    model = TOWERS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # biases and scales away from their first values
    return model


def small_processor(name: str) -> Any:
    """Of the family's own class, at the tiny models' size and with odd numbers."""
    size = {"height": SIDE, "width": SIDE}
    odd = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    if name == "siglip":
        return transformers.SiglipImageProcessor(size=size, **odd)
    kind = transformers.CLIPImageProcessor if name.startswith("clip") else transformers.BitImageProcessor
    return kind(size={"shortest_edge": SIDE}, crop_size=size, **odd)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in TOWERS:
        made[name] = tmp_path_factory.mktemp("tower")
        tower(name).save_pretrained(made[name])
        small_processor(name).save_pretrained(made[name])
    return made


PICTURES = [picture(40, 56, seed=1), picture(90, 30, seed=2)]


# parity


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_its_features_are_what_transformers_gives(name: str, folders: dict[str, Path]) -> None:
    encoder, model = ImageEncoder.from_pretrained(folders[name]), tower(name)
    pixels = small_processor(name)(images=PICTURES, return_tensors="pt")["pixel_values"]
    found = model(pixels, output_hidden_states=True)
    wanted: dict[Layer, Tensor] = {
        "pooled": found.image_embeds if name == "clip" else found.pooler_output,
        "patches": found.last_hidden_state[:, TOWERS[name][1] :],
        -2: found.hidden_states[-2],
        0: found.hidden_states[0],
        LAYERS: found.hidden_states[-1],
    }
    for layer, features in wanted.items():
        assert torch.equal(encoder.features(PICTURES, layer), features), layer
        assert encoder.width(layer) == features.shape[-1]
    assert wanted["patches"].shape[1] == (SIDE // PATCH) ** 2
    with pytest.raises(ms.MahlstickError, match=r"layer 4 is none of this image encoder's, which are 0 .* to 3"):
        encoder.features(PICTURES, LAYERS + 1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("clip", lambda: transformers.CLIPModel(
            transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=PROJECTED))),
        ("siglip", lambda: transformers.SiglipModel(
            transformers.SiglipConfig(text_config=TEXT, vision_config=VISION))),
    ],
)  # fmt: skip
def test_of_a_whole_model_the_vision_tower_is_taken(name: str, whole: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = whole().eval()
    model.save_pretrained(tmp_path)
    small_processor(name).save_pretrained(tmp_path)
    pixels = small_processor(name)(images=PICTURES, return_tensors="pt")
    wanted = model.get_image_features(**pixels).pooler_output
    assert torch.equal(ImageEncoder.from_pretrained(tmp_path).features(PICTURES), wanted)


def test_the_embedded_encoder() -> None:
    folder = embedded_folder()
    encoder = ImageEncoder(*load_encoder(folder / "image_encoder"))
    theirs = transformers.CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").eval()
    with torch.no_grad():
        wanted = theirs(encoder.prepare(PICTURES)).image_embeds
        assert torch.equal(encoder.features(PICTURES), wanted)


def test_a_folder_without_a_preparation_gets_that_of_its_family() -> None:
    """By the configs that were published with the models."""
    clip = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "resample": 3,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711]}  # fmt: skip
    siglip = {"size": {"height": SIDE, "width": SIDE}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    dino = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3,
            "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # fmt: skip
    for name, wanted in {"clip": clip, "siglip": siglip, "dinov2": dino, "dinov2 with registers": dino}.items():
        given = ImageEncoder(tower(name)).processor.to_dict()
        for field, value in wanted.items():
            found = given[field]
            assert (list(found) if isinstance(found, tuple) else found) == value, (name, field)


@torch.no_grad()
def test_siglip_sees_all_of_a_picture_and_clip_its_middle() -> None:
    wide = np.zeros((40, 120, 3), np.uint8)
    other = wide.copy()
    other[:, :20] = 255  # at the edge, which a crop cuts off
    for name, sees in (("siglip", True), ("clip", False)):
        encoder = ImageEncoder(tower(name))
        one, two = (encoder.features([Image.fromarray(pixels)]) for pixels in (wide, other))
        assert torch.equal(one, two) != sees


# what is missing


def test_a_missing_model_is_told_with_three_ways_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ms.MahlstickError) as told:
        load_encoder("somebody/siglip")
    message = str(told.value)
    assert "an image encoder is not at somebody/siglip" in message
    for way in ("give the folder", "hf download somebody/siglip --local-dir", "leave it out for the base's own"):
        assert way in message
    with pytest.raises(ms.MahlstickError, match=r"cannot be loaded from .*: give the folder of a CLIP"):
        load_encoder(tmp_path)


def test_other_models_and_broken_ones_are_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    tiny.text_encoder().save_pretrained(tmp_path / "words")
    with pytest.raises(ms.MahlstickError, match="is a clip_text_model, which is no image encoder"):
        load_encoder(tmp_path / "words")
    model = tower("dinov2")
    state = {name: value for name, value in model.state_dict().items() if "layer.2" not in name}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(ms.MahlstickError, match=r"lacks the weights encoder\.layer\.2"):
        load_encoder(tmp_path / "part")


# adapters that read them


@pytest.mark.parametrize(
    ("name", "projector", "layer"),
    [
        ("siglip", "linear", None),
        ("siglip", "resampler", -2),
        ("dinov2", "linear", None),
        ("dinov2 with registers", "mlp", "patches"),
    ],
)
def test_an_ip_adapter_reads_its_layer_and_keeps_it(
    name: str, projector: Any, layer: Layer | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    unet, inputs = tiny.unet("sd1"), tiny.unet_inputs("sd1")
    sizes = {"depth": 1, "heads": 2, "head_dim": 8}
    ip = ms.IPAdapter.from_unet(unet, projector, tokens=3, feature_dim=WIDTH, layer=layer, **sizes)
    ip.use_encoder(folders[name])
    file = ip.save_pretrained(tmp_path / "ip.safetensors")
    again = ms.IPAdapter.from_pretrained(file, image_encoder=folders[name])
    assert again.config["layer"] == layer
    with torch.no_grad():
        plain = unet(**inputs).sample
        seen = []
        for adapter in (ip, again):
            with ms.attach(unet, ms.ImagePrompt(adapter, PICTURES)):
                seen.append(unet(**inputs).sample)
    assert torch.equal(*seen) and not torch.equal(seen[0], plain)
    expected = ImageEncoder.from_pretrained(folders[name]).features(PICTURES, layer or "pooled")
    torch.testing.assert_close(again.features(PICTURES)[0], expected)


def test_a_layer_that_does_not_go_with_the_projector_is_refused() -> None:
    unet = tiny.unet("sd1")
    with pytest.raises(ms.MahlstickError, match="layer=-2 does not go with this projector, which takes pooled"):
        ms.IPAdapter.from_unet(unet, "linear", layer=-2)
    with pytest.raises(ms.MahlstickError, match="layer='pooled' does not go with this projector"):
        ms.IPAdapter.from_unet(unet, "resampler", layer="pooled")
    with pytest.raises(ms.MahlstickError, match="layer must be 'pooled', 'patches' or a whole number; got 'last'"):
        ms.IPAdapter.from_unet(unet, "resampler", layer="last")  # type: ignore[arg-type]


def test_another_encoders_width_is_refused(folders: dict[str, Path]) -> None:
    ip = ms.IPAdapter.from_unet(tiny.unet("sd1"), "linear", feature_dim=PROJECTED)
    ip.use_encoder(folders["clip"])
    with pytest.raises(ms.MahlstickError, match="reads features of 24 numbers and the image encoder gives 32"):
        ip.use_encoder(folders["siglip"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("siglip", {"projector": "linear"}),
        ("dinov2 with registers", {"projector": "resampler", "image_layer": "patches", "depth": 1, "heads": 1}),
    ],
)
def test_a_step_of_training_with_another_encoder(
    name: str, settings: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    for seed in range(4):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        picture(seed=seed).save(tmp_path / "pictures" / f"{seed}.png")
    pipe = sd()
    config = TrainConfig(
        task="ip-adapter", data=str(tmp_path / "pictures"), out=str(tmp_path / "out"), base="tiny",
        image_encoder=str(folders[name]), tokens=2, steps=1, batch=2, warmup=0, held_out=0, validate_every=0, rate=1e-2,
        text_dropout=0.0, image_dropout=0.0, **settings,
    )  # fmt: skip
    out = train(config, pipe=pipe)
    learned = ms.IPAdapter.from_pretrained(out / "ip_adapter.safetensors", image_encoder=folders[name])
    assert learned.config["layer"] == settings.get("image_layer")
    fresh = dict(ms.IPAdapter.from_unet(pipe.unet, feature_dim=WIDTH).ip_adapter.named_parameters())
    same = [name for name, p in learned.ip_adapter.named_parameters() if torch.equal(p, fresh[name])]
    assert not same, "the step reached every key and value"
