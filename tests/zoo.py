"""Tiny random models of every diffusers pipeline on which units are tested, and how to call each of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

import mahlstick as ms
from benchmarks.catalogue import owners
from benchmarks.tiny import WIDTH as DIM
from benchmarks.tiny import text_encoder, tokenizer

SIZE = 32  # pixels; the tiny VAE makes 16 x 16 latents of them


def seeded(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return build().eval()


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def mask() -> Image.Image:
    half = np.zeros((SIZE, SIZE), dtype=np.uint8)
    half[:, SIZE // 2 :] = 255
    return Image.fromarray(half)


# Components that no pipeline changes are shared; UNets are built anew for each test.


def renew() -> None:
    """Build the shared components anew: for tests that change them."""
    for component in (text_encoder, text_encoder_2, image_encoder, vae):
        component.cache_clear()


@cache
def text_encoder_2() -> Any:
    return text_encoder(True)


@cache
def image_encoder() -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=DIM,
        projection_dim=DIM,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
    )
    return seeded(lambda: transformers.CLIPVisionModelWithProjection(config))


@cache
def feature_extractor() -> Any:
    return transformers.CLIPImageProcessor(crop_size=SIZE, size=SIZE)


@cache
def vae(channels: int = 3) -> Any:
    return seeded(
        lambda: diffusers.AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
        )
    )


UNET = dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    sample_size=16,
    norm_num_groups=2,
    attention_head_dim=2,
    cross_attention_dim=DIM,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
SDXL = dict(
    cross_attention_dim=2 * DIM,
    use_linear_projection=True,
    transformer_layers_per_block=(1, 2),
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=6 * 8 + DIM,
)
# Where a T2I-Adapter adds its features depends on the kind of block; these are the places of Stable Diffusion 1.
T2I = dict(down_block_types=UNET["down_block_types"][::-1], up_block_types=UNET["up_block_types"][::-1])
KOLORS = SDXL | dict(encoder_hid_dim=DIM, encoder_hid_dim_type="text_proj")


def unet(**changes: Any) -> Any:
    return seeded(lambda: diffusers.UNet2DConditionModel(**UNET | changes))


def scheduler() -> Any:
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


POOL: dict[str, Callable[[], Any]] = {
    "vae": vae,
    "text_encoder": text_encoder,
    "text_encoder_2": text_encoder_2,
    "tokenizer": tokenizer,
    "tokenizer_2": tokenizer,
    "image_encoder": image_encoder,
    "feature_extractor": feature_extractor,
    "scheduler": scheduler,
    "safety_checker": lambda: None,
    "requires_safety_checker": lambda: False,
}


def control_net(unet: Any) -> Any:
    """diffusers' own ControlNet."""
    return waken(diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)))


def control_net_union(unet: Any) -> Any:
    known = inspect.signature(diffusers.ControlNetUnionModel.__init__).parameters
    config = {key: value for key, value in unet.config.items() if key in known}
    small = dict(num_trans_channel=8, num_trans_head=2, num_proj_channel=8, conditioning_embedding_out_channels=(4, 8))
    return waken(seeded(lambda: diffusers.ControlNetUnionModel(**config | small)))


def waken(net: Any) -> Any:
    """Give a fresh network random values where it begins with zeros, so that it has an effect."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


@dataclass(frozen=True)
class Case:
    """How a pipeline is built and called where it differs from the plain ones."""

    unet: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(
        default_factory=dict
    )  # component or argument, or a function of the UNet that builds it
    call: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], dict[str, Any]] = lambda pipe: {}  # runs before each call; returns arguments


IMAGE = dict(image=picture(1))
INPAINT = IMAGE | dict(mask_image=mask())
CONTROL = dict(control_image=picture(2))
NET = dict(controlnet=control_net)
UNION = dict(controlnet=control_net_union)

UNION_CALL = dict(control_image=[picture(2)], control_mode=[0])
BOXES = dict(gligen_phrases=["hat"], gligen_boxes=[[0.1, 0.1, 0.9, 0.9]], gligen_scheduled_sampling_beta=1.0)


def embeddings(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class GLMTokenizer:
    """Stands in for ChatGLM's, which needs a SentencePiece file: the same fields from the tiny CLIP tokenizer."""

    def __call__(self, text: Any, **options: Any) -> Any:
        tokens = tokenizer()(text, **options)
        tokens["position_ids"] = torch.arange(tokens["input_ids"].shape[1])[None]
        return tokens


