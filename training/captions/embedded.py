"""A small captioner on a frozen image encoder: BLIP's text decoder (2201.12086, section 3.1) at toy size.

``mahlstick train captioner`` makes it, and one comes with the embedded model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mahlstick.annotators import weights
from mahlstick.errors import MahlstickError
from mahlstick.pipelines.load import embedded_folder
from mahlstick.pipelines.recipe import fingerprint

WIDTH, LAYERS, HEADS = 128, 3, 4
DECODER = "decoder"  # the folder of the network that writes, beside those of what it reads with
PARTS = ("image_encoder", "feature_extractor", "tokenizer")
IGNORED = -100  # by the cross entropy


def make_decoder(encoder: Any, tokenizer: Any) -> Any:
    """A fresh decoder for the encoder's features and the tokenizer's words: below a million parameters for two thousand
    words."""
    from transformers import BlipTextConfig, BlipTextLMHeadModel

    config = BlipTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, encoder_hidden_size=encoder.config.hidden_size, is_decoder=True, hidden_act="gelu",
        max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, sep_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return BlipTextLMHeadModel(config)


def features_of(encoder: Any, pixels: Tensor) -> Tensor:
    """What a vision transformer sees, (B, tokens, dim): its class token and its patches, each brought to mean 0 and
    variance 1, since the encoder's own last norm learned from the class token alone."""
    hidden = encoder(pixel_values=pixels).last_hidden_state
    return F.layer_norm(hidden, hidden.shape[-1:])


def loss_of(decoder: Any, features: Tensor, ids: Tensor) -> Tensor:
    """(B,): the mean cross entropy of each row's tokens ``ids`` (B, length) given the features (B, tokens, dim), up to
    its first end of text; what fills up the row beyond does not count."""
    ends = ids == decoder.config.eos_token_id
    labels = ids.masked_fill(ends.cumsum(1) - ends.long() > 0, IGNORED)
    counts = (labels[:, 1:] != IGNORED).sum(1)
    longest = int(counts.max()) + 1
    found = decoder(
        ids[:, :longest], labels=labels[:, :longest], encoder_hidden_states=features.to(decoder.dtype), reduction="none"
    )
    return cast(Tensor, found.loss / counts)


@dataclass(frozen=True)
class EmbeddedCaptioner:
    """The decoder with the encoder that it reads and the tokenizer that it writes with."""

    decoder: Any
    encoder: Any
    processor: Any
    tokenizer: Any
    name: str
    prompt: str
    facts: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path, device: str, dtype: torch.dtype, prompt: str | None = None) -> EmbeddedCaptioner:
        """From a folder as ``mahlstick train captioner`` leaves it; what the folder lacks beside the decoder is taken
        from the folder around it, as the embedded model shares its encoder."""
        import transformers

        at = {part: folder / part if (folder / part).is_dir() else folder.parent / part for part in PARTS}

        def load_all(_: bool) -> tuple[Any, ...]:
            return (
                transformers.BlipTextLMHeadModel.from_pretrained(folder / DECODER, dtype=dtype).eval().to(device),
                transformers.CLIPVisionModelWithProjection.from_pretrained(at["image_encoder"]).eval().to(device),
                transformers.AutoImageProcessor.from_pretrained(at["feature_extractor"]),
                transformers.AutoTokenizer.from_pretrained(at["tokenizer"]),
            )

        needed = "a captioner of `mahlstick train captioner`"
        decoder, encoder, processor, tokenizer = weights.load(str(folder), needed, load_all)
        reads, sees = decoder.config.encoder_hidden_size, encoder.config.hidden_size
        if reads != sees:
            raise MahlstickError(
                f"{str(folder)!r} holds a decoder of {reads} numbers a patch and an encoder of {sees}; train it again"
            )
        facts = {"decoder": fingerprint(folder / DECODER), "encoder": fingerprint(at["image_encoder"])}
        return cls(decoder, encoder, processor, tokenizer, str(folder), prompt or "", facts)

    @torch.no_grad()
    def generate(self, pictures: Sequence[Image.Image], **options: Any) -> list[str]:
        """As many captions of each picture as the options ask for, those of a picture together."""
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        seen = features_of(self.encoder, pixels.to(self.encoder.device, self.encoder.dtype)).to(self.decoder.dtype)
        start = [self.tokenizer.bos_token_id]
        start += self.tokenizer(self.prompt, add_special_tokens=False).input_ids if self.prompt else []
        ids = torch.tensor([start] * len(pictures), device=seen.device)
        options["max_new_tokens"] = min(options["max_new_tokens"], self.tokenizer.model_max_length - len(start))
        made = self.decoder.generate(ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=seen, **options)
        texts = self.tokenizer.batch_decode(made[:, len(start) :], skip_special_tokens=True)
        return [re.sub(r" (?=[,.;:!?])", "", text) for text in texts]  # its words all end in a space


def shipped_captioner() -> Path | None:
    """The captioner that comes with the embedded model, where it does."""
    folder = embedded_folder() / "captioner"
    return folder if (folder / DECODER).is_dir() else None
