"""Models that write captions: transformers' families, each with the prompt that it wants, and the embedded one.

    captioner = load("path/to/blip")
    captioner.generate(pictures, max_new_tokens=30)  # a caption for each

What a model is shows in its config's ``model_type``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from mahlstick.annotators import weights
from mahlstick.errors import MahlstickError
from mahlstick.pipelines.load import choose_device, choose_dtype
from mahlstick.pipelines.recipe import fingerprint
from mahlstick.training.captions.embedded import DECODER, EmbeddedCaptioner, shipped_captioner
from mahlstick.training.metrics import refuse_untrained

EMBEDDED = "embedded"
_ASK = "Describe this picture in one short sentence."


class Captioner(Protocol):
    """Writes captions. ``name`` is what was asked for, ``prompt`` what it is told, ``facts`` all else that its captions
    depend on, as JSON."""

    @property
    def name(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...

    def generate(self, pictures: Sequence[Image.Image], **options: Any) -> list[str]:
        """Captions, those of a picture together; ``options`` are of transformers' ``generate``."""


# ---- families of transformers


@dataclass(frozen=True)
class Family:
    """How the models of a kind are loaded and asked.

    ``model``: transformers' class. ``prompt``: what they are told unless something else is given. ``frame``: what
    stands around it, for those that chat and bring no chat template of their own. ``chats``: whether they do.
    """

    model: str
    prompt: str = ""
    frame: str = "{prompt}"
    chats: bool = False


_VICUNA = "USER: <image>\n{prompt} ASSISTANT:"
_QWEN = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n"
_CHAT = "AutoModelForImageTextToText"

#: By ``model_type``. Prompts are those of the papers' programs and the models' own pages.
FAMILIES = {
    "blip": Family("BlipForConditionalGeneration"),
    "blip-2": Family("Blip2ForConditionalGeneration", "a photo of"),
    "instructblip": Family("InstructBlipForConditionalGeneration", "Write a short description for the image."),
    "llava": Family("LlavaForConditionalGeneration", _ASK, _VICUNA, chats=True),
    "llava_next": Family(_CHAT, _ASK, _VICUNA, chats=True),
    "llava_onevision": Family(_CHAT, _ASK, _QWEN.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>\n"),
                              chats=True),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", _ASK, _QWEN, chats=True),
    "qwen2_5_vl": Family(_CHAT, _ASK, _QWEN, chats=True),
    "florence2": Family("Florence2ForConditionalGeneration", "<CAPTION>"),
    "git": Family("GitForCausalLM"),
    "vision-encoder-decoder": Family("VisionEncoderDecoderModel"),
}  # fmt: skip


