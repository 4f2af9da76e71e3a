"""Image encoders: the vision towers of CLIP and SigLIP, DINOv2, and the features of pictures at any of their layers.

What IP-Adapters, their training and style libraries look with. A model brings its own preparation of pictures in its
folder; where the folder has none, it is prepared as the family was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor

from mahlstick.errors import MahlstickError

#: ``pooled``: one vector a picture; ``patches``: what the last layer says of each patch, without class and register
#: tokens; a number: all tokens of that hidden layer, 0 being the embeddings and -1 the last layer.
Layer = int | Literal["pooled", "patches"]
PENULTIMATE = -2  # which the published IP-Adapters read where they read patches

# By the model_type in a folder's config: transformers' class of the vision tower.
_TOWERS = {
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}


class ImageEncoder:
    """A vision model of transformers, and how it wants its pictures prepared.

    ``processor`` is an image processor of transformers; without one, pictures are prepared as the model's family was
    trained. Not a module, so that an adapter may hold one without its weights becoming the adapter's.
    """

    def __init__(self, model: Any, processor: Any = None) -> None:
        self.model = model
        self.processor = processor if processor is not None else default_processor(model.config)

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str]) -> ImageEncoder:
        """From a folder or hub id of a CLIP, a SigLIP or a DINOv2: the whole model, or its vision tower.

        Raises ``MahlstickError`` for other models, and where there is none.
        """
        return cls(*load_encoder(source))

    def width(self, layer: Layer = "pooled") -> int | None:
        """How many numbers a feature has; None of a model whose config does not tell."""
        projected = layer == "pooled" and hasattr(self.model, "visual_projection")
        return getattr(self.model.config, "projection_dim" if projected else "hidden_size", None)

    def prepare(self, pictures: Sequence[Any]) -> Tensor:
        """PIL pictures as the model takes them, ``(n, 3, side, side)`` in its precision and on its device."""
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(self.model.dtype)
        # accelerate's sequential offload places the input itself
        return cast(Tensor, pixels if self.model.device.type == "meta" else pixels.to(self.model.device))

    def see(self, pixels: Tensor, layer: Layer = "pooled") -> Tensor:
        """Features of prepared pictures: ``(n, width)`` pooled, else ``(n, length, width)``.

        Raises ``MahlstickError`` for a layer that the model has not.
        """
        if layer == "pooled":
            return pooled(self.model(pixels))
        if layer == "patches":
            side = self.model.config.patch_size
            count = (pixels.shape[-2] // side) * (pixels.shape[-1] // side)
            return cast(Tensor, self.model(pixels).last_hidden_state[:, -count:])
        states = self.model(pixels, output_hidden_states=True).hidden_states
        if not -len(states) <= layer < len(states):
            raise MahlstickError(
                f"layer {layer} is none of this image encoder's, which are 0 (the embeddings) to {len(states) - 1}."
            )
        return cast(Tensor, states[layer])

    def features(self, pictures: Sequence[Any], layer: Layer = "pooled") -> Tensor:
        """`see` of PIL pictures."""
        return self.see(self.prepare(pictures), layer)


def pooled(outputs: Any) -> Tensor:
    """The one vector a picture among a vision model's outputs: CLIP's projection, SigLIP's attention pooling, DINOv2's
    class token."""
    for name in ("image_embeds", "pooler_output"):
        if (vectors := getattr(outputs, name, None)) is not None:
            return cast(Tensor, vectors)
    raise MahlstickError("this image encoder gives no pooled features: give layer= a number, or another encoder.")


def load_encoder(source: str | PathLike[str]) -> tuple[Any, Any]:
    """The vision model in a folder or hub id, and its image processor, or None where the folder has none of that.

    Raises ``MahlstickError`` as `ImageEncoder.from_pretrained`.
    """
    import transformers

    def load(local: bool) -> tuple[Any, Any]:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=local)
        tower: Any = getattr(transformers, _tower(source, config))
        if config.model_type == "clip":  # whose own width of the projection counts, not that beside its tower
            config.vision_config.projection_dim = config.projection_dim
        options = {"config": getattr(config, "vision_config", config), "local_files_only": local}
        model, found = tower.from_pretrained(source, **options, output_loading_info=True)
        if found["missing_keys"]:
            raise MahlstickError(f"{source} lacks the weights {min(found['missing_keys'])}: get another copy of it.")
        try:
            return model.eval(), transformers.AutoImageProcessor.from_pretrained(source, local_files_only=local)
        except (OSError, ValueError):
            return model.eval(), None

    return cast(tuple[Any, Any], fetched(source, "an image encoder", load))


def _tower(source: str | PathLike[str], config: Any) -> str:
    if config.model_type not in _TOWERS:
        raise MahlstickError(
            f"{source} is a {config.model_type}, which is no image encoder that is known here: give a CLIP, a SigLIP "
            "or a DINOv2."
        )
    if (config.architectures or [""])[0] == "CLIPVisionModel":  # as language models have it, without the projection
        return "CLIPVisionModel"
    return _TOWERS[config.model_type]


def fetched(source: str | PathLike[str], wanted: str, load: Callable[[bool], Any]) -> Any:
    """What ``load(local_files_only)`` makes of a folder, of the hub's cache, or of the hub.

    Raises ``MahlstickError`` that tells the three ways to get it where none of them has it.
    """
    name = fspath(source)
    try:
        return load(True)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        here = Path(name).expanduser().exists()
        if not here and _on_hub(name):
            return load(False)
    fetch = "" if here else f"fetch it where there is a connection (hf download {name} --local-dir FOLDER), "
    held = f"cannot be loaded from {name} ({reason})" if here else f"is not at {name}, and the hub does not give it"
    raise MahlstickError(
        f"{wanted} {held}: give the folder of a CLIP, a SigLIP or a DINOv2, {fetch}or leave it out for the base's own."
    )


def _on_hub(name: str) -> bool:
    """Whether the hub answers and has it; its own client would try for half a minute where there is no connection."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=5)
    except Exception:  # no connection, offline mode, no such model, no hub id: each has its own errors
        return False
    return True


def default_processor(config: Any) -> Any:
    """The preparation of pictures that the model's family was trained with: CLIP's and SigLIP's at the model's own
    resolution, DINOv2's as published, 224 pixels out of the middle of 256."""
    import transformers

    family, side = config.model_type, getattr(config, "image_size", 224)
    if family.startswith("dinov2"):
        return transformers.BitImageProcessor(
            size={"shortest_edge": 256},
            crop_size={"height": 224, "width": 224},
            image_mean=[0.485, 0.456, 0.406],  # of ImageNet
            image_std=[0.229, 0.224, 0.225],
        )
    if family.startswith("siglip"):
        return transformers.SiglipImageProcessor(size={"height": side, "width": side})
    return transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def checked_layer(layer: Any, is_pooled: bool) -> Layer:
    """The layer that a projector reads; left out, the pooled output or the last hidden layer but one.

    Raises ``MahlstickError`` for what is no layer, or not one that the projector takes.
    """
    if layer is None:
        return "pooled" if is_pooled else PENULTIMATE
    if layer not in ("pooled", "patches") and (not isinstance(layer, int) or isinstance(layer, bool)):
        raise MahlstickError(f"layer must be 'pooled', 'patches' or a whole number; got {layer!r}.")
    if (layer == "pooled") != is_pooled:
        takes = "pooled features alone" if is_pooled else "features of patches: give 'patches' or a number"
        raise MahlstickError(f"layer={layer!r} does not go with this projector, which takes {takes}.")
    return cast(Layer, layer)
