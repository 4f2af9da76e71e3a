"""Text that changes with the frames: prompts at key frames, and between them their embeddings' mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mahlstick.adapters.base import Attachment, Clock
from mahlstick.errors import MahlstickError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class TextAttachment(Attachment):
    """Replaces the text of the conditional part of every call, frame by frame.

    ``text`` (keys, length, dim) and, for SDXL, ``pooled`` (keys, dim) hold at the frames ``keys``, which rise; between
    two of them a frame has the linear mixture of both, before the first and behind the last that one's. ``frames``: of
    a clip; None takes each part of the batch for one clip.
    """

    before_others = True

    def __init__(
        self,
        unet: UNet2DConditionModel,
        keys: Sequence[int],
        text: Tensor,
        pooled: Tensor | None = None,
        frames: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__(None, unet, None, clock)
        self.keys, self.text, self.pooled, self.frames = list(keys), text, pooled, frames

    @property
    def acts(self) -> bool:
        return True

    def _contribute(self, arguments: dict[str, Any], parts: tuple[str, ...] | None, acts: bool) -> dict[str, Any]:
        parts = parts or ("cond",)
        size = arguments["sample"].shape[0] // len(parts)
        pictures, whole = range(size), size
        if self.excerpt is not None:
            pictures, whole = self.excerpt.pictures, self.excerpt.whole  # type: ignore[assignment]
        places = [picture % (self.frames or whole) for picture in pictures]
        changes = {"encoder_hidden_states": self._mixed(arguments["encoder_hidden_states"], self.text, places, parts)}
        if self.pooled is not None:
            added = arguments["added_cond_kwargs"]
            mixed = self._mixed(added["text_embeds"], self.pooled, places, parts)
            rows = arguments["sample"].shape[0] // added["time_ids"].shape[0]
            sizes = added["time_ids"].repeat_interleave(rows, 0)
            changes["added_cond_kwargs"] = added | {"text_embeds": mixed, "time_ids": sizes}
        return changes

    def _mixed(self, given: Tensor, by_key: Tensor, places: Sequence[int], parts: tuple[str, ...]) -> Tensor:
        """``given`` with every part but the unconditional one replaced, one row for each picture."""
        rows = between(by_key.to(given), self.keys, places)
        kept = given.unflatten(0, (len(parts), -1))
        one_each = len(places) // kept.shape[1]
        if rows.ndim == 3:
            longest = max(rows.shape[-2], kept.shape[-2])
            rows, kept = _repeated(rows, longest), _repeated(kept, longest)
        return torch.cat([kept[i].repeat_interleave(one_each, 0) if part == "uncond" else rows
                          for i, part in enumerate(parts)])  # fmt: skip


def _repeated(text: Tensor, length: int) -> Tensor:
    """Text (…, tokens, dim) repeated to ``length`` tokens: attention over every key twice is attention over it once."""
    if length % text.shape[-2]:
        raise MahlstickError(
            f"prompts of {length} tokens do not go with others of {text.shape[-2]}: make them as long, or shorter."
        )
    return text.repeat(*[1] * (text.ndim - 2), length // text.shape[-2], 1)


def between(values: Tensor, keys: Sequence[int], places: Sequence[int]) -> Tensor:
    """Values (keys, ...) at the rising ``keys``, linearly between them: (places, ...)."""
    at, known = torch.tensor(places, dtype=torch.float32), torch.tensor(keys, dtype=torch.float32)
    right = torch.searchsorted(known, at, right=True).clamp(1, len(keys) - 1) if len(keys) > 1 else at.long() * 0
    left = (right - 1).clamp(min=0)
    share = ((at - known[left]) / (known[right] - known[left]).clamp(min=1)).clamp(0, 1)
    share = share.view(-1, *[1] * (values.ndim - 1)).to(values)
    left, right = left.to(values.device), right.to(values.device)
    return values[left] * (1 - share) + values[right] * share
