"""mahlstick's own nodes, for what the suite does and ComfyUI has no node for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from mahlstick.adapters.controlnet import Mode
from mahlstick.adapters.positions import sample_sparsely
from mahlstick.adapters.sparse_control import SparseControlNet
from mahlstick.adapters.travel import between
from mahlstick.errors import MahlstickError
from mahlstick.nodes.builtin.control import checked
from mahlstick.nodes.builtin.image_prompts import LoadedT
from mahlstick.nodes.builtin.latents import encode as vae_encode
from mahlstick.nodes.resample import to_picture
from mahlstick.nodes.sampling.noise import RandomNoise
from mahlstick.nodes.schema import Widget, node
from mahlstick.nodes.text import encode
from mahlstick.nodes.values import (
    ClipT,
    ClipVisionT,
    ConditioningT,
    ControlHint,
    ControlNetT,
    ImageT,
    LatentT,
    MaskT,
    Model,
    ModelT,
    NoiseT,
    VaeT,
)
from mahlstick.pipelines import noise as noises
from mahlstick.pipelines.units import Control, ImagePrompt

_REFERENCES = 16  # pictures that an image encoder sees at once

Strength = Annotated[float, Widget(min=0.0, max=10.0, step=0.01)]
Percent = Annotated[float, Widget(min=0.0, max=1.0, step=0.001)]
Seed = Annotated[int, Widget(min=0, max=2**64 - 1, seed=True)]
FrameCount = Annotated[int, Widget(min=1, max=4096)]
ContextLength = Annotated[int, Widget(min=2, max=128)]
ContextOverlap = Annotated[int, Widget(min=0, max=127)]


# control


@node("mahlstick", display_name="Apply ControlNet with Mode", outputs=("positive", "negative"))
def MahlstickControl(
    *,
    positive: ConditioningT,
    negative: ConditioningT,
    control_net: ControlNetT,
    image: ImageT,
    strength: Strength = 1.0,
    start_percent: Percent = 0.0,
    end_percent: Percent = 1.0,
    mode: Mode = "balanced",
    mask: MaskT | None = None,
) -> tuple[ConditioningT, ConditioningT]:
    """Lets a ControlNet follow the picture, only where the mask is white. Mode prompt lets the words win over the
    picture, control the picture over the words; guess finds out what the picture shows."""
    hint = ControlHint(checked(control_net), image, strength, start_percent, end_percent, mask, mode)
    return _with_hint(positive, hint), _with_hint(negative, hint)


def _with_hint(conditioning: list[Any], hint: ControlHint) -> list[Any]:
    return [[text, {**options, "control": (*options.get("control", ()), hint)}] for text, options in conditioning]


@node("mahlstick", display_name="Apply SparseCtrl")
def MahlstickSparseControl(
    *,
    model: ModelT,
    control_net: ControlNetT,
    image: ImageT,
    frames: Annotated[str, Widget(tooltip="The frame of each picture, from 0 on, or from the end if negative.")] = "0",
    strength: Strength = 1.0,
    start_percent: Percent = 0.0,
    end_percent: Percent = 1.0,
    vae: VaeT | None = None,
) -> ModelT:
    """Lets a SparseCtrl encoder follow pictures of some frames of a clip; a motion module carries them to the others.
    An encoder for colour pictures sees latents: connect the VAE, and give pictures of the clip's own size."""
    if not isinstance(control_net, SparseControlNet):
        raise MahlstickError("control_net must be a SparseCtrl encoder; a ControlNet goes into Apply ControlNet.")
    pictures: Any = [to_picture(each) for each in image]
    if control_net.takes_latents:
        if vae is None:
            raise MahlstickError("this SparseCtrl encoder takes latents: connect the VAE that makes them.")
        pictures = model.scaled(vae_encode(vae, image))
    places = _whole_numbers(frames)
    if len(places) != len(image):
        raise MahlstickError(f"frames: {len(places)} numbers for {len(image)} pictures; give one for each.")
    percent = (start_percent, end_percent)
    unit = Control(control_net, pictures, strength, *percent, resize="crop", window="noise", at=places)
    return model.with_units(unit)


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")]
    except ValueError as error:
        raise MahlstickError(f"frames: {text!r} are no whole numbers; write for example 0, 8, -1.") from error


# image prompts


