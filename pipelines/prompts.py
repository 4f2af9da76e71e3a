"""Prompt weights, ``(word:1.2)``, and prompts longer than the text encoder's window, through compel.

A plain prompt that fits the window never comes here: the pipeline encodes it itself, bit for bit as without us.
Only the explicit form with a number is a weight, so that brackets in a sentence stay brackets; ``\\(`` is always a
bracket. Weights nest by multiplication: in ``(a (red:1.5) fox:1.2)`` red weighs 1.8.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from mahlstick.errors import MahlstickError

MAX_WEIGHT = 10.0

_TOKEN = re.compile(r"\\[()]|\(|:\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*\)|\)|[^\\():]+|.", re.DOTALL)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """``"a (red:1.5) fox"`` -> ``[("a ", 1.0), ("red", 1.5), (" fox", 1.0)]``.

    Raises :class:`MahlstickError` for a weight outside 0 to 10.
    """
    fragments: list[list[Any]] = []
    opened: list[int] = []  # for every open bracket, the fragment that holds it
    for token in _TOKEN.findall(prompt):
        if token == "(":
            opened.append(len(fragments))
            fragments.append([token, 1.0])
        elif opened and token.startswith(":") and token.endswith(")"):
            start, weight = opened.pop(), float(token[1:-1])
            if not 0.0 <= weight <= MAX_WEIGHT:
                raise MahlstickError(f"prompt: weight {weight:g} is outside 0 to {MAX_WEIGHT:g}")
            fragments[start][0] = ""
            for fragment in fragments[start:]:
                fragment[1] *= weight
        else:
            if token == ")" and opened:
                opened.pop()
            fragments.append([token[-1] if token in (r"\(", r"\)") else token, 1.0])
    return _merge(fragments)


def _merge(fragments: list[list[Any]]) -> list[tuple[str, float]]:
    merged: list[tuple[str, float]] = []
    for text, weight in fragments:
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        elif text:
            merged.append((text, weight))
    return merged


def _encoders(pipe: Any) -> list[tuple[Any, Any]]:
    pairs = [(getattr(pipe, f"tokenizer{i}", None), getattr(pipe, f"text_encoder{i}", None)) for i in ("", "_2")]
    return [(tokenizer, encoder) for tokenizer, encoder in pairs if encoder is not None]


def is_plain(pipe: Any, prompt: str) -> bool:
    """True where the pipeline's own encoding says all there is: no weights, no escapes, and it fits the window."""
    if parse_weights(prompt) not in ([], [(prompt, 1.0)]):
        return False
    tokenizers = [tokenizer for tokenizer, _ in _encoders(pipe)]
    return all(
        len(tokenizer(prompt, verbose=False).input_ids) <= tokenizer.model_max_length for tokenizer in tokenizers
    )


def encode(pipe: Any, prompt: str, negative_prompt: str | None, guided: bool) -> dict[str, Any]:
    """The arguments that carry the prompt into ``pipe(...)``.

    Plain prompts come back as text. Otherwise ``prompt_embeds`` and, under guidance, ``negative_prompt_embeds``, of
    shape (1, n · window, dim) with equal n, and for SDXL the pooled ones of shape (1, dim), taken from the text
    without its weights.
    """
    if is_plain(pipe, prompt) and is_plain(pipe, negative_prompt or ""):
        return {"prompt": prompt, "negative_prompt": negative_prompt}
    zero_negative = negative_prompt is None and getattr(pipe.config, "force_zeros_for_empty_prompt", False)
    texts = [prompt, negative_prompt or ""] if guided else [prompt]
    with torch.no_grad():
        embeds, pooled = _encode_texts(pipe, texts)
    if guided and zero_negative:
        embeds[1] = torch.zeros_like(embeds[1])
        pooled = [pooled[0], torch.zeros_like(pooled[1])] if pooled else pooled
    arguments = dict(zip(("prompt_embeds", "negative_prompt_embeds"), embeds, strict=False))
    return arguments | dict(zip(("pooled_prompt_embeds", "negative_pooled_prompt_embeds"), pooled, strict=False))


def embeddings(pipe: Any, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The texts' embeddings (n, length, dim), all of one length, and for SDXL the pooled ones (n, dim)."""
    with torch.no_grad():
        if all(is_plain(pipe, text) for text in texts):
            found = pipe.encode_prompt(
                texts, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            return found[0], found[2] if len(found) > 2 else None
        embeds, pooled = _encode_texts(pipe, texts)
    return torch.cat(embeds), torch.cat(pooled) if pooled else None


def _encode_texts(pipe: Any, texts: list[str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    from compel import Compel, DiffusersTextualInversionManager, ReturnedEmbeddingsType

    encoders = _encoders(pipe)
    sdxl = hasattr(pipe, "text_encoder_2")
    layer = "PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED" if sdxl else "LAST_HIDDEN_STATES_NORMALIZED"
    parsed = [[fragment for fragment in parse_weights(text) if fragment[0].strip()] or [("", 1.0)] for text in texts]
    per_encoder: list[list[torch.Tensor]] = []
    pooled: list[torch.Tensor] = []
    for index, (tokenizer, text_encoder) in enumerate(encoders):
        compel = Compel(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            textual_inversion_manager=DiffusersTextualInversionManager(pipe),
            returned_embeddings_type=ReturnedEmbeddingsType[layer],
            truncate_long_prompts=False,
            device=str(pipe._execution_device),
        )
        provider = compel.conditioning_provider
        embeds = [
            provider.get_embeddings_for_weighted_prompt_fragments(
                [[text for text, _ in fragments]], [[weight for _, weight in fragments]], device=compel.device
            )
            for fragments in parsed
        ]
        per_encoder.append(compel.pad_conditioning_tensors_to_same_length(embeds))
        if sdxl and index == len(encoders) - 1:
            plain = ["".join(text for text, _ in fragments) for fragments in parsed]
            pooled = [provider.get_pooled_embeddings([text], device=compel.device) for text in plain]
    return [torch.cat(parts, dim=-1) for parts in zip(*per_encoder, strict=True)], pooled