@dataclass(frozen=True)
class TransformersCaptioner:
    """A model of one of the `FAMILIES` with its processor."""

    family: Family
    model: Any
    processor: Any
    name: str
    prompt: str
    facts: Mapping[str, Any]

    @classmethod
    def load(cls, model: str, device: str, dtype: torch.dtype, prompt: str | None = None) -> TransformersCaptioner:
        """From a folder or hub id. Raises ``MahlstickError`` for a model that is not there or of no known family."""
        import transformers

        def load_kind(local: bool) -> str:
            return cast(str, transformers.AutoConfig.from_pretrained(model, local_files_only=local).model_type)

        kind = weights.load(model, "a captioner", load_kind, ways_out(model))
        if kind not in FAMILIES:
            raise MahlstickError(f"{model}: is a {kind}, which is no captioner; give one of {', '.join(FAMILIES)}")
        family = FAMILIES[kind]

        def load_both(local: bool) -> tuple[Any, Any, set[str]]:
            network, found = getattr(transformers, family.model).from_pretrained(
                model, local_files_only=local, dtype=dtype, output_loading_info=True
            )
            return network.eval().to(device), _load_processor(model, local), set(found["missing_keys"])

        network, processor, missing = weights.load(model, f"a captioner ({kind})", load_both, ways_out(model))
        refuse_untrained(model, missing)
        if prompt and isinstance(processor, _Mute):
            raise MahlstickError(f"prompt: {model} is a {kind}, which reads none; leave it out")
        processor.tokenizer.padding_side = "left"  # what is generated follows the prompt at once
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        words = family.prompt if prompt is None else prompt
        return cls(family, network, processor, model, words, {"weights": fingerprint(Path(model).expanduser())})

    @torch.no_grad()
    def generate(self, pictures: Sequence[Image.Image], **options: Any) -> list[str]:
        """As `Captioner.generate`."""
        inputs = self._inputs(pictures)
        made = self.model.generate(**inputs, **options)
        texts = self._decoded(made)
        if "input_ids" not in inputs:
            return texts
        told = self._decoded(inputs["input_ids"])
        times = len(texts) // len(told)
        return [text.removeprefix(told[i // times]) for i, text in enumerate(texts)]

    def _decoded(self, ids: Tensor) -> list[str]:
        return cast(list[str], self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True))

    def _inputs(self, pictures: Sequence[Image.Image]) -> Any:
        asked = self._asked()
        # Asked nothing, the families that need no words begin by themselves.
        text = {"text": [asked] * len(pictures), "padding": True} if asked else {}
        inputs = self.processor(images=list(pictures), return_tensors="pt", **text)
        if asked and self.family.model == "GitForCausalLM":  # it would go on after the end of the text
            inputs["input_ids"], inputs["attention_mask"] = (
                inputs["input_ids"][:, :-1],
                inputs["attention_mask"][:, :-1],
            )
        return inputs.to(self.model.device, self.model.dtype)

    def _asked(self) -> str:
        """The prompt in its frame: the model's own chat template where it has one."""
        if not (self.family.chats and getattr(self.processor, "chat_template", None)):
            return self.family.frame.format(prompt=self.prompt)
        content = [{"type": "image"}, {"type": "text", "text": self.prompt}]
        chat = [{"role": "user", "content": content}]
        return cast(str, self.processor.apply_chat_template(chat, add_generation_prompt=True))


@dataclass(frozen=True)
class _Mute:
    """An image processor and a tokenizer that no processor class joins, as those of an encoder and a decoder."""

    images: Any
    tokenizer: Any

    def __call__(self, images: Sequence[Image.Image], return_tensors: str) -> Any:
        return self.images(images=images, return_tensors=return_tensors)


def _load_processor(model: str, local: bool) -> Any:
    import transformers

    found = transformers.AutoProcessor.from_pretrained(model, local_files_only=local)
    if hasattr(found, "tokenizer"):
        return found
    images = transformers.AutoImageProcessor.from_pretrained(model, local_files_only=local)
    return _Mute(images, transformers.AutoTokenizer.from_pretrained(model, local_files_only=local))


def ways_out(model: str) -> str:
    """Where a captioner comes from."""
    name = "OWNER/NAME" if Path(model).expanduser().exists() or model.count("/") != 1 else model
    fetch = f"fetch it where there is a connection (hf download {name} --local-dir FOLDER)"
    return f"give --model a folder that holds it, {fetch}, or leave --model out for the embedded captioner"


def load(
    model: str = EMBEDDED, prompt: str | None = None, device: str | None = None, dtype: str | None = None
) -> Captioner:
    """The captioner by its folder or hub id, or the ``embedded`` one. ``prompt`` replaces the family's own; ``device``
    and ``dtype`` are `load_pipeline`'s. Raises ``MahlstickError`` where it is not there."""
    device = choose_device(device)
    precision = choose_dtype(dtype, device)
    if model == EMBEDDED:
        folder = shipped_captioner()
        if folder is None:
            raise MahlstickError(
                "the embedded model comes without a captioner yet; give --model a captioner's folder or hub id, or"
                " train one: mahlstick train captioner --data my_pictures --out my_captioner"
            )
        return replace(EmbeddedCaptioner.load(folder, device, precision, prompt), name=EMBEDDED)
    if (Path(model).expanduser() / DECODER).is_dir():
        return EmbeddedCaptioner.load(Path(model).expanduser(), device, precision, prompt)
    return TransformersCaptioner.load(model, device, precision, prompt)


# ---- drawing words


class Lots(LogitsProcessor):
    """Draws each row's next token by the Gumbel-max trick, from a generator of the row's own: argmax of the logits plus
    Gumbel noise is a sample of their softmax (Gumbel 1954). So a caption depends on its key alone, and not on what else
    is in the batch or where a run was interrupted.

    ``keys``: of each row. What is drawn from are the likeliest tokens that together reach ``top_p`` (1904.09751).
    """

    def __init__(self, keys: Sequence[str], temperature: float, top_p: float) -> None:
        seeds = (int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") for key in keys)
        self.random = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature, self.nucleus = temperature, TopPLogitsWarper(top_p)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (rows, vocabulary) → 0 at the drawn token, −∞ elsewhere."""
        logits = self.nucleus(input_ids, scores.float() / self.temperature)
        waits = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=own) for own in self.random])
        drawn = (logits - waits.log().to(logits.device)).argmax(1, keepdim=True)
        return torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)


def sampling(keys: Sequence[str], count: int, temperature: float, top_p: float) -> dict[str, Any]:
    """Options of ``generate`` for ``count`` captions of each picture, whose ``keys`` are given."""
    rows = [f"{key} {k}" for key in keys for k in range(count)]
    lots = LogitsProcessorList([Lots(rows, temperature, top_p)])
    # What the model's own settings say of drawing has no say, for the lots are drawn.
    return {"do_sample": True, "num_return_sequences": count, "num_beams": 1, "temperature": 1.0, "top_k": 0,
            "top_p": 1.0, "logits_processor": lots}  # fmt: skip
