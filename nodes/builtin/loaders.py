"""Nodes that load base models and their parts. What was loaded is kept, and read again where its file has changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from mahlstick.adapters.formats.checkpoint import open_checkpoint
from mahlstick.adapters.image_encoder import load_encoder
from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders
from mahlstick.nodes.sampling.models import model_from_pipeline, model_from_unet
from mahlstick.nodes.schema import Widget, node
from mahlstick.nodes.values import Clip, ClipT, ClipVision, ClipVisionT, ModelT, Vae, VaeT
from mahlstick.pipelines.load import Loader, choose_device, choose_dtype

EMBEDDED = "embedded"

_VOCABULARY = "openai/clip-vit-large-patch14"  # the same for every CLIP
_XL_LATENT_SCALE = 0.13025


@dataclass(frozen=True)
class Keeping:
    """Who keeps what is loaded, and on which device and in which dtype, by their names or left open."""

    loader: Loader
    device: str | None = None
    dtype: str | None = None

    def place(self, device: str | None = None) -> tuple[str, torch.dtype]:
        """Where a model is put, be it that its node names another device."""
        chosen = choose_device(device or self.device)
        return chosen, choose_dtype(self.dtype, chosen)


# For as long as the process lives, unless a run has others.
_OWN = Keeping(Loader(bases=2))
_current: ContextVar[Keeping] = ContextVar("keeping", default=_OWN)


def current() -> Keeping:
    """What this run loads with."""
    return _current.get()


@contextmanager
def using(keeping: Keeping) -> Iterator[None]:
    """Within the block models are loaded with this, such as with what has loaded them already."""
    token = _current.set(keeping)
    try:
        yield
    finally:
        _current.reset(token)


def forget() -> None:
    """Let go of the models that are kept for the next run."""
    _OWN.loader.forget()
    for kept in (_diffusers, _text_encoder, _vision):
        kept.cache_clear()


def embedded_pipeline() -> Any:
    """The pipeline of the embedded model."""
    return _pipeline(EMBEDDED)


def _pipeline(source: str, config: str | None = None) -> Any:
    keeping = current()
    return keeping.loader.pipeline(source, device=keeping.device, dtype=keeping.dtype, config=config)


def embedded_vision() -> ClipVision:
    """The embedded model's image encoder."""
    pipe = embedded_pipeline()
    return ClipVision(pipe.image_encoder, pipe.feature_extractor)


def clip_vision(name: str) -> ClipVision:
    """The image encoder ``name`` of models/clip_vision, or the embedded one."""
    if name == EMBEDDED:
        return embedded_vision()
    path = folders.find("clip_vision", name)
    return _vision(path, folders.stamp(path), *current().place())


def _stamp(kind: str, name: str | None) -> str | None:
    return name if name in (None, EMBEDDED) else folders.stamp(folders.find(kind, name))


def _checkpoint_names() -> list[str]:
    return [EMBEDDED, *folders.listed("checkpoints")]


def _folder_names() -> list[str]:
    return [name for name in folders.listed("checkpoints") if folders.find("checkpoints", name).is_dir()]


def _or_embedded(kind: str) -> list[str]:
    return [*folders.listed(kind), EMBEDDED]


CheckpointName = Annotated[
    str, Widget(choices=_checkpoint_names, tooltip="The name of the checkpoint (model) to load.")
]
VaeName = Annotated[str, Widget(choices=lambda: _or_embedded("vae"))]
ClipName = Annotated[str, Widget(choices=lambda: folders.listed("clip"))]
VisionName = Annotated[str, Widget(choices=lambda: _or_embedded("clip_vision"))]
UnetName = Annotated[str, Widget(choices=lambda: folders.listed("diffusion_models"))]
Device = Annotated[str, Widget(choices=("default", "cpu"), optional=True)]


@node("loaders", display_name="Load Checkpoint", fingerprint=lambda ckpt_name: _stamp("checkpoints", ckpt_name))
def CheckpointLoaderSimple(*, ckpt_name: CheckpointName) -> tuple[ModelT, ClipT, VaeT]:
    """Load a base model: its UNet, its text encoders and its VAE. A single file takes its configs from a diffusers
    folder of the same name beside it, or else from the hub."""
    return _base(ckpt_name)


@node("advanced/loaders/deprecated", fingerprint=lambda model_path: _stamp("checkpoints", model_path))
def DiffusersLoader(*, model_path: Annotated[str, Widget(choices=_folder_names)]) -> tuple[ModelT, ClipT, VaeT]:
    """Load a base model from a folder in diffusers' layout."""
    return _base(model_path)


