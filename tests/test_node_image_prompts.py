"""CLIP vision and IP-Adapter nodes: the numbers of `ms.ImagePrompt`, and the doses of ComfyUI_IPAdapter_plus."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mahlstick as ms
from benchmarks.tiny import WIDTH, feature_extractor, image_encoder, unet, unet_inputs
from mahlstick.adapters.base import Clock
from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders
from mahlstick.nodes.builtin import image_prompts as nodes
from mahlstick.nodes.builtin.image_prompts import Loaded
from mahlstick.nodes.values import ClipVision, Model

PICTURES = torch.rand(2, 40, 48, 3, generator=torch.manual_seed(0))


@cache
def base(family: str) -> Any:
    return unet(family)


@cache
def vision() -> ClipVision:
    return ClipVision(image_encoder(), feature_extractor())


@cache
def loaded(family: str, projector: Any = "linear") -> Loaded:
    torch.manual_seed(1)
    sizes = {"depth": 1, "heads": 2, "head_dim": 8} if projector == "resampler" else {}
    adapter = ms.IPAdapter.from_unet(base(family), projector, tokens=2, feature_dim=WIDTH, **sizes)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return Loaded(adapter, vision())


def model(family: str) -> Model:
    return Model(base(family), torch.linspace(0.03, 14.6, 1000))


@torch.no_grad()
def estimate(family: str, *units: Any) -> Tensor:
    """The UNet's estimate under guidance, both halves."""
    network = base(family)
    with ms.attach(network, *units, guidance=True):
        return torch.Tensor(network(**unet_inputs(family)).sample)


def by_node(family: str, node: Any, **inputs: Any) -> Tensor:
    adapter = inputs.pop("ipadapter", loaded(family))
    return estimate(family, *node(model=model(family), ipadapter=adapter, **inputs)[0].units)