def glm(unet: Any) -> Any:
    from diffusers.pipelines.kolors import text_encoder

    config = text_encoder.ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=514,
        hidden_size=DIM,
        ffn_hidden_size=DIM,
        kv_channels=8,
        num_attention_heads=4,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_bias_linear=False,
        add_qkv_bias=True,
        original_rope=True,
    )
    model = seeded(lambda: text_encoder.ChatGLMModel(config, empty_init=False))
    for module in model.modules():  # its RMSNorm leaves the weights unset
        if type(module).__name__ == "RMSNorm":
            torch.nn.init.ones_(module.weight)
    return model


KOLORS_PARTS = dict(text_encoder=glm, tokenizer=GLMTokenizer())
KOLORS_CALL = dict(max_sequence_length=77)


def t2i_adapter(unet: Any) -> Any:
    return seeded(lambda: diffusers.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2))


def example_encoder(unet: Any) -> Any:
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder

    return seeded(lambda: PaintByExampleImageEncoder(image_encoder().config, proj_size=DIM))


def image_normalizer(unet: Any) -> Any:
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    return StableUnCLIPImageNormalizer(embedding_dim=DIM)


def image_projection(unet: Any) -> Any:
    from diffusers.pipelines.stable_diffusion import CLIPImageProjection

    return seeded(lambda: CLIPImageProjection(hidden_size=DIM))


def ldm3d_vae(unet: Any) -> Any:
    return vae(6)


def prior(unet: Any) -> Any:
    return seeded(
        lambda: diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=8, embedding_dim=DIM, num_embeddings=77, num_layers=1
        )
    )


UNCLIP_UNET = dict(class_embed_type="projection", projection_class_embeddings_input_dim=2 * DIM)
UNCLIP_PARTS = dict(
    image_normalizer=image_normalizer,
    image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
)
PRIOR_PARTS = dict(
    prior_tokenizer=lambda unet: tokenizer(),
    prior_text_encoder=lambda unet: text_encoder_2(),
    prior=prior,
    prior_scheduler=diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
    ),
)
INVERSE = dict(inverse_scheduler=lambda unet: diffusers.DDIMInverseScheduler.from_config(scheduler().config))
PIX2PIX_ZERO = INVERSE | dict(caption_generator=None, caption_processor=None)


def sde_solver(unet: Any) -> Any:
    return diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2)


def inverted(pipe: Any) -> dict[str, Any]:
    """LEDITS++ edits a picture that it has inverted before."""
    pipe.invert(picture(1), num_inversion_steps=4, skip=0.5, generator=generator())
    return {}


def inverted_latents(pipe: Any) -> dict[str, Any]:
    inversion = pipe.invert(
        prompt="a red fox",
        image=picture(1),
        num_inference_steps=2,
        inpaint_strength=1.0,
        generator=generator(),
    )
    return dict(image_latents=inversion.latents)