@node("loaders", display_name="Load VAE", fingerprint=lambda vae_name: _stamp("vae", vae_name))
def VAELoader(*, vae_name: VaeName) -> VaeT:
    """Load an autoencoder: a folder in diffusers' layout, or a single file."""
    if vae_name == EMBEDDED:
        return Vae(embedded_pipeline().vae)
    path = folders.find("vae", vae_name)
    return Vae(_diffusers("AutoencoderKL", path, folders.stamp(path), *current().place()))


@node("advanced/loaders", display_name="Load CLIP", fingerprint=lambda clip_name: _stamp("clip", clip_name))
def CLIPLoader(
    *, clip_name: ClipName, type: Literal["stable_diffusion"] = "stable_diffusion", device: Device = "default"
) -> ClipT:
    """Load the text encoder of Stable Diffusion 1 or 2, or of XL's refiner."""
    return _clip([clip_name], device)


@node(
    "advanced/loaders",
    display_name="DualCLIPLoader",
    fingerprint=lambda clip_name1, clip_name2: (_stamp("clip", clip_name1), _stamp("clip", clip_name2)),
)
def DualCLIPLoader(
    *, clip_name1: ClipName, clip_name2: ClipName, type: Literal["sdxl"] = "sdxl", device: Device = "default"
) -> ClipT:
    """Load the two text encoders of Stable Diffusion XL, in either order."""
    return _clip([clip_name1, clip_name2], device)


@node(
    "advanced/loaders",
    display_name="Load Diffusion Model",
    fingerprint=lambda unet_name: _stamp("diffusion_models", unet_name),
)
def UNETLoader(*, unet_name: UnetName, weight_dtype: Literal["default"] = "default") -> ModelT:
    """Load a UNet alone, which predicts noise: a folder in diffusers' layout, or a single file."""
    path = folders.find("diffusion_models", unet_name)
    model = model_from_unet(_diffusers("UNet2DConditionModel", path, folders.stamp(path), *current().place()))
    is_xl = model.unet.config.addition_embed_type == "text_time"
    return replace(model, latent_scale=_XL_LATENT_SCALE) if is_xl else model


@node("loaders", display_name="Load CLIP Vision", fingerprint=lambda clip_name: _stamp("clip_vision", clip_name))
def CLIPVisionLoader(*, clip_name: VisionName) -> ClipVisionT:
    """Load an image encoder: a folder in transformers' layout, or a single file."""
    return clip_vision(clip_name)


def _base(name: str) -> tuple[Any, Clip, Vae]:
    if name == EMBEDDED:
        pipe = embedded_pipeline()
    else:
        path = folders.find("checkpoints", name)
        pipe = _pipeline(str(path), _config_beside(path))
    named = [(getattr(pipe, f"tokenizer{end}", None), getattr(pipe, f"text_encoder{end}", None)) for end in ("", "_2")]
    tokenizers, encoders = zip(*[pair for pair in named if pair[1] is not None], strict=True)
    return model_from_pipeline(pipe), Clip(tokenizers, encoders), Vae(pipe.vae)


def _config_beside(path: Path) -> str | None:
    """The folder that has a single file's name without its suffix."""
    folder = path.with_suffix("")
    return str(folder) if path.is_file() and folder.is_dir() else None


@lru_cache(maxsize=4)
def _diffusers(kind: str, path: Path, stamp: str, device: str, dtype: torch.dtype) -> Any:
    """A model of diffusers' class ``kind`` from a folder or a single file."""
    import diffusers

    options: dict[str, Any] = {"dtype": dtype}
    model_class = getattr(diffusers, kind)
    try:
        if path.is_dir():
            model = model_class.from_pretrained(str(path), **options)
        else:
            model = model_class.from_single_file(str(path), config=_config_beside(path), **options)
    except Exception as error:  # diffusers, the hub's client and safetensors each have their own
        raise MahlstickError(
            f"{path}: cannot be loaded as {kind} ({first_line(error)}); give a folder in diffusers' layout, or a file "
            "with such a folder of the same name beside it."
        ) from error
    return model.to(device).eval()


def _clip(names: list[str], device: str) -> Clip:
    paths = [folders.find("clip", name) for name in names]
    place = current().place(None if device == "default" else device)
    loaded = [_text_encoder(path, folders.stamp(path), *place) for path in paths]
    # XL's first encoder is the one without a projection.
    tokenizers, encoders = zip(*sorted(loaded, key=lambda pair: hasattr(pair[1], "text_projection")), strict=True)
    return Clip(tokenizers, encoders)


