"""The nets of the embedded model: diffusers' and transformers' ordinary classes at toy size.

128 px pictures → 8 × 16 × 16 latents (f = 8) → a three-level UNet with attention at 8 × 8 and 4 × 4 only.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from mahlstick.training.embedded.models import standardise
from mahlstick.training.recipes.emoji import SIZE

log = logging.getLogger(__name__)

LATENTS = 8
WIDTH = 192  # of the text and image towers, and of the embedding space that they share


def make_vae() -> AutoencoderKL:
    """(B, 3, 128, 128) in [−1, 1] ⇄ (B, 8, 16, 16); no attention, for the pictures are small."""
    channels = (8, 16, 48, 96)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=2,  # few channels a group would normalise a flat colour away
        sample_size=SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def make_image_encoder() -> CLIPVisionModelWithProjection:
    """Pictures (B, 3, 128, 128) in [−1, 1] → embeddings (B, 192) and 64 patches of 16 × 16 pixels."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3, num_attention_heads=WIDTH // 32,
            image_size=SIZE, patch_size=16, projection_dim=WIDTH,
        )
    )  # fmt: skip


def make_processor() -> CLIPImageProcessor:
    """Pictures to the image encoder's size and to [−1, 1]."""
    side = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def start(known: Path, out: Path) -> None:
    """Write the pipeline folder that the trainings begin with: the UNet and the text encoder of ``known``, an earlier
    model of 64 px with four latent channels, and fresh nets in place of the others."""
    unet = UNet2DConditionModel.from_pretrained(known, subfolder="unet")
    pipe = StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=CLIPTextModel.from_pretrained(known, subfolder="text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(known, subfolder="tokenizer"),
        unet=widened(unet),
        scheduler=DPMSolverMultistepScheduler.from_pretrained(known, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=make_processor(),
        image_encoder=make_image_encoder(),
        requires_safety_checker=False,
    )
    pipe.save_pretrained(out)


def widened(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet with LATENTS channels going in and out; its first and its last convolution are left random."""
    wide = UNet2DConditionModel.from_config({**unet.config, "in_channels": LATENTS, "out_channels": LATENTS})
    weights = {k: v for k, v in unet.state_dict().items() if not k.startswith(("conv_in.", "conv_out."))}
    wide.load_state_dict(weights, strict=False)
    return wide


@torch.no_grad()
def adopt_vae(model: Path, vae: Path, known: Path, pictures: Tensor) -> None:
    """Put a trained VAE into the folder ``model``, its latents standardised over ``pictures`` (N, 3, 128, 128) in
    [−1, 1], and translate the first and last convolution of its UNet from the latents of ``known``.

    With z of the old and z′ of the new VAE, least squares give z ≈ A z′ and z′ ≈ B z. The UNet that read W z now reads
    W A z′, and what it wrote it now writes through B: v is linear in z.
    """
    old = AutoencoderKL.from_pretrained(known, subfolder="vae").eval()
    new = AutoencoderKL.from_pretrained(vae).eval()
    standardise(new, latents_of(new, pictures))
    new.save_pretrained(model / "vae")
    z, z_new = (x.transpose(0, 1).flatten(1) for x in (latents_of(old, halved(pictures)), latents_of(new, pictures)))
    to_old, to_new = torch.linalg.lstsq(z_new.T, z.T).solution.T, torch.linalg.lstsq(z.T, z_new.T).solution.T
    unet = UNet2DConditionModel.from_pretrained(known, subfolder="unet")
    translated(unet, to_old, to_new).save_pretrained(model / "unet")
    left = [1 - float((a - m @ b).var() / a.var()) for a, b, m in ((z, z_new, to_old), (z_new, z, to_new))]
    log.info("variance explained: %.2f of the old latents, %.2f of the new ones", *left)


@torch.no_grad()
def translated(unet: UNet2DConditionModel, to_old: Tensor, to_new: Tensor) -> UNet2DConditionModel:
    """The UNet for latents z′, with z ≈ ``to_old`` z′ (4 × 8) and z′ ≈ ``to_new`` z (8 × 4)."""
    wide = widened(unet)
    wide.conv_in.weight.copy_(torch.einsum("oikl,ij->ojkl", unet.conv_in.weight, to_old))
    wide.conv_in.bias.copy_(unet.conv_in.bias)
    wide.conv_out.weight.copy_(torch.einsum("oikl,jo->jikl", unet.conv_out.weight, to_new))
    wide.conv_out.bias.copy_(to_new @ unet.conv_out.bias)
    return wide


def halved(pictures: Tensor) -> Tensor:
    """At half the size, as the old model saw them."""
    return F.avg_pool2d(pictures, 2)


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The posterior's means, in parts."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(32)])