CASES: dict[str, Case] = {
    "AltDiffusionImg2ImgPipeline": Case(call=IMAGE),
    "AltDiffusionPipeline": Case(),
    "CycleDiffusionPipeline": Case(call=IMAGE | dict(source_prompt="a cat")),
    "KolorsImg2ImgPipeline": Case(KOLORS, KOLORS_PARTS, IMAGE | KOLORS_CALL),
    "KolorsPAGPipeline": Case(KOLORS, KOLORS_PARTS, KOLORS_CALL),
    "KolorsPipeline": Case(KOLORS, KOLORS_PARTS, KOLORS_CALL),
    "LDMTextToImagePipeline": Case(parts=dict(vqvae=lambda unet: vae(), bert=lambda unet: text_encoder())),
    "LEditsPPPipelineStableDiffusion": Case(
        parts=dict(scheduler=sde_solver),
        call=dict(editing_prompt=["a hat"], use_intersect_mask=False),
        prepare=inverted,
    ),
    "LEditsPPPipelineStableDiffusionXL": Case(
        SDXL, call=dict(editing_prompt=["a hat"], use_intersect_mask=False), prepare=inverted
    ),
    "LatentConsistencyModelImg2ImgPipeline": Case(
        dict(time_cond_proj_dim=8), dict(scheduler=lambda unet: diffusers.LCMScheduler()), IMAGE
    ),
    "LatentConsistencyModelPipeline": Case(
        dict(time_cond_proj_dim=8), dict(scheduler=lambda unet: diffusers.LCMScheduler())
    ),
    "PaintByExamplePipeline": Case(
        dict(in_channels=9), dict(image_encoder=example_encoder), INPAINT | dict(example_image=picture(3))
    ),
    "SemanticStableDiffusionPipeline": Case(call=dict(editing_prompt=["a hat"], edit_warmup_steps=0)),
    "StableDiffusionAdapterPipeline": Case(T2I, dict(adapter=t2i_adapter), dict(image=picture(2))),
    "StableDiffusionAttendAndExcitePipeline": Case(
        call=dict(token_indices=[2, 3], max_iter_to_alter=1, attn_res=(8, 8))
    ),
    "StableDiffusionControlNetImg2ImgPipeline": Case(parts=NET, call=IMAGE | CONTROL),
    "StableDiffusionControlNetInpaintPipeline": Case(parts=NET, call=INPAINT | CONTROL),
    "StableDiffusionControlNetPAGInpaintPipeline": Case(parts=NET, call=INPAINT | CONTROL),
    "StableDiffusionControlNetPAGPipeline": Case(parts=NET, call=dict(image=picture(2))),
    "StableDiffusionControlNetPipeline": Case(parts=NET, call=dict(image=picture(2))),
    "StableDiffusionDepth2ImgPipeline": Case(
        dict(in_channels=5), dict(depth_estimator=None), IMAGE | dict(depth_map=embeddings(0, 1, SIZE, SIZE))
    ),
    "StableDiffusionDiffEditPipeline": Case(
        parts=INVERSE, call=dict(mask_image=np.ones((1, 16, 16), np.float32)), prepare=inverted_latents
    ),
    "StableDiffusionGLIGENPipeline": Case(dict(attention_type="gated"), call=BOXES),
    "StableDiffusionGLIGENTextImagePipeline": Case(
        dict(attention_type="gated-text-image"),
        dict(
            processor=lambda unet: transformers.CLIPProcessor(feature_extractor(), tokenizer()),
            image_project=image_projection,
        ),
        BOXES | dict(gligen_images=[picture(3)]),
    ),
    "StableDiffusionImageVariationPipeline": Case(call=IMAGE),
    "StableDiffusionImg2ImgPipeline": Case(call=IMAGE),
    "StableDiffusionInpaintPipeline": Case(call=INPAINT),
    "StableDiffusionInpaintPipeline 9": Case(dict(in_channels=9), call=INPAINT),
    "StableDiffusionInpaintPipelineLegacy": Case(call=INPAINT),
    "StableDiffusionInstructPix2PixPipeline": Case(dict(in_channels=8), call=IMAGE),
    "StableDiffusionLDM3DPipeline": Case(parts=dict(vae=ldm3d_vae)),
    "StableDiffusionModelEditingPipeline": Case(),
    "StableDiffusionPAGImg2ImgPipeline": Case(call=IMAGE),
    "StableDiffusionPAGInpaintPipeline": Case(call=INPAINT),
    "StableDiffusionPAGPipeline": Case(),
    # 64 x 72 latents are two of its views.
    "StableDiffusionPanoramaPipeline": Case(call=dict(height=128, width=144)),
    "StableDiffusionParadigmsPipeline": Case(
        parts=dict(scheduler=lambda unet: diffusers.DDIMParallelScheduler()), call=dict(parallel=2)
    ),
    "StableDiffusionPipeline": Case(),
    "StableDiffusionPipelineSafe": Case(call=dict(sld_warmup_steps=0)),
    "StableDiffusionPix2PixZeroPipeline": Case(
        parts=PIX2PIX_ZERO,
        call=dict(source_embeds=embeddings(0, 1, 77, DIM), target_embeds=embeddings(1, 1, 77, DIM)),
    ),
    "StableDiffusionSAGPipeline": Case(),
    "StableDiffusionUpscalePipeline": Case(
        dict(in_channels=7, num_class_embeds=1000),
        dict(low_res_scheduler=diffusers.DDPMScheduler()),
        dict(image=picture(1).resize((16, 16))),
    ),
    "StableDiffusionXLAdapterPipeline": Case(SDXL | T2I, dict(adapter=t2i_adapter), dict(image=picture(2))),
    "StableDiffusionXLControlNetImg2ImgPipeline": Case(SDXL, NET, IMAGE | CONTROL),
    "StableDiffusionXLControlNetInpaintPipeline": Case(SDXL, NET, INPAINT | CONTROL),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": Case(SDXL, NET, IMAGE | CONTROL),
    "StableDiffusionXLControlNetPAGPipeline": Case(SDXL, NET, dict(image=picture(2))),
    "StableDiffusionXLControlNetPipeline": Case(SDXL, NET, dict(image=picture(2))),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": Case(SDXL, UNION, IMAGE | UNION_CALL),
    "StableDiffusionXLControlNetUnionInpaintPipeline": Case(SDXL, UNION, INPAINT | UNION_CALL),
    "StableDiffusionXLControlNetUnionPipeline": Case(SDXL, UNION, UNION_CALL),
    "StableDiffusionXLImg2ImgPipeline": Case(SDXL, call=IMAGE),
    "StableDiffusionXLInpaintPipeline": Case(SDXL, call=INPAINT),
    "StableDiffusionXLInpaintPipeline 9": Case(SDXL | dict(in_channels=9), call=INPAINT),
    "StableDiffusionXLInstructPix2PixPipeline": Case(SDXL | dict(in_channels=8), call=IMAGE),
    "StableDiffusionXLPAGImg2ImgPipeline": Case(SDXL, call=IMAGE),
    "StableDiffusionXLPAGInpaintPipeline": Case(SDXL, call=INPAINT),
    "StableDiffusionXLPAGPipeline": Case(SDXL),
    "StableDiffusionXLPipeline": Case(SDXL),
    "StableUnCLIPImg2ImgPipeline": Case(UNCLIP_UNET, UNCLIP_PARTS, IMAGE),
    "StableUnCLIPPipeline": Case(UNCLIP_UNET, UNCLIP_PARTS | PRIOR_PARTS, dict(prior_num_inference_steps=2)),
    "TextToVideoZeroPipeline": Case(call=dict(video_length=2, t0=0, t1=1)),
    "TextToVideoZeroSDXLPipeline": Case(SDXL, call=dict(video_length=2, t0=0, t1=1)),
}


