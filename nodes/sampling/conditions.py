"""What a CONDITIONING asks of a UNet: its options resolved for one sampling, by ComfyUI's rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from mahlstick.errors import MahlstickError
from mahlstick.nodes.resample import ramp, repeat_to, resample
from mahlstick.nodes.sampling.schedules import percent_to_sigma
from mahlstick.nodes.values import ControlHint, Model

_FEATHER = 8  # latents over which an area fades out
_SMALLEST = 8  # latents, along one side, of the area around a mask
_AREA_UNIT = 8  # pixels: ComfyUI counts areas so whatever the model

#: Height, width, top and left in latents.
Area = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Condition:
    """One entry of a CONDITIONING, made ready for the latents of a sampling.

    ``text`` is ``(n, length, dim)``; ``added`` what an SDXL UNet takes beside it; ``concat`` what an inpainting UNet
    sees beside the latents, ``(batch, 5, h, w)``. ``weight`` says how much the estimate counts at each place of the
    ``area`` (all of the latents where that is None). It acts while ``begins >= sigma >= ends``.
    ``shared``: its ControlNets act on the negative too, where that has none of its own.
    """

    text: Tensor
    weight: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)
    concat: Tensor | None = None
    area: Area | None = None
    begins: float = float("inf")
    ends: float = 0.0
    hints: tuple[ControlHint, ...] = ()
    shared: bool = False

    def of(self, latents: Tensor) -> Tensor:
        """The part of ``(…, h, w)`` that lies in the area, not copied."""
        if self.area is None:
            return latents
        height, width, top, left = self.area
        return latents[..., top : top + height, left : left + width]


def resolve(
    model: Model, conditionings: Mapping[str, Sequence[Any]], latents: Tensor, mask: Tensor | None = None
) -> dict[str, list[Condition]]:
    """Conditionings by name for ``latents`` as the UNet sees them; ``mask`` is that of inpainting, at their size.

    Raises ``MahlstickError`` for a text of another width, and an area outside the picture.
    """
    resolved = {
        name: [_condition(model, name, text, options, latents, mask) for text, options in entries]
        for name, entries in conditionings.items()
    }
    for name, other in permutations(resolved, 2):
        for condition in resolved[name]:
            resolved[other] += _counterpart(condition, resolved[other])
    for name in resolved:
        if name != "positive":
            resolved[name] = _with_shared_hints(resolved[name], resolved.get("positive", []))
    return resolved


def _condition(
    model: Model, name: str, text: Tensor, options: Mapping[str, Any], latents: Tensor, noise_mask: Tensor | None
) -> Condition:
    _check_width(model, text)
    mask = _mask(options, latents)
    area = _area(model, options, mask, latents)
    hints = options.get("control") or ()
    return Condition(
        text=text.to(latents),
        weight=_weight(options, mask, area, latents),
        added=_sdxl_conditions(model, name, options, latents),
        concat=_beside_latents(model, options, latents, noise_mask),
        area=area,
        begins=percent_to_sigma(model.table, options.get("start_percent", 0.0), model.stride),
        ends=percent_to_sigma(model.table, options.get("end_percent", 1.0), model.stride),
        hints=tuple(hints),
        shared=bool(options.get("control_apply_to_uncond")),
    )


def _check_width(model: Model, text: Tensor) -> None:
    config = model.unet.config
    wanted = config.encoder_hid_dim or config.cross_attention_dim
    if isinstance(wanted, int) and text.shape[-1] != wanted:
        raise MahlstickError(
            f"the conditioning is {text.shape[-1]} wide and the model takes {wanted}: encode the text with the CLIP "
            "that belongs to the model."
        )


def _mask(options: Mapping[str, Any], latents: Tensor) -> Tensor | None:
    """The mask ``(n, h, w)`` at the latents' size."""
    mask = options.get("mask")
    if mask is None:
        return None
    mask = mask.to(latents)[None] if mask.ndim == 2 else mask.to(latents)
    if mask.shape[-2:] != latents.shape[-2:]:
        mask = resample(mask[:, None], latents.shape[-1], latents.shape[-2], "bilinear")[:, 0]
    return mask


