"""Tiny random captioners and judges of transformers' real classes, saved as folders that are loaded as real ones."""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from benchmarks import tiny

SIDE, PATCH = 32, 16
_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION = {**_TEXT, "image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.05}  # BLIP's own is 1e-10
_QFORMER = {**_TEXT, "encoder_hidden_size": 16, "cross_attention_frequency": 1}


def words(*special: str, ends: bool = True, **named: str) -> Any:
    """A tokenizer of single letters; with ``ends`` texts stand between [CLS] and [SEP]; ``named`` are special tokens
    that are its attributes too."""
    special = (*special, *named.values())
    known = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *string.ascii_lowercase, *"?.:<>_ ", *special]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(known)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if ends:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", bos_token="[CLS]",
        eos_token="[SEP]", unk_token="[UNK]", extra_special_tokens=named or list(special), model_max_length=64,
    )  # fmt: skip


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {**_TEXT, "vocab_size": len(tokenizer), "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2,
            "pad_token_id": 0, "max_position_embeddings": 64, **more}  # fmt: skip


def _blip_config(tokenizer: Any) -> Any:
    text = _text(tokenizer, encoder_hidden_size=16, projection_dim=16)
    return tf.BlipConfig(text_config=text, vision_config=_VISION, projection_dim=16, image_text_hidden_size=16)


def _blip_processor(tokenizer: Any) -> Any:
    return tf.BlipProcessor(tf.BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer)


def blip(kind: str = "BlipForConditionalGeneration") -> tuple[Any, Any]:
    tokenizer = words()
    return getattr(tf, kind)(_blip_config(tokenizer)), _blip_processor(tokenizer)


def _opt(tokenizer: Any) -> Any:
    return tf.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=16, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def blip2(kind: str = "Blip2ForConditionalGeneration") -> tuple[Any, Any]:
    tokenizer = words("<image>")
    qformer = {**_QFORMER, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 0}
    matching = kind == "Blip2ForImageTextRetrieval"
    if matching:
        qformer["use_qformer_text_input"] = True
    config = tf.Blip2Config(
        vision_config=_VISION, qformer_config=qformer, text_config=_opt(tokenizer).to_dict(), num_query_tokens=4,
        image_text_hidden_size=16, image_token_index=None if matching else len(tokenizer) - 1,
    )  # fmt: skip
    images = tf.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    return getattr(tf, kind)(config), tf.Blip2Processor(images, tokenizer, None if matching else 4)


def instructblip() -> tuple[Any, Any]:
    tokenizer, inner = words("<image>"), words()
    qformer = {**_QFORMER, "vocab_size": len(inner), "max_position_embeddings": 64, "pad_token_id": 0}
    config = tf.InstructBlipConfig(
        vision_config=_VISION, qformer_config=qformer, text_config=_opt(tokenizer).to_dict(), num_query_tokens=4,
        image_token_index=len(tokenizer) - 1,
    )  # fmt: skip
    images = tf.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    return tf.InstructBlipForConditionalGeneration(config), tf.InstructBlipProcessor(images, tokenizer, inner, 4)


def llava() -> tuple[Any, Any]:
    tokenizer = words("<image>", ends=False)
    text = tf.LlamaConfig(**_text(tokenizer), num_key_value_heads=1, max_length=64)
    vision = tf.CLIPVisionConfig(**_VISION, projection_dim=16)
    config = tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=len(tokenizer) - 1, image_seq_length=4,
        vision_feature_layer=-1,
    )  # fmt: skip
    images = tf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = tf.LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return tf.LlavaForConditionalGeneration(config), processor


def qwen2_vl() -> tuple[Any, Any]:
    marks = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = words(*marks, ends=False)
    at = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    text = _text(tokenizer, num_key_value_heads=1, max_position_embeddings=256)
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1, "patch_size": 14}
    config = tf.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=at["<|image_pad|>"], video_token_id=at["<|video_pad|>"],
        vision_start_token_id=at["<|vision_start|>"], vision_end_token_id=at["<|vision_end|>"],
    )  # fmt: skip
    images = tf.Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    processor = tf.Qwen2VLProcessor(images, tokenizer, tf.Qwen2VLVideoProcessor())
    return tf.Qwen2VLForConditionalGeneration(config), processor