def features(pictures: Tensor = PICTURES) -> Tensor:
    return nodes.see(vision(), pictures).image_embeds


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_the_encoder_sees() -> None:
    exact = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    image = torch.from_numpy(np.array(exact, dtype=np.float32) / 255)[None]
    seen = nodes.CLIPVisionEncode(clip_vision=vision(), image=image, crop="center")[0]
    pixels = feature_extractor()(exact, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = image_encoder()(pixels, output_hidden_states=True)
    close(seen.image_embeds, wanted.image_embeds)
    close(seen.last_hidden_state, wanted.last_hidden_state)
    close(seen.penultimate_hidden_states, wanted.hidden_states[-2])
    # Of a wide picture "center" sees the middle, "none" all of it.
    wide = torch.cat([torch.zeros(1, 32, 16, 3), image, torch.ones(1, 32, 16, 3)], dim=2)
    centre, whole = (
        nodes.CLIPVisionEncode(clip_vision=vision(), image=wide, crop=crop)[0] for crop in ("center", "none")
    )
    close(centre.image_embeds, seen.image_embeds)
    assert (whole.image_embeds - seen.image_embeds).abs().max() > 0.01
    halves = torch.nn.functional.interpolate(wide.movedim(-1, 1), (32, 32), mode="bicubic", antialias=True)
    close(whole.image_embeds, nodes.see(vision(), halves.movedim(1, -1)).image_embeds)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_ip_adapter_is_an_image_prompt(family: str) -> None:
    adapter, one = loaded(family).adapter, PICTURES[:1]
    plain = estimate(family)
    given = {"image": one, "weight": 0.7, "attn_mask": (mask := torch.rand(1, 8, 8))}
    found = by_node(family, nodes.IPAdapter, **given, start_at=0.1, end_at=0.9)
    prompt = ms.ImagePrompt(adapter, features=features(one), scale=0.7, mask=mask[:, None], window="noise")
    close(found, estimate(family, prompt))
    assert (found - plain).abs().max() > 0.05
    # Outside its part of the noise, at no weight and in no part it does nothing.
    assert torch.equal(by_node(family, nodes.IPAdapter, **given, end_at=0.3), plain)
    source = model(family)
    for never in ({"weight": 0.0}, {"start_at": 0.5, "end_at": 0.5}):
        inputs: dict[str, Any] = {"image": one} | never
        assert nodes.IPAdapter(model=source, ipadapter=loaded(family), **inputs)[0].units == ()
    assert source.units == ()


def test_several_pictures_and_negatives() -> None:
    adapter, both = loaded("sd1").adapter, features()
    with torch.no_grad():
        tokens = adapter.tokens(both)

    def by_hand(positive: Tensor, negative: Tensor) -> Tensor:
        with adapter.attach(base("sd1"), positive, negative=negative, clock=clock()), torch.no_grad():
            return torch.Tensor(base("sd1")(**unet_inputs("sd1")).sample)

    nothing = adapter.tokens(torch.zeros(1, WIDTH)).detach()
    joined = tokens.flatten(0, 1)[None]
    close(by_node("sd1", nodes.IPAdapterAdvanced, image=PICTURES), by_hand(joined, nothing))
    ways = {
        "add": both.sum(0),
        "subtract": both[0] - both[1],
        "average": both.mean(0),
        "norm average": (both / both.norm(dim=0)).mean(0),
    }
    for way, mixed in ways.items():
        found = by_node("sd1", nodes.IPAdapterAdvanced, image=PICTURES, combine_embeds=way)
        close(found, by_hand(adapter.tokens(mixed[None]).detach(), nothing))
        close(nodes.IPAdapterCombineEmbeds(embed1=both[:1], method=way, embed2=both[1:])[0], mixed[None])
    found = by_node("sd1", nodes.IPAdapterAdvanced, image=PICTURES[:1], image_negative=PICTURES[1:])
    close(found, by_hand(tokens[:1], tokens[1:]))
    pos, neg = nodes.IPAdapterEncoder(ipadapter=loaded("sd1"), image=PICTURES[:1], weight=0.5)
    close(pos, both[:1] / 2)
    assert not neg.any()
    found = by_node("sd1", nodes.IPAdapterEmbeds, pos_embed=both[:1], neg_embed=both[1:])
    close(found, by_hand(tokens[:1], tokens[1:]))
    without = Loaded(loaded("sd1").adapter)
    with pytest.raises(MahlstickError, match="has no image encoder: connect clip_vision"):
        by_node("sd1", nodes.IPAdapterEmbeds, ipadapter=without, pos_embed=both)
    close(
        by_node("sd1", nodes.IPAdapterAdvanced, ipadapter=without, image=PICTURES, clip_vision=vision()),
        by_hand(joined, nothing),
    )


def clock() -> Clock:
    return Clock(("uncond", "cond"))


def test_an_adapter_of_patches_knows_a_black_picture() -> None:
    one = loaded("sd1", "resampler")
    black = nodes.see(vision(), torch.zeros(1, 32, 32, 3)).penultimate_hidden_states
    seen = nodes.see(vision(), PICTURES[:1]).penultimate_hidden_states
    prompt = ms.ImagePrompt(one.adapter, features=seen, negative_features=black, window="noise")
    close(by_node("sd1", nodes.IPAdapter, ipadapter=one, image=PICTURES[:1]), estimate("sd1", prompt))
    masked = nodes.IPAdapterEncoder(ipadapter=one, image=PICTURES[:1], weight=1.0, mask=torch.zeros(1, 40, 48))[0]
    assert (masked - seen).abs().max() > 0.01


def transformers(family: str) -> list[str]:
    """In the order in which they run, by hand."""
    if family == "sd1":
        ups = [f"up_blocks.{block}.attentions.{place}" for block in (1, 2, 3) for place in range(3)]
        downs = [f"down_blocks.{block}.attentions.{place}" for block in (0, 1, 2) for place in range(2)]
    else:
        ups = [f"up_blocks.{block}.attentions.{place}" for block in (0, 1) for place in range(3)]
        downs = [f"down_blocks.{block}.attentions.{place}" for block in (1, 2) for place in range(2)]
    return [*downs, "mid_block.attentions.0", *ups]


# As the pack has them, for weight 0.8.
SD1_STYLE = {place: 0.8 for place in (0, 1, 2, 3, 9, 10, 11, 12, 13, 14, 15)}
EASE_OUT = 0.8 * 0.05
WEIGHTS: list[tuple[str, str, Mapping[int, float]]] = [
    ("sd1", "ease in", {place: 0.8 * (0.05 + 0.95 * (1 - place / 16)) for place in range(16)}),
    ("sdxl", "ease out", {place: 0.8 * (0.05 + 0.95 * place / 11) for place in range(11)}),
    ("sd1", "ease in-out", {place: 0.8 * (0.05 + 0.95 * (1 - abs(place - 8) / 8)) for place in range(16)}),
    ("sdxl", "reverse in-out", {place: 0.8 * (0.05 + 0.95 * abs(place - 5.5) / 5.5) for place in range(11)}),
    ("sd1", "weak input", {place: 0.8 * (0.2 if place < 6 else 1) for place in range(16)}),
    ("sdxl", "weak output", {place: 0.8 * (0.2 if place > 4 else 1) for place in range(11)}),
    ("sd1", "weak middle", {place: 0.8 * (0.2 if place == 6 else 1) for place in range(16)}),
    ("sd1", "strong middle", {place: 0.8 * (1 if place == 6 else 0.2) for place in range(16)}),
    ("sd1", "style transfer", SD1_STYLE),
    ("sdxl", "style transfer", {6: 0.8}),
    ("sd1", "composition", {4: 0.2, 5: 0.8}),
    ("sdxl", "composition", {3: 0.8}),
    ("sd1", "strong style transfer", SD1_STYLE | {6: 0.8, 7: 0.8, 8: 0.8}),
    ("sdxl", "style and composition", {3: 1.0, 6: 0.8}),
    ("sd1", "style and composition", SD1_STYLE | {4: 0.25, 5: 1.0}),
]


@pytest.mark.parametrize(("family", "kind", "weights"), WEIGHTS)
def test_weights_by_transformer(family: str, kind: str, weights: Mapping[int, float]) -> None:
    names = transformers(family)
    blocks = {names[place]: weight for place, weight in weights.items()}
    prompt = ms.ImagePrompt(loaded(family).adapter, features=features()[:1], blocks=blocks, window="noise")
    found = by_node(family, nodes.IPAdapterAdvanced, image=PICTURES[:1], weight=0.8, weight_type=kind)
    close(found, estimate(family, prompt))


def test_the_style_and_layout_of_xl_are_instant_styles() -> None:
    for kind, blocks in (("style transfer", "style"), ("composition", "layout")):
        prompt: Any = ms.ImagePrompt(loaded("sdxl").adapter, features=features()[:1], blocks=blocks)  # type: ignore[arg-type]
        found = by_node("sdxl", nodes.IPAdapterAdvanced, image=PICTURES[:1], weight_type=kind)
        close(found, estimate("sdxl", prompt))


@pytest.mark.parametrize(
    ("kind", "plain", "swapped"),
    [
        ("style transfer precise", {6: 0.8}, {3: 0.8}),
        ("composition precise", {3: 0.8}, {place: 0.8 if place == 6 else 0.08 for place in range(11) if place != 3}),
    ],
)
def test_precise_types_show_the_pictures_to_the_other_half(kind: str, plain: Any, swapped: Any) -> None:
    adapter, names = loaded("sdxl").adapter, transformers("sdxl")
    found = by_node("sdxl", nodes.IPAdapterAdvanced, image=PICTURES[:1], weight=0.8, weight_type=kind)
    tokens, nothing = (adapter.tokens(each).detach() for each in (features()[:1], torch.zeros(1, WIDTH)))
    with (
        torch.no_grad(),
        adapter.attach(
            base("sdxl"),
            tokens,
            negative=nothing,
            blocks={names[place]: weight for place, weight in plain.items()},
            clock=clock(),
        ),
        adapter.attach(
            base("sdxl"),
            torch.zeros_like(tokens),
            negative=tokens,
            blocks={names[place]: weight for place, weight in swapped.items()},
            clock=clock(),
        ),
    ):
        close(found, base("sdxl")(**unet_inputs("sdxl")).sample)


@pytest.mark.parametrize("scaling", ["K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"])
def test_keys_and_values_may_be_scaled(scaling: str) -> None:
    scaled = copy.deepcopy(loaded("sd1").adapter)
    tokens = scaled.tokens(features()[:1]).detach()
    for pair in scaled.ip_adapter.values():
        weight = 0.6 * (pair.to_k_ip.out_features / 1280 if "penalty" in scaling else 1)
        pair.to_k_ip.weight.data *= weight
        if "mean" in scaling:
            change = torch.full((2, 2), (weight - 1) / 2) + torch.eye(2)  # of two tokens
            pair.to_v_ip.register_forward_pre_hook(lambda _, args, change=change: (change @ args[0],))
        else:
            pair.to_v_ip.weight.data *= weight
    family = base("sd1")
    inputs = unet_inputs("sd1")
    unit = nodes.IPAdapterAdvanced(
        model=model("sd1"), ipadapter=loaded("sd1"), image=PICTURES[:1], weight=0.6, embeds_scaling=scaling
    )[0].units[0]
    with torch.no_grad(), ms.attach(family, unit, guidance=False):
        found = family(**inputs).sample
    with torch.no_grad(), scaled.attach(family, tokens):
        close(found, family(**inputs).sample)
    linear = estimate("sd1", ms.ImagePrompt(loaded("sd1").adapter, features=features()[:1], scale=0.6))
    assert (found - linear).abs().max() > 1e-3


def test_types_that_need_a_known_unet() -> None:
    small = unet("sd1", layers_per_block=1)
    adapter = Loaded(ms.IPAdapter.from_unet(small, tokens=2, feature_dim=WIDTH), vision())
    inputs = {"model": Model(small, torch.ones(3)), "ipadapter": adapter, "image": PICTURES}
    with pytest.raises(MahlstickError, match="'style transfer' is known for Stable Diffusion 1, 2 and XL"):
        nodes.IPAdapter(**inputs, weight_type="style transfer")
    assert len(nodes.IPAdapter(**inputs, weight_type="prompt is more important")[0].units) == 1


def test_loaders_find_the_published_names(tmp_path: Path) -> None:
    image_encoder().save_pretrained(tmp_path / "clip_vision" / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    published = {
        "LIGHT - SD1.5 only (low strength)": "ip-adapter_sd15_light_v11.safetensors",
        "STANDARD (medium strength)": "ip-adapter_sd15.safetensors",
        "PLUS (high strength)": "ip-adapter-plus_sd15.safetensors",
    }
    for number, name in enumerate([*published.values(), "ip-adapter_sd15_light.safetensors"]):
        adapter = copy.deepcopy(loaded("sd1").adapter)
        adapter.image_proj.norm.bias.data.fill_(number)
        (tmp_path / "ipadapter").mkdir(exist_ok=True)
        adapter.save_pretrained(tmp_path / "ipadapter" / name)
    with folders.using(folders.Folders(models=tmp_path)):
        for number, preset in enumerate(published):
            same, found = nodes.IPAdapterUnifiedLoader(model=(source := model("sd1")), preset=preset)
            assert same is source and found.adapter.image_proj.norm.bias.unique().tolist() == [number]
            assert found.vision.encoder.config.hidden_size == WIDTH
        alone = nodes.IPAdapterModelLoader(ipadapter_file="ip-adapter_sd15.safetensors")[0]
        assert alone.vision is None and alone.adapter.config == loaded("sd1").adapter.config
        with pytest.raises(MahlstickError, match=r"'VIT-G .*': no fitting file below .*clip_vision"):
            nodes.IPAdapterUnifiedLoader(model=model("sd1"), preset="VIT-G (medium strength)")
        with pytest.raises(MahlstickError, match=r"'LIGHT .* is for Stable Diffusion 1\.5"):
            nodes.IPAdapterUnifiedLoader(model=model("sdxl"), preset="LIGHT - SD1.5 only (low strength)")
        fingerprint: Any = nodes.IPAdapterModelLoader.fingerprint
        before = fingerprint("ip-adapter_sd15.safetensors")
        loaded("sd1").adapter.save_pretrained(tmp_path / "ipadapter" / "ip-adapter_sd15.safetensors")
        assert fingerprint("ip-adapter_sd15.safetensors") != before
        choices = next(iter(nodes.IPAdapterModelLoader.inputs)).choices
        assert choices is not None and "embedded:ip-adapter" in choices
    embedded = nodes.IPAdapterModelLoader(ipadapter_file="embedded:ip-adapter")[0]
    assert embedded.vision.encoder.config.image_size == 64
    assert embedded.adapter is nodes.IPAdapterUnifiedLoader(model=model("sd1"), preset="embedded")[1].adapter


def test_pictures_are_made_square() -> None:
    image = torch.zeros(1, 20, 60, 3)
    image[:, :, 20:40] = 0.5
    image[:, :, 40:] = 1.0
    for position, level in {"left": 0.0, "center": 127 / 255, "right": 1.0, "top": 127 / 255}.items():
        found = nodes.PrepImageForClipVision(image=image, interpolation="NEAREST", crop_position=position)[0]
        assert found.shape == (1, 224, 224, 3) and (found == level).all()
    padded = nodes.PrepImageForClipVision(image=image, interpolation="NEAREST", crop_position="pad")[0]
    assert (padded[:, :70] == 0).all() and (padded[:, 80:140, 200:] == 1).all()
    noise = 0.3 + 0.4 * torch.rand(1, 224, 224, 3, generator=torch.manual_seed(2))
    soft, sharp = (
        nodes.PrepImageForClipVision(image=noise, interpolation="BICUBIC", crop_position="center", sharpening=amount)[0]
        for amount in (0.0, 1.0)
    )
    assert sharp.std() > 1.1 * soft.std() and 0 <= sharp.min() and sharp.max() <= 1


def test_the_face_of_the_nodes() -> None:
    required = nodes.IPAdapterAdvanced.info["input"]["required"]
    names = "model ipadapter image weight weight_type combine_embeds start_at end_at embeds_scaling"
    assert list(required) == names.split()
    assert required["weight"] == ["FLOAT", {"default": 1.0, "min": -1.0, "max": 5.0, "step": 0.05}]
    assert list(nodes.IPAdapterAdvanced.info["input"]["optional"]) == ["image_negative", "attn_mask", "clip_vision"]
    assert nodes.IPAdapter.info["output"] == ["MODEL"]
    assert nodes.IPAdapterUnifiedLoader.info["output_name"] == ["model", "ipadapter"]
    assert nodes.IPAdapterEncoder.info["output_name"] == ["pos_embed", "neg_embed"]
