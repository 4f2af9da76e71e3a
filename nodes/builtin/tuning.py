"""What changes a model while it samples or encodes text: LoRA and FreeU.

Both are patches (`mahlstick.nodes.values.Patch`): they change a network when they are entered, and leave it bit for bit
as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from mahlstick.adapters.formats.checkpoint import open_checkpoint
from mahlstick.adapters.formats.motion_lora import Change
from mahlstick.errors import MahlstickError
from mahlstick.nodes import folders
from mahlstick.nodes.builtin.loaders import first_line
from mahlstick.nodes.schema import Widget, node
from mahlstick.nodes.values import Clip, ClipT, Model, ModelT

Strength = Annotated[float, Widget(min=-100.0, max=100.0, step=0.01)]
LoraName = Annotated[str, Widget(choices=lambda: folders.listed("loras"))]
Factor = Annotated[float, Widget(min=0.0, max=10.0, step=0.01)]

_PARTS = ("unet", "text_encoder", "text_encoder_2")

#: What FreeU multiplies the backbone's features ``(batch, channels, h, w)`` with, from them and ``b``.
Gain = Callable[[Tensor, float], Tensor | float]


@dataclass(frozen=True, eq=False)
class _Lora:
    """A LoRA: for each part of a pipeline, the changes of its weights by name."""

    path: Path
    changes: Mapping[str, Mapping[str, Change]]

    @contextmanager
    def on(self, network: nn.Module, part: str, strength: float) -> Iterator[None]:
        """Within the block the weights of ``network`` are W + strength · (α / rank) · up @ down.

        Merged and not beside the layers, as in ComfyUI: sampling takes no longer, and nothing is left to remove.
        """
        weights = self._fitting(network, part)
        kept = [(weight, weight.data) for weight, _ in weights]
        try:
            for weight, change in weights:
                weight.data = _merged(weight.data, change, strength)
            yield
        finally:
            for weight, data in kept:
                weight.data = data

    def _fitting(self, network: nn.Module, part: str) -> list[tuple[nn.Parameter, Change]]:
        """The weights that change. Raises ``MahlstickError`` where none does, or shapes differ."""
        known = dict(network.named_parameters())
        if not hasattr(network, "text_model"):  # so transformers called the layers of every text encoder once
            known |= {f"text_model.{name}": weight for name, weight in known.items()}
        changes = self.changes[part].items()
        found = [(known[name], change) for name, change in changes if name in known]
        if not found:
            raise MahlstickError(f"{self.path}: this LoRA changes no layer of this {part}; choose one for this base.")
        if len(found) < len(changes):
            left_out = f"{len(changes) - len(found)} of {len(changes)} layers"
            warnings.warn(f"{self.path}: this {part} lacks {left_out}, which are left out", stacklevel=2)
        for weight, change in found:
            if change.shape != (weight.shape[0], weight[0].numel()):
                raise MahlstickError(
                    f"{self.path}: {change.key} is for a layer of {change.shape}, and this {part}'s is "
                    f"{tuple(weight.shape)}; choose a LoRA for this base."
                )
        return found


@torch.no_grad()
def _merged(weight: Tensor, change: Change, strength: float) -> Tensor:
    change = replace(change, up=change.up.to(weight.device), down=change.down.to(weight.device))
    return (weight.float() + strength * change.product().reshape(weight.shape)).to(weight.dtype)


def _read(lora_name: str, unet: Any) -> _Lora:
    """A LoRA in any layout that diffusers reads: kohya's, its own or peft's."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    path = folders.find("loras", lora_name)
    open_checkpoint(path)  # says what is wrong with a damaged file
    try:
        tensors, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
            str(path), unet_config=unet.config, return_lora_metadata=True
        )
    except Exception as error:  # diffusers, safetensors and pickle each have their own
        raise MahlstickError(f"{path}: diffusers cannot read this as a LoRA ({first_line(error)}).") from error
    changes = {part: _changes(part, tensors, alphas or {}, metadata or {}) for part in _PARTS}
    if not any(changes.values()):
        raise MahlstickError(f"{path}: is no LoRA of a UNet or text encoder; choose another file.")
    return _Lora(path, {part: found for part, found in changes.items() if found})


def _changes(
    part: str, tensors: Mapping[str, Tensor], alphas: Mapping[str, float], metadata: Mapping[str, Any]
) -> dict[str, Change]:
    halves = _peft_names(part, tensors)
    given = {name.split(".lora_A.")[0]: alpha for name, alpha in _peft_names(part, alphas, ".alpha").items()}
    found = {}
    for key, down in halves.items():
        layer, is_down, _ = key.partition(".lora_A.weight")
        if is_down:
            up = halves[f"{layer}.lora_B.weight"]
            rank = down.shape[0]
            alpha = given.get(layer, metadata.get(f"{part}.lora_alpha", rank))
            found[f"{layer}.weight"] = Change(key, down.flatten(1), up.flatten(1), alpha / rank)
    return found


def _peft_names(part: str, named: Mapping[str, Any], ending: str = "") -> dict[str, Any]:
    """What belongs to a part of the pipeline, under peft's names: ``layer.lora_A.weight``, ``layer.lora_B.weight``."""
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
    from diffusers.utils.state_dict_utils import StateDictType

    mine = {
        name.removeprefix(f"{part}.").removesuffix(ending): value
        for name, value in named.items()
        if name.startswith(f"{part}.")
    }
    if part == "unet":
        return dict(convert_unet_state_dict_to_peft(mine))
    for kind in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
        mine = convert_state_dict_to_peft(mine, kind)
    return mine


