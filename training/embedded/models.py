"""The nets of the embedded model: diffusers' and transformers' ordinary classes at toy size.

64 px pictures → 4 × 16 × 16 latents (f = 4) → a three-level UNet with attention at 8 × 8 and 4 × 4 only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

WIDTH = 192  # of the text and image towers, and of the shared embedding space
TOKENS = 32  # longest prompt, in tokens

# Sizes by name, so that tests can run every stage in a second.
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "vae": (16, 32, 64),
        "unet": (64, 160, 240),
        "heads": 40,
        "layers": 3,
        "ff": 2,
        "width": WIDTH,
        "hint": (16, 32, 64),
    },
    "tiny": {
        "vae": (8, 8, 16),
        "unet": (16, 16, 32),
        "heads": 16,
        "layers": 1,
        "ff": 1,
        "width": 32,
        "hint": (4, 4, 8),
    },
}


def make_vae(size: str = "full") -> AutoencoderKL:
    """(B, 3, 64, 64) in [−1, 1] ⇄ (B, 4, 16, 16); no attention, for the pictures are small."""
    channels = SIZES[size]["vae"]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,  # few channels a group would normalise a flat colour away
        sample_size=64,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def standardise(vae: AutoencoderKL, latents: Tensor) -> None:
    """Fold the mean and deviation of ``latents`` (N, 4, h, w) into the VAE's quant convolutions, in place.

    StableDiffusionPipeline knows one scaling factor and no shift, so the latents themselves have to have mean 0 and
    deviation 1 per channel: z′ = (z − μ)/σ going in (and log σ² less by 2 log σ), z = σ z′ + μ coming out.
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    with torch.no_grad():
        quant, post = vae.quant_conv, vae.post_quant_conv
        quant.weight[:channels] /= std.view(-1, 1, 1, 1)
        quant.bias[:channels] = (quant.bias[:channels] - mean) / std
        quant.bias[channels:] -= 2 * std.log()
        post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
        post.weight *= std.view(1, -1, 1, 1)


def make_unet(size: str = "full") -> UNet2DConditionModel:
    """SD 1.x's UNet with one residual block a level: (B, 4, 16, 16), t (B,), text (B, 32, width) → v (B, 4, 16, 16)."""
    s = SIZES[size]
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=s["unet"],
        layers_per_block=1,
        cross_attention_dim=s["width"],
        attention_head_dim=tuple(
            max(1, c // s["heads"]) for c in s["unet"]
        ),  # diffusers' misnomer: the number of heads
        norm_num_groups=16,
    )


def make_controlnet(unet: UNet2DConditionModel, size: str = "full") -> ControlNetModel:
    """A trainable copy of the UNet's encoder behind zero convolutions; its hint encoder has the VAE's two strides."""
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=SIZES[size]["hint"])


def make_scheduler() -> DDPMScheduler:
    """SD's noise schedule with v-prediction (2202.00512): v = √ᾱ ε − √(1−ᾱ) x₀."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
    )


def make_text(tokenizer: CLIPTokenizer, size: str = "full") -> CLIPTextModel:
    """Prompt tokens (B, 32) → (B, 32, width); its pooled output lives in the image tower's embedding space."""
    s = SIZES[size]
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=s["width"],
            intermediate_size=s["width"] * s["ff"],
            num_hidden_layers=s["layers"],
            num_attention_heads=s["width"] // 32,
            max_position_embeddings=TOKENS,
            projection_dim=s["width"],
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_image(size: str = "full") -> CLIPVisionModelWithProjection:
    """Pictures (B, 3, 64, 64) in [−1, 1] → embeddings (B, width), from 8 × 8 patches."""
    s = SIZES[size]
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=s["width"],
            intermediate_size=s["width"] * s["ff"],
            num_hidden_layers=s["layers"],
            num_attention_heads=s["width"] // 32,
            image_size=64,
            patch_size=8,
            projection_dim=s["width"],
        )
    )


def make_tokenizer(captions: list[str], folder: Path, vocabulary: int = 1600) -> CLIPTokenizer:
    """Byte-pair encoding learned from ``captions``, kept in ``folder`` in CLIP's vocab.json / merges.txt form.

    Every byte is in the vocabulary, alone and as the end of a word, so that no prompt is ever unknown.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(vocab_size=vocabulary, end_of_word_suffix="</w>", show_progress=False, min_frequency=2),
    )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *(m.replace(" ", "") for m in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "pad_token": "<|endoftext|>"}, indent=1
        )
    )
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIPTokenizer from ``folder``; prompts are cut and padded to TOKENS with the end token, as in SD 1.x."""
    return CLIPTokenizer.from_pretrained(folder)


def encode(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Prompts → token ids (B, 32), exactly as StableDiffusionPipeline encodes them."""
    ids: Tensor = tokenizer(
        prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


class ImageTokens(nn.Module):
    """IP-Adapter's base projector (2308.06721): a pooled embedding (B, width) → Linear, LayerNorm → (B, 4, width)."""

    def __init__(self, features: int, width: int, tokens: int = 4) -> None:
        super().__init__()
        self.tokens = tokens
        self.proj = nn.Linear(features, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        x: Tensor = self.norm(self.proj(features).unflatten(-1, (self.tokens, -1)))
        return x
