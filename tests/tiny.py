"""Tiny random Stable Diffusion pipelines and adapters, for the tests of requests, generation and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

import mahlstick as ms

SIDE = 64  # pixels; latents are 8 x 8
WIDTH = 32  # of text and image features
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.!?:;()-+'"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def _text_encoder(kind: Any, words: CLIPTokenizer) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=WIDTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return kind(config).eval()


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[16, 16, 16, 16],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=8,
    ).eval()


def _unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        **config,
    ).eval()


def sd(in_channels: int = 4) -> StableDiffusionPipeline:
    """Of the shape of Stable Diffusion 1.x, with an image encoder."""
    torch.manual_seed(0)
    words = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    pipe = StableDiffusionPipeline(
        vae=_vae(),
        unet=_unet(in_channels=in_channels, cross_attention_dim=WIDTH, attention_head_dim=8),
        scheduler=DDIMScheduler(**_NOISE, clip_sample=False, set_alpha_to_one=False),
        text_encoder=_text_encoder(CLIPTextModel, words),
        tokenizer=words,
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl() -> StableDiffusionXLPipeline:
    """Of the shape of Stable Diffusion XL."""
    torch.manual_seed(0)
    words = tokenizer()
    pipe = StableDiffusionXLPipeline(
        vae=_vae(),
        unet=_unet(
            cross_attention_dim=2 * WIDTH,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        scheduler=EulerDiscreteScheduler(**_NOISE, timestep_spacing="leading"),
        text_encoder=_text_encoder(CLIPTextModel, words),
        text_encoder_2=_text_encoder(CLIPTextModelWithProjection, words),
        tokenizer=words,
        tokenizer_2=words,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(width: int = SIDE, height: int = SIDE, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save_models(folder: Path) -> Path:
    """``base``, ``net``, ``ip`` and the pictures ``drawing.png`` and ``reference.png`` below ``folder``."""
    pipe = sd()
    pipe.save_pretrained(folder / "base")
    net = ms.ControlNet.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 32, 32))
    with torch.no_grad():
        for weight in net.parameters():
            weight += torch.randn_like(weight) * 0.05
    net.save_pretrained(folder / "net")
    ms.IPAdapter.from_unet(pipe.unet, tokens=2, feature_dim=WIDTH).save_pretrained(folder / "ip")
    picture(seed=1).save(folder / "drawing.png")
    picture(90, 40, seed=2).save(folder / "reference.png")
    return folder