def _area(model: Model, options: Mapping[str, Any], mask: Tensor | None, latents: Tensor) -> Area | None:
    height, width = latents.shape[-2:]
    if mask is not None and options.get("set_area_to_bounds"):
        return _inside(_bounds(mask), height, width)
    area = options.get("area")
    if area is None:
        return None
    if area[0] == "percentage":
        h, w, y, x = area[1:]
        area = (max(1, round(h * height)), max(1, round(w * width)), round(y * height), round(x * width))
    else:
        area = tuple(extent * _AREA_UNIT // model.factor for extent in area)
    return _inside(area, height, width)


def _inside(area: Sequence[int], height: int, width: int) -> Area:
    h, w, y, x = area
    if y >= height or x >= width:
        raise MahlstickError(
            f"the conditioning's area begins at {x}, {y} (in latents), outside of {width}x{height}: move it inside."
        )
    return min(h, height - y), min(w, width - x), y, x


def _bounds(mask: Tensor) -> Area:
    """The area around all that is not 0."""
    rows, columns = mask.abs().amax(dim=0).nonzero(as_tuple=True)
    if not len(rows):
        return _SMALLEST, _SMALLEST, 0, 0
    top, left = int(rows.min()), int(columns.min())
    return max(_SMALLEST, int(rows.max()) - top + 1), max(_SMALLEST, int(columns.max()) - left + 1), top, left


def _weight(options: Mapping[str, Any], mask: Tensor | None, area: Area | None, latents: Tensor) -> Tensor:
    strength = options.get("strength", 1.0)
    whole = Condition(latents, latents, area=area)
    if mask is not None:
        return repeat_to(whole.of(mask), len(latents))[:, None] * options.get("mask_strength", 1.0) * strength
    weight = torch.ones_like(whole.of(latents)[:1, :1]) * strength
    return weight if area is None else _feathered(weight, area, latents.shape[-2:])


def _feathered(weight: Tensor, area: Area, size: Sequence[int]) -> Tensor:
    """``weight`` fading out where the area ends inside the picture."""
    for axis, whole in enumerate(size):
        extent, begin = area[axis], area[axis + 2]
        fade = min(_FEATHER, extent // 4)
        fades = ramp(extent, fade * (begin > 0), fade * (begin + extent < whole)).to(weight)
        weight = weight * (fades[:, None] if axis == 0 else fades)
    return weight


def _sdxl_conditions(model: Model, name: str, options: Mapping[str, Any], latents: Tensor) -> dict[str, Tensor]:
    """Pooled text and sizes (Podell et al., arXiv 2307.01952, section 2.2), where the UNet takes them.

    The refiner takes an aesthetic score in place of the target size.
    """
    config = model.unet.config
    if config.addition_embed_type != "text_time":
        return {}
    height, width = (side * model.factor for side in latents.shape[-2:])
    height, width = options.get("height", height), options.get("width", width)
    ids = [height, width, options.get("crop_h", 0), options.get("crop_w", 0)]
    target = [options.get("target_height", height), options.get("target_width", width)]
    dim, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    pooled = options.get("pooled_output")
    if pooled is None:
        pooled = torch.zeros(1, dim - each * len(ids + target))
    is_refiner = pooled.shape[-1] + each * (len(ids) + 1) == dim
    ids += [options.get("aesthetic_score", 2.5 if name == "negative" else 6.0)] if is_refiner else target
    return {
        "text_embeds": pooled.to(latents),
        "time_ids": torch.tensor([ids], dtype=latents.dtype, device=latents.device),
    }


def _beside_latents(
    model: Model, options: Mapping[str, Any], latents: Tensor, noise_mask: Tensor | None
) -> Tensor | None:
    """What an inpainting UNet sees beside the latents: the mask and the picture without what lies under it."""
    channels, (height, width) = latents.shape[1], latents.shape[-2:]
    beside = model.unet.config.in_channels - channels
    if beside == 0:
        return None
    if beside != channels + 1:
        raise MahlstickError(
            f"the UNet takes {beside} channels beside the latents' {channels}: an inpainting UNet has {channels + 1}."
        )
    mask = options.get("concat_mask", noise_mask)
    if mask is None:
        return torch.cat([torch.ones_like(latents[:, :1]), _grey(latents)], dim=1)
    picture = options.get("concat_latent_image")
    picture = latents if picture is None else model.scaled(picture.to(latents))
    mask = (mask if mask.ndim == 4 else mask.reshape(-1, 1, *mask.shape[-2:]))[:, :1].to(latents)
    picture, mask = (resample(each, width, height, "bilinear", "center") for each in (picture, mask))
    return torch.cat([repeat_to(mask.round(), len(latents)), repeat_to(picture, len(latents))], dim=1)


def _grey(latents: Tensor) -> Tensor:
    """The latents of a grey picture, Stable Diffusion 1's, which inpainting models saw under the mask."""
    values = torch.tensor([0.8223, -0.6876, 0.6364, 0.1380]).to(latents)
    return values.view(1, 4, 1, 1).expand_as(latents)


def _counterpart(condition: Condition, others: Sequence[Condition]) -> list[Condition]:
    """An area's like on the other side of the guidance, so that both see the same cut-out.

    Its text is that of the smallest area which holds this one, or of what has no area.
    """
    if condition.area is None:
        return []
    around = [other for other in others if other.area is not None and _holds(other.area, condition.area)]
    smallest = min(around, key=_extent) if around else next((each for each in others if each.area is None), None)
    if smallest is None or smallest.area == condition.area:
        return []
    return [replace(condition, text=smallest.text, added=smallest.added, concat=smallest.concat)]


def _extent(condition: Condition) -> int:
    assert condition.area is not None
    return condition.area[0] * condition.area[1]


def _holds(outer: Area, inner: Area) -> bool:
    return all(
        outer[axis + 2] <= inner[axis + 2] and inner[axis] + inner[axis + 2] <= outer[axis] + outer[axis + 2]
        for axis in (0, 1)
    )


def _with_shared_hints(negative: list[Condition], positive: Sequence[Condition]) -> list[Condition]:
    """The negative with the ControlNets that were applied to the positive for both."""
    given = [each.hints for each in positive if each.area is None and each.shared and each.hints]
    free = [place for place, each in enumerate(negative) if each.area is None]
    if not free or any(negative[place].hints for place in free):
        return negative
    result = list(negative)
    for number, hints in enumerate(given):
        place = free[number % len(free)]
        result[place] = replace(negative[place], hints=hints)
    return result