def florence2() -> tuple[Any, Any]:
    tokenizer = words(ends=False, image_token="<image>")
    text = tf.BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    vision = {"embed_dim": [8, 8, 8, 8], "depths": [1] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4,
              "window_size": 2, "projection_dim": 16}  # fmt: skip
    config = tf.Florence2Config(text_config=text.to_dict(), vision_config=vision, image_token_id=len(tokenizer) - 1)
    size = {"height": 64, "width": 64}
    images = tf.CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    images.image_seq_length = 4 + 1
    return tf.Florence2ForConditionalGeneration(config), tf.Florence2Processor(images, tokenizer)


def git() -> tuple[Any, Any]:
    tokenizer = words()
    config = tf.GitConfig(vision_config={**_VISION, "projection_dim": 16}, **_text(tokenizer))
    images = tf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return tf.GitForCausalLM(config), tf.GitProcessor(images, tokenizer)


class _Parts:
    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def save_pretrained(self, folder: Path) -> None:
        for part in self.parts:
            part.save_pretrained(folder)


def encoder_decoder() -> tuple[Any, Any]:
    tokenizer = words()
    decoder = tf.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1,
                            eos_token_id=2, add_cross_attention=True, is_decoder=True)  # fmt: skip
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(tf.ViTConfig(**_VISION), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    network = tf.VisionEncoderDecoderModel(config)
    network.generation_config.update(decoder_start_token_id=1, pad_token_id=0, eos_token_id=2)
    return network, _Parts(tf.ViTImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer)


def vilt(kind: str, **labels: Any) -> tuple[Any, Any]:
    tokenizer = words()
    config = tf.ViltConfig(**_text(tokenizer), image_size=SIDE, patch_size=PATCH, max_image_length=-1, **labels)
    images = tf.ViltImageProcessor(size={"shortest_edge": SIDE}, size_divisor=PATCH)
    return getattr(tf, kind)(config), tf.ViltProcessor(images, tokenizer)


def clip() -> tuple[Any, Any]:
    text, vision = tiny.text_encoder().config.to_dict(), tiny.image_encoder().config.to_dict()
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return tf.CLIPModel(config), _Parts(tiny.feature_extractor(), tiny.tokenizer())


def siglip() -> tuple[Any, Any]:
    tokenizer = words()
    config = tf.SiglipConfig(text_config=_text(tokenizer, projection_size=16), vision_config=_VISION)
    return tf.SiglipModel(config), _Parts(tf.SiglipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer)


CAPTIONERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "blip": blip,
    "blip-2": blip2,
    "instructblip": instructblip,
    "llava": llava,
    "qwen2_vl": qwen2_vl,
    "florence2": florence2,
    "git": git,
    "vision-encoder-decoder": encoder_decoder,
}
VQA = {
    "num_labels": 4,
    "id2label": {0: "yes", 1: "no", 2: "fox", 3: "2"},
    "label2id": {"yes": 0, "no": 1, "fox": 2, "2": 3},
}
WAYS = {"num_labels": 3, "id2label": dict(enumerate(("contradiction", "neutral", "entailment")))}
MATCHERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "clip": clip,
    "siglip": siglip,
    "blip": lambda: blip("BlipForImageTextRetrieval"),
    "blip-2": lambda: blip2("Blip2ForImageTextRetrieval"),
    "vilt": lambda: vilt("ViltForImageAndTextRetrieval"),
}
ASKERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "blip": lambda: blip("BlipForQuestionAnswering"),
    "vilt": lambda: vilt("ViltForQuestionAnswering", **VQA),
    "entailment": lambda: vilt(
        "ViltForQuestionAnswering", **WAYS, label2id={v: k for k, v in WAYS["id2label"].items()}
    ),
}


def save(make: Callable[[], tuple[Any, Any]], folder: Path) -> Path:
    """The network, away from its small initial values so that its words vary, and its processor."""
    torch.manual_seed(0)
    network, processor = make()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