@node("mahlstick", display_name="Apply Image Prompt")
def MahlstickImagePrompt(
    *,
    model: ModelT,
    ipadapter: LoadedT,
    image: ImageT,
    weight: Annotated[float, Widget(min=-1.0, max=5.0, step=0.05)] = 1.0,
    start_percent: Percent = 0.0,
    end_percent: Percent = 1.0,
    blocks: Literal["all", "style", "layout"] = "all",
    prompt: Annotated[str, Widget(multiline=True, tooltip="For an adapter that reads it beside the picture.")] = "",
    clip_vision: ClipVisionT | None = None,
    mask: MaskT | None = None,
) -> ModelT:
    """Lets pictures speak beside the words. As many as there are frames give each frame its own; otherwise each sees
    all of them. An adapter for videos sees them as one clip."""
    adapter, vision = ipadapter.adapter, clip_vision or ipadapter.vision
    encoder = (None, None) if vision is None else (vision.encoder, vision.processor)
    at_once = _REFERENCES
    if adapter.config["projector"] == "video":
        at_once = adapter.config["frames"]
        image = image[sample_sparsely(len(image), at_once)]
    with torch.no_grad():
        found = [adapter.features([to_picture(each) for each in part], encoder) for part in image.split(at_once)]
    features, nothing = zip(*found, strict=True)
    unit = ImagePrompt(
        adapter, features=torch.cat(features), negative_features=nothing[0], scale=weight, start=start_percent,
        end=end_percent, mask=mask, blocks=blocks, window="noise", prompt=prompt,
    )  # fmt: skip
    return model.with_units(unit)


# text


@node("mahlstick", display_name="Prompt Travel")
def MahlstickPromptTravel(
    *,
    clip: ClipT,
    prompts: Annotated[str, Widget(multiline=True)] = "0: spring\n16: winter",
    frames: FrameCount = 32,
) -> ConditioningT:
    """Words that change over a clip. Each line is the number of a frame and its text, as in "16: winter"; frames
    between two have the mixture of both."""
    texts = dict(_line(each) for each in prompts.splitlines() if each.strip())
    if not texts:
        raise MahlstickError('prompts are empty; write lines such as "0: spring".')
    keys = sorted(texts)
    states, pooled = zip(*(encode(clip, texts[key]) for key in keys), strict=True)
    # Attention over every token twice is attention over it once, so shorter texts are repeated.
    length = math.lcm(*(each.shape[1] for each in states))
    same = torch.cat([each.repeat(1, length // each.shape[1], 1) for each in states])
    return [[between(same, keys, range(frames)), {"pooled_output": between(torch.cat(pooled), keys, range(frames))}]]


def _line(line: str) -> tuple[int, str]:
    number, colon, text = line.partition(":")
    if not colon or not number.strip().strip('"').isdecimal():
        raise MahlstickError(f'prompts: {line.strip()!r} is not of the form "16: winter".')
    return int(number.strip().strip('"')), text.strip()


# noise


@node("mahlstick", display_name="FreeNoise")
def MahlstickFreeNoise(
    *, samples: LatentT, context_length: ContextLength = 16, context_overlap: ContextOverlap = 4, noise_seed: Seed = 0
) -> LatentT:
    """Lets all windows of a long clip begin from the same noise, shuffled, so that they show the same things
    (FreeNoise). Give the length and overlap of the windows."""
    if context_overlap >= context_length:
        raise MahlstickError(f"context_overlap must be smaller than the {context_length} frames of context_length.")
    order = noises.free_noise(
        torch.arange(context_length), len(samples["samples"]), context_length - context_overlap,
        torch.Generator().manual_seed(noise_seed),
    )  # fmt: skip
    return {**samples, "batch_index": order.tolist()}


@dataclass(frozen=True, eq=False)
class FreeInitNoise:
    """A NOISE whose low frequencies are those of a clip that was made from ``first`` (see `noises.free_init`)."""

    model: Model
    first: Any
    clip: Tensor
    seed: int

    def draw(self, latent: dict[str, Any]) -> Tensor:
        """The noise for a LATENT."""
        signal = 1 / (1 + float(self.model.sigmas[-1]) ** 2)
        first, fresh = self.first.draw(latent), RandomNoise(self.seed).draw(latent)
        return noises.free_init(self.model.scaled(self.clip), first, fresh, signal)


@node("mahlstick", display_name="FreeInit")
def MahlstickFreeInit(*, model: ModelT, noise: NoiseT, samples: LatentT, noise_seed: Seed = 1) -> NoiseT:
    """Noise for another pass, which makes a clip steadier (FreeInit): its slow part is that of the clip of the last
    pass, which began from the noise that is given here."""
    return FreeInitNoise(model, noise, samples["samples"], noise_seed)
