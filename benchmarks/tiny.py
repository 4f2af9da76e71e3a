"""Tiny random models of the real classes: what tests and fidelity figures run on."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from transformers.convert_slow_tokenizer import bytes_to_unicode

import mahlstick as ms

SIZE = 64  # pixels of the pictures made; the VAE makes 8 x 8 latents of them
WIDTH = 32  # of text and image features
FAMILIES = ("sd1", "sd2", "sdxl")

_SD = {
    "sample_size": SIZE // 8,
    "block_out_channels": (8, 16, 16, 16),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": WIDTH,
}
_UNETS: dict[str, dict[str, Any]] = {
    "sd1": _SD,
    "sd2": _SD | {"attention_head_dim": (1, 2, 2, 2), "use_linear_projection": True},
    "sdxl": _SD
    | {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2, 2),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "cross_attention_dim": 2 * WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    },
}


def unet(family: str, seed: int = 0, **changes: Any) -> diffusers.UNet2DConditionModel:
    """A UNet shaped like the family's, at a fortieth of the width."""
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(**_UNETS[family] | changes).eval()


def controlnet(family: str, seed: int = 1, **changes: Any) -> diffusers.ControlNetModel:
    """diffusers' own ControlNet for the family, with zero convolutions that are not zero."""
    torch.manual_seed(seed)
    net = diffusers.ControlNetModel.from_unet(unet(family), conditioning_embedding_out_channels=(4, 6, 6, 8))
    net.register_to_config(**changes)
    return awake(net)


def motion_adapter(unet: Any, **options: Any) -> Any:
    """A motion module for the UNet, of up to eight frames, away from its initial values."""
    torch.manual_seed(6)
    module = ms.MotionAdapter.from_unet(unet, max_frames=8, heads=2, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.requires_grad_(False)


def awake(net: Any) -> Any:
    """Random values for whatever is all zero."""
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def unet_inputs(family: str, batch: int = 2, seed: int = 2) -> dict[str, Any]:
    """Arguments of one UNet call."""
    torch.manual_seed(seed)
    dim = _UNETS[family]["cross_attention_dim"]
    inputs: dict[str, Any] = {
        "sample": torch.randn(batch, 4, SIZE // 8, SIZE // 8),
        "timestep": torch.tensor(401),
        "encoder_hidden_states": torch.randn(batch, 7, dim),
    }
    if family == "sdxl":
        sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]]).expand(batch, -1)
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, WIDTH), "time_ids": sizes}
    return inputs


@cache
def tokenizer() -> transformers.CLIPTokenizer:
    """CLIP's tokenizer with single letters for a vocabulary."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


@cache
def text_encoder(projection: bool = False) -> Any:
    torch.manual_seed(3)
    config = transformers.CLIPTextConfig(
        vocab_size=514,
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=WIDTH,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


@cache
def image_encoder() -> transformers.CLIPVisionModelWithProjection:
    torch.manual_seed(4)
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return transformers.CLIPVisionModelWithProjection(config).eval()


@cache
def feature_extractor() -> transformers.CLIPImageProcessor:
    return transformers.CLIPImageProcessor(crop_size={"height": 32, "width": 32}, size={"shortest_edge": 32})


@cache
def vae() -> diffusers.AutoencoderKL:
    torch.manual_seed(5)
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
    ).eval()


def scheduler(kind: str = "DDIMScheduler") -> Any:
    """A scheduler with ``steps_offset`` and ``clip_sample`` given: some pipelines edit them, others do not."""
    config = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    ).config
    return getattr(diffusers, kind).from_config(config)


def components(family: str, kind: str = "DDIMScheduler", **changes: Any) -> dict[str, Any]:
    """What a Stable Diffusion pipeline of the family is made of; only the UNet and the scheduler are fresh."""
    parts: dict[str, Any] = {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": unet(family, **changes),
        "scheduler": scheduler(kind),
        "image_encoder": image_encoder(),
        "feature_extractor": feature_extractor(),
    }
    if family == "sdxl":
        return parts | {"text_encoder_2": text_encoder(True), "tokenizer_2": tokenizer()}
    return parts | {"safety_checker": None, "requires_safety_checker": False}


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int = 0, size: int = SIZE) -> Image.Image:
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def half_mask(size: int = SIZE) -> Image.Image:
    """White on the right."""
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[:, size // 2 :] = 255
    return Image.fromarray(mask)