@lru_cache(maxsize=4)
def _text_encoder(path: Path, stamp: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A tokenizer and a text encoder from a folder in transformers' layout, or a single file in its naming."""
    import transformers

    tensors = _read(path, "text_model.", "text_projection.") if path.is_file() else None
    source = str(path) if tensors is None else _config_beside(path) or _VOCABULARY
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(source)
        encoder = _text_encoder_in(path) if tensors is None else _text_encoder_of(tensors, tokenizer, path)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise MahlstickError(
            f"{path}: no text encoder could be loaded ({first_line(error)}); give a folder that holds a CLIP text "
            "model of transformers with its tokenizer, or a file with the tokenizer in a folder of its name beside it."
        ) from error
    return tokenizer, encoder.to(device, dtype).eval()


def _text_encoder_in(folder: Path) -> Any:
    import transformers

    architectures = transformers.CLIPTextConfig.from_pretrained(folder).architectures or ()
    if "CLIPTextModelWithProjection" in architectures:
        return transformers.CLIPTextModelWithProjection.from_pretrained(folder)
    return transformers.CLIPTextModel.from_pretrained(folder)


def _text_encoder_of(tensors: Mapping[str, Tensor], tokenizer: Any, path: Path) -> Any:
    """A text model from its tensors, from whose shapes the published ones' configs follow."""
    import transformers

    vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    is_open_clip = width != 768
    if is_open_clip:
        tokenizer.pad_token = "!"
    kind = transformers.CLIPTextModelWithProjection if width == 1280 else transformers.CLIPTextModel
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_layers(tensors),
        num_attention_heads=width // 64,
        max_position_embeddings=tensors["text_model.embeddings.position_embedding.weight"].shape[0],
        projection_dim=width,
        hidden_act="gelu" if is_open_clip else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _filled(kind(config), tensors, path)


@lru_cache(maxsize=4)
def _vision(path: Path, stamp: str, device: str, dtype: torch.dtype) -> ClipVision:
    """An image encoder with its picture processor, where its folder has one."""
    if path.is_dir():
        encoder, processor = load_encoder(path)
    else:
        tensors = _read(path, "vision_model.", "visual_projection.")
        try:
            encoder, processor = _vision_of(tensors, path), None
        except KeyError as error:
            raise MahlstickError(f"{path}: lacks {error}; get another copy.") from error
    return ClipVision(encoder.to(device, dtype).eval(), processor)


def _vision_of(tensors: Mapping[str, Tensor], path: Path) -> Any:
    """A vision model from its tensors, from whose shapes the published ones' configs follow."""
    import transformers

    width, _, _, patch = tensors["vision_model.embeddings.patch_embedding.weight"].shape
    patches = tensors["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        projection_dim=tensors["visual_projection.weight"].shape[0],
        num_hidden_layers=_layers(tensors),
        num_attention_heads=12 if width == 768 else 16,
        image_size=patch * math.isqrt(patches),
        patch_size=patch,
        hidden_act="quick_gelu" if width in (768, 1024) else "gelu",
    )
    return _filled(transformers.CLIPVisionModelWithProjection(config), tensors, path)


def _read(path: Path, *prefixes: str) -> dict[str, Tensor]:
    """The tensors of a file whose names begin so. Raises ``MahlstickError`` where there are none."""
    checkpoint = open_checkpoint(path)
    names = [name for name in checkpoint.tensors if name.startswith(prefixes)]
    if not any(name.startswith(prefixes[0]) for name in names):
        raise MahlstickError(f"{path}: has no {prefixes[0]}* tensors; give a CLIP model in transformers' naming.")
    return checkpoint.load(names)


def _layers(tensors: Mapping[str, Tensor]) -> int:
    return sum(name.endswith(".layer_norm1.weight") for name in tensors)


def _filled(model: Any, tensors: Mapping[str, Tensor], path: Path) -> Any:
    """The model with these weights; they may have more, such as a projection that it does not use."""
    own = model.state_dict()
    # transformers has taken the first level of names away from some models, whose files still have it.
    renamed = {name if name in own else name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    missing = [name for name in own if name not in renamed]
    if missing:
        raise MahlstickError(f"{path}: lacks {missing[0]} and {len(missing) - 1} more weights; get another copy.")
    model.load_state_dict({name: renamed[name] for name in own})
    return model


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
