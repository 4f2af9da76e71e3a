"""What flows between nodes, in ComfyUI's shapes, and the types by which nodes declare it.

IMAGE is a tensor ``(batch, height, width, 3)`` in [0, 1], MASK ``(batch, height, width)``, LATENT a dict with
``samples`` ``(batch, channels, h, w)`` as the autoencoder gives them, not multiplied by its scaling factor, and
CONDITIONING a list of ``[text (1, length, dim), options]``. What else flows are the classes below. None of them is ever
changed: a node that adjusts a model returns another that shares its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from torch import Tensor

from mahlstick.adapters.controlnet import ControlNet, Mode
from mahlstick.nodes.schema import Socket
from mahlstick.pipelines.units import Unit

Prediction = Literal["epsilon", "v_prediction", "sample", "lcm"]

#: Changes a network for as long as a block lasts: a LoRA, FreeU.
Patch = Callable[[Any], AbstractContextManager[Any]]

#: The guided estimate from (conditional, unconditional, scale, x, sigma), each an estimate of x0.
Guide = Callable[[Tensor, Tensor, float, Tensor, Tensor], Tensor]

#: The number of the noise that each frame begins with, from how many frames there are and the seed.
NoiseOrder = Callable[[int, int], Sequence[int]]

#: ``denoiser(x, sigma) -> x0`` with ``sigma`` of shape ``(batch,)``.
Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Model:
    """A UNet with what sampling must know of it.

    ``sigmas`` is the noise of each training step, rising. A distilled model knows only every ``stride``-th of them, up
    to the last. ``units`` act on the UNet while it samples, ``patches`` change it for so long. Latents ``z`` go in as
    ``(z - latent_shift) * latent_scale``. ``factor``: pixels for one latent, along one side. ``noise_order``: unless
    the latents have a ``batch_index``, this makes it. ``autoencoder``: the one that belongs to it, for previews.
    """

    unet: Any
    sigmas: Tensor
    prediction: Prediction = "epsilon"
    stride: int = 1
    latent_scale: float = 1.0
    latent_shift: float = 0.0
    factor: int = 8
    units: tuple[Unit, ...] = ()
    patches: tuple[Patch, ...] = ()
    guide: Guide | None = None
    noise_order: NoiseOrder | None = None
    autoencoder: Any = None

    @property
    def table(self) -> Tensor:
        """The sigmas of the training steps that the model knows."""
        return self.sigmas[self.stride - 1 :: self.stride]

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents as the UNet takes them."""
        return (latents - self.latent_shift) * self.latent_scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents as they flow between nodes."""
        return latents / self.latent_scale + self.latent_shift

    def with_units(self, *units: Unit) -> Model:
        return replace(self, units=(*self.units, *units))

    def with_patch(self, patch: Patch) -> Model:
        return replace(self, patches=(*self.patches, patch))


@dataclass(frozen=True)
class Clip:
    """Text encoders with their tokenizers: one for Stable Diffusion 1 and 2, two for XL.

    ``layer`` counts hidden states from the end (-1 the last); None is the family's own.
    """

    tokenizers: tuple[Any, ...]
    encoders: tuple[Any, ...]
    layer: int | None = None
    patches: tuple[Patch, ...] = ()

    def with_patch(self, patch: Patch) -> Clip:
        """``patch`` is called with the tuple of encoders."""
        return replace(self, patches=(*self.patches, patch))


@dataclass(frozen=True)
class Vae:
    """An autoencoder of diffusers. Its latents flow as it gives them, without its scaling factor."""

    autoencoder: Any

    @property
    def factor(self) -> int:
        """Pixels for one latent, along one side."""
        return int(2 ** (len(self.autoencoder.config.block_out_channels) - 1))


@dataclass(frozen=True)
class ClipVision:
    """A vision model of transformers with its picture processor."""

    encoder: Any
    processor: Any


@dataclass(frozen=True)
class ControlHint:
    """A ControlNet applied to a conditioning: kept in its options under ``control``, as a tuple of these.

    ``image`` is an IMAGE. ``start`` and ``end`` are fractions of the noise schedule (ComfyUI's percent).
    """

    net: ControlNet
    image: Tensor
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Tensor | None = None
    mode: Mode = "balanced"


@dataclass(frozen=True)
class Sampler:
    """A sampler with its own settings, as ``SamplerCustom`` takes it.

    ``run(denoiser, x, sigmas, seed=, in_run=True, **options)``, as :func:`mahlstick.nodes.sampling.samplers.sample`
    behind its first argument. ``new_noise``: what a mask keeps is under other noise than the rest (ComfyUI's ddim).
    """

    run: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    new_noise: bool = False


ModelT = Annotated[Model, Socket("MODEL")]
ClipT = Annotated[Clip, Socket("CLIP")]
VaeT = Annotated[Vae, Socket("VAE")]
ConditioningT = Annotated[list[Any], Socket("CONDITIONING")]
LatentT = Annotated[dict[str, Any], Socket("LATENT")]
ImageT = Annotated[Tensor, Socket("IMAGE")]
MaskT = Annotated[Tensor, Socket("MASK")]
ControlNetT = Annotated[Any, Socket("CONTROL_NET")]
ClipVisionT = Annotated[ClipVision, Socket("CLIP_VISION")]
ClipVisionOutputT = Annotated[Any, Socket("CLIP_VISION_OUTPUT")]
SamplerT = Annotated[Sampler, Socket("SAMPLER")]
SigmasT = Annotated[Tensor, Socket("SIGMAS")]
NoiseT = Annotated[Any, Socket("NOISE")]
GuiderT = Annotated[Any, Socket("GUIDER")]
IPAdapterT = Annotated[Any, Socket("IPADAPTER")]
EmbedsT = Annotated[Any, Socket("EMBEDS")]
AnyT = Annotated[Any, Socket("*")]