def build(name: str) -> Any:
    case = CASES[name]
    pipeline = owners()[name.split()[0]]
    net = unet(**case.unet)
    components = {key: make() for key, make in POOL.items()} | {"unet": net}
    components |= {key: part(net) if inspect.isfunction(part) else part for key, part in case.parts.items()}
    wanted = inspect.signature(pipeline.__init__).parameters
    pipe = pipeline(**{key: value for key, value in components.items() if key in wanted})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def generate(pipe: Any, name: str, **more: Any) -> np.ndarray:
    case = CASES[name]
    usual = dict(
        prompt="a red fox",
        num_inference_steps=3,
        strength=0.8,
        height=SIZE,
        width=SIZE,
        generator=generator(),
        output_type="np",
    )
    wanted = inspect.signature(owners()[name.split()[0]].__call__).parameters
    arguments = {key: value for key, value in usual.items() if key in wanted}
    return np.asarray(pipe(**arguments | case.call | case.prepare(pipe) | more)[0])


def control(net: Any) -> ms.Control:
    embedding = dict(conditioning_embedding_out_channels=(4, 8))
    return ms.Control(waken(ms.ControlNet.from_unet(net, **embedding)), picture(4))


def image_prompt(net: Any) -> ms.ImagePrompt:
    torch.manual_seed(2)
    adapter = ms.IPAdapter.from_unet(net, tokens=2, feature_dim=DIM).eval()
    return ms.ImagePrompt(adapter, features=embeddings(4, 1, DIM))
