"""The nets of the embedded model: diffusers' and transformers' ordinary classes at toy size.

128 px pictures → 8 × 16 × 16 latents (f = 8) → a three-level UNet with attention at 8 × 8 and 4 × 4 only.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
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
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from mahlstick.training.recipes.captions import corpus
from mahlstick.training.recipes.emoji import SIZE
from mahlstick.training.recipes.packages import Concept

log = logging.getLogger(__name__)

LATENTS = 8
WIDTH = 192  # of the text and image towers, and of the embedding space that they share
TOKENS = 32  # longest prompt, in tokens


def make_vae() -> AutoencoderKL:
    """(B, 3, 128, 128) in [−1, 1] ⇄ (B, 8, 16, 16); no attention, for the pictures are small."""
    channels = (16, 32, 48, 96)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=2,
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


def make_unet() -> UNet2DConditionModel:
    """SD 1.x's UNet with one residual block a level: (B, 8, 16, 16), t (B,), text (B, 32, 192) → v (B, 8, 16, 16)."""
    channels = (64, 160, 240)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENTS,
        out_channels=LATENTS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=tuple(max(1, c // 40) for c in channels),  # diffusers' misnomer: the number of heads
        norm_num_groups=16,
    )


def make_scheduler() -> DPMSolverMultistepScheduler:
    """SD's noise schedule with v-prediction (2202.00512), v = √ᾱ ε − √(1−ᾱ) x₀, for DPM-Solver++ (2211.01095)."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        algorithm_type="dpmsolver++", solver_order=2, steps_offset=1,
    )  # fmt: skip


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Prompt tokens (B, 32) → (B, 32, 192)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
            num_attention_heads=WIDTH // 32, max_position_embeddings=TOKENS, projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


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
    return CLIPTokenizer.from_pretrained(folder)


def start(out: Path, concepts: Sequence[Concept], known: Path | None) -> None:
    """Write the pipeline folder that the trainings begin with: fresh nets; or where ``known``, an earlier model, is
    given, all that it has, its VAE grown, or of one for other latents its UNet, text encoder and tokenizer."""
    if known and AutoencoderKL.load_config(known, subfolder="vae")["latent_channels"] == LATENTS:
        pipe = StableDiffusionPipeline.from_pretrained(known, safety_checker=None)
        pipe.register_modules(vae=grown(pipe.vae))
        pipe.save_pretrained(out)
        copy_vocabulary(known, out)
        return
    unet = widened(UNet2DConditionModel.from_pretrained(known, subfolder="unet")) if known else make_unet()
    if known:
        tokenizer = CLIPTokenizer.from_pretrained(known, subfolder="tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(known, subfolder="text_encoder")
    else:
        tokenizer = make_tokenizer(corpus(concepts), out / "tokenizer")
        text_encoder = make_text_encoder(tokenizer)
    pipe = StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=make_processor(),
        image_encoder=make_image_encoder(),
        requires_safety_checker=False,
    )
    pipe.save_pretrained(out)
    if known:
        copy_vocabulary(known, out)


@torch.no_grad()
def grown(vae: AutoencoderKL, spread: float = 0.02) -> AutoencoderKL:
    """The VAE with the channels and blocks of `make_vae`, computing what it did: each channel is there several times,
    and what reads it takes the mean of the copies (Net2Net, 1511.05641, section 2.3), group by group, so that
    normalisations see no difference; a new block adds nothing. Where there are new copies, noise of ``spread``
    deviations parts them, without which they would learn the same."""
    new, known = make_vae(), vae.state_dict()
    weights = new.state_dict()
    for name, fresh in weights.items():
        if name not in known:
            weights[name] = torch.zeros_like(fresh) if ".conv2." in name else fresh
            continue
        old = known[name].to(fresh)
        copies = [size // before for size, before in zip(fresh.shape, old.shape, strict=True)]
        for axis, count in enumerate(copies[:2]):
            old = old.repeat_interleave(count, axis) / (count if axis else 1)
        noise = spread * old.std() * torch.randn_like(old) if max(copies) > 1 and old.ndim > 1 else 0
        weights[name] = old + noise
    new.load_state_dict(weights)
    return new.to(vae.device, vae.dtype).eval()


def copy_vocabulary(model: Path, new: Path) -> None:
    """The two files of the tokenizer that transformers before 5 reads; later ones write tokenizer.json alone."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(model / "tokenizer" / name, new / "tokenizer" / name)


def standardise(vae: AutoencoderKL, latents: Tensor) -> None:
    """Fold the mean and deviation of ``latents`` (N, C, h, w) into the VAE's quant convolutions, in place.

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


def widened(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet with LATENTS channels going in and out; its first and its last convolution are left random."""
    wide = UNet2DConditionModel.from_config({**unet.config, "in_channels": LATENTS, "out_channels": LATENTS})
    weights = {k: v for k, v in unet.state_dict().items() if not k.startswith(("conv_in.", "conv_out."))}
    wide.load_state_dict(weights, strict=False)
    return wide


@torch.no_grad()
def adopt_vae(model: Path, vae: Path, known: Path | None, pictures: Tensor) -> None:
    """Put a trained VAE into the folder ``model``, its latents standardised over ``pictures`` (N, 3, 128, 128) in
    [−1, 1]; and where ``known`` is given, its UNet, the first and the last convolution translated to the new latents.

    With z of the old and z′ of the new VAE, least squares give z ≈ A z′ and z′ ≈ B z. The UNet that read W z now reads
    W A z′, and what it wrote it now writes through B: v is linear in z.
    """
    new = AutoencoderKL.from_pretrained(vae).eval()
    standardise(new, latents_of(new, pictures))
    new.save_pretrained(model / "vae")
    if known is None:
        return
    old = AutoencoderKL.from_pretrained(known, subfolder="vae").eval()
    seen = F.interpolate(pictures, size=old.config.sample_size, mode="area")  # as the old model saw them
    z, z_new = (x.transpose(0, 1).flatten(1) for x in (latents_of(old, seen), latents_of(new, pictures)))
    to_old, to_new = torch.linalg.lstsq(z_new.T, z.T).solution.T, torch.linalg.lstsq(z.T, z_new.T).solution.T
    unet = UNet2DConditionModel.from_pretrained(known, subfolder="unet")
    translated(unet, to_old, to_new).save_pretrained(model / "unet")
    left = [1 - float((a - m @ b).var() / a.var()) for a, b, m in ((z, z_new, to_old), (z_new, z, to_new))]
    log.info("variance explained: %.2f of the old latents, %.2f of the new ones", *left)


@torch.no_grad()
def translated(unet: UNet2DConditionModel, to_old: Tensor, to_new: Tensor) -> UNet2DConditionModel:
    """The UNet for latents z′, with z ≈ ``to_old`` z′ (old × new channels) and z′ ≈ ``to_new`` z."""
    wide = widened(unet)
    wide.conv_in.weight.copy_(torch.einsum("oikl,ij->ojkl", unet.conv_in.weight, to_old))
    wide.conv_in.bias.copy_(unet.conv_in.bias)
    wide.conv_out.weight.copy_(torch.einsum("oikl,jo->jikl", unet.conv_out.weight, to_new))
    wide.conv_out.bias.copy_(to_new @ unet.conv_out.bias)
    return wide


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """The posterior's means, in parts."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(32)])