def _with_model(model: Model, lora: _Lora, strength: float) -> Model:
    if not strength or "unet" not in lora.changes:
        return model
    return model.with_patch(lambda unet: lora.on(unet, "unet", strength))


def _with_clip(clip: Clip, lora: _Lora, strength: float) -> Clip:
    places = [place for place, part in enumerate(_PARTS[1:][: len(clip.encoders)]) if part in lora.changes]

    @contextmanager
    def patch(encoders: tuple[nn.Module, ...]) -> Iterator[None]:
        with ExitStack() as patched:
            for place in places:
                patched.enter_context(lora.on(encoders[place], _PARTS[1 + place], strength))
            yield

    return clip.with_patch(patch) if strength and places else clip


def _stamp(lora_name: str | None) -> str | None:
    return folders.stamp(folders.find("loras", lora_name)) if lora_name else None


@node("loaders", display_name="Load LoRA", fingerprint=_stamp)
def LoraLoader(
    *,
    model: ModelT,
    clip: ClipT,
    lora_name: LoraName,
    strength_model: Strength = 1.0,
    strength_clip: Strength = 1.0,
) -> tuple[ModelT, ClipT]:
    """Change a model and its text encoders by a LoRA: a style or subject that was learned on top of them. Several add
    up."""
    if not strength_model and not strength_clip:
        return model, clip
    lora = _read(lora_name, model.unet)
    return _with_model(model, lora, strength_model), _with_clip(clip, lora, strength_clip)


@node("loaders", display_name="LoraLoaderModelOnly", fingerprint=_stamp)
def LoraLoaderModelOnly(*, model: ModelT, lora_name: LoraName, strength_model: Strength = 1.0) -> ModelT:
    """Change a model by a LoRA, and leave the text encoders as they are."""
    return _with_model(model, _read(lora_name, model.unet), strength_model) if strength_model else model


@node("model_patches/unet")
def FreeU(*, model: ModelT, b1: Factor = 1.1, b2: Factor = 1.2, s1: Factor = 0.9, s2: Factor = 0.2) -> ModelT:
    """Strengthen the backbone of the UNet (b) over its skip connections (s), at the widest level (1) and the next (2):
    cleaner pictures without training."""
    return model.with_patch(lambda unet: _free(unet, (b1, s1), (b2, s2), lambda _, b: b))


@node("model_patches/unet")
def FreeU_V2(*, model: ModelT, b1: Factor = 1.3, b2: Factor = 1.4, s1: Factor = 0.9, s2: Factor = 0.2) -> ModelT:
    """As FreeU, stronger where the features are: the gain follows their mean over the channels."""
    return model.with_patch(lambda unet: _free(unet, (b1, s1), (b2, s2), _by_structure))


@contextmanager
def _free(unet: Any, widest: tuple[float, float], next_widest: tuple[float, float], gain: Gain) -> Iterator[None]:
    """FreeU (Si et al., arXiv 2309.11497, equations 3 to 6) as ComfyUI applies it: by the backbone's width, before each
    residual block of the decoder. diffusers' own goes by the number of the block, so it differs."""
    widths = sorted(set(unet.config.block_out_channels))
    factors = dict(zip(widths[::-1], (widest, next_widest), strict=False))
    handles = []
    width = unet.config.block_out_channels[-1]
    for resnet in (resnet for block in unet.up_blocks for resnet in block.resnets):
        if width in factors:
            b, s = factors[width]
            handles.append(resnet.register_forward_pre_hook(_freed(width, b, s, gain)))
        width = resnet.out_channels
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _freed(width: int, b: float, s: float, gain: Gain) -> Callable[..., tuple[Any, ...]]:
    """A hook that changes a residual block's input, where the backbone's ``width`` channels lie before the skip's."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        backbone, skip = args[0][:, :width], args[0][:, width:]
        half = width // 2
        strengthened = backbone[:, :half] * gain(backbone, b)
        return torch.cat([strengthened, backbone[:, half:], _low_frequencies(skip, s)], dim=1), *args[1:]

    return hook


def _by_structure(backbone: Tensor, b: float) -> Tensor:
    """1 where the mean over the channels is smallest, ``b`` where it is largest, ``(batch, 1, h, w)``."""
    mean = backbone.mean(1, keepdim=True)
    low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
    spread = torch.where(high > low, high - low, 1)  # a single place is the smallest and the largest
    return (b - 1) * (mean - low) / spread + 1


def _low_frequencies(skip: Tensor, s: float) -> Tensor:
    """The skip connection with its four lowest frequencies multiplied by ``s``."""
    frequencies = torch.fft.fftshift(torch.fft.fftn(skip.float(), dim=(-2, -1)), dim=(-2, -1))
    row, column = frequencies.shape[-2] // 2, frequencies.shape[-1] // 2
    frequencies[..., row - 1 : row + 1, column - 1 : column + 1] *= s
    return torch.fft.ifftn(torch.fft.ifftshift(frequencies, dim=(-2, -1)), dim=(-2, -1)).real.to(skip)
