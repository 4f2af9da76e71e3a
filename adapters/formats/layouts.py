"""The table of layouts: by which keys each is recognised, and how it becomes ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mahlstick.adapters.formats import controlnet, ip_adapter, motion, qformer, sparse_control

Translate = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Layout:
    """One published layout of one kind of file.

    ``marks`` are patterns, each of which some key must match. Of the keys, those that match ``keep`` belong to the
    adapter, and lose ``prefix``; ``translate`` takes them to our key names (None: the kind is known, not loaded).
    ``title`` and ``way_out`` make the sentence "this is {title}, not a …: {way_out}". ``implies`` are config fields
    that no shape shows.
    """

    kind: str
    name: str
    marks: tuple[str, ...]
    title: str
    way_out: str
    translate: Translate | None = None
    keep: str = ""
    prefix: str = ""
    implies: Mapping[str, Any] = field(default_factory=dict)

    def recognises(self, names: Iterable[str]) -> bool:
        text = "\n".join(names)
        return all(re.search(mark, text, re.MULTILINE) for mark in self.marks)

    def members(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if re.match(self.keep, name)]

    def ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The members' tensors (real ones or a header's) under our key names."""
        assert self.translate is not None
        return self.translate({name.removeprefix(self.prefix): tensors[name] for name in self.members(tensors)})


@dataclass(frozen=True)
class Kind:
    """What the layouts of one kind share, in our key names."""

    title: str
    class_name: str
    needs: str
    config_of: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Any]]
    expected: Callable[[Mapping[str, Any]], Mapping[str, tuple[int, ...]]]
    check_heads: Callable[[Mapping[str, Any], Mapping[str, Tensor]], None]


KINDS = {
    "controlnet": Kind(
        "a ControlNet",
        "ControlNetModel",
        "controlnet_cond_embedding.* and controlnet_down_blocks.* (diffusers) or control_model.*, input_hint_block.* "
        "and zero_convs.* (original)",
        controlnet.config_of,
        controlnet.expected,
        controlnet.check_heads,
    ),
    "sparse_controlnet": Kind(
        "a SparseCtrl encoder",
        "SparseControlNetModel",
        "controlnet_cond_embedding.* and motion_modules.*",
        sparse_control.config_of,
        sparse_control.expected,
        sparse_control.check_heads,
    ),
    "ip_adapter": Kind(
        "an IP-Adapter",
        "IPAdapter",
        "image_proj.* and ip_adapter.* (original) or encoder_hid_proj.image_projection_layers.* (diffusers)",
        ip_adapter.config_of,
        ip_adapter.expected,
        ip_adapter.check_heads,
    ),
    "motion_adapter": Kind(
        "a motion module",
        "MotionAdapter",
        "motion_modules.* with transformer_blocks.* (diffusers) or temporal_transformer.* (original)",
        motion.config_of,
        motion.expected,
        motion.check_heads,
    ),
    "qformer": Kind(
        "a Q-Former",
        "QFormer",
        "query_tokens and qformer.encoder.layer.* (transformers)",
        qformer.config_of,
        qformer.expected,
        qformer.check_heads,
    ),
}

_NO_UNET = "it is not made for a UNet of Stable Diffusion, load it with diffusers"
_NOT_YET = "this kind is not supported"
_CONTROLNET = "load it with ControlNet.from_pretrained"
_MOTION = "load it with MotionAdapter.from_pretrained"
_MOTION_LORA = ("a motion LoRA", "merge it into a motion module with module.with_lora(path)")
_ANY = "load it with load_adapter"
_IP_ADAPTER = "load it with IPAdapter.from_pretrained"
_QFORMER = "begin an IP-Adapter with it: mahlstick train ip-adapter --projector qformer --start"

_SPARSE = r"controlnet_(cond_embedding|down_blocks)\."


def _annotator(name: str) -> tuple[str, str]:
    """Title and way out of the weights of an annotator that is here."""
    return (
        f"a network of the annotator {name}",
        f"give it the file's folder: mahlstick annotate {name} PICTURE -o model=FOLDER",
    )


# The first match counts, so what holds another's keys and more stands before it.
LAYOUTS = (
    Layout("control_lora", "original", (r"^lora_controlnet$",), "a Control-LoRA", _NOT_YET),
    Layout("controlnet_lllite", "original", (r"lllite",), "a ControlNet-LLLite", _NOT_YET),
    Layout(
        "controlnet_union",
        "diffusers",
        (r"^(control_model\.)?(control_add_embedding|task_embedding)",),
        "a ControlNet-Union",
        f"{_NOT_YET}, use the ControlNet of one condition",
    ),
    Layout("controlnet_xs", "diffusers", (r"control_to_base|ctrl_to_base",), "a ControlNet-XS", _NOT_YET),
    Layout(
        "sparse_controlnet",
        "original",
        (_SPARSE, r"motion_modules\.\d+\.temporal_transformer\."),
        "a SparseCtrl encoder",
        _ANY,
        sparse_control.from_original,
        implies={"norm": "frame"},
    ),
    Layout(
        "sparse_controlnet",
        "diffusers",
        (_SPARSE, r"motion_modules\."),
        "a SparseCtrl encoder",
        _ANY,
        dict,
    ),
    Layout(
        "controlnet_transformer",
        "diffusers",
        (r"^(controlnet_(single_)?blocks|controlnet_x_embedder|control_layers|control_all_x_embedder)\.",),
        "a ControlNet of a transformer (Flux, SD 3 or the like)",
        _NO_UNET,
    ),
    Layout(
        "ip_adapter_faceid",
        "original",
        (r"^image_proj\.perceiver_resampler\.|^ip_adapter\.\d+\.to_q_lora\.",),
        "an IP-Adapter FaceID",
        f"{_NOT_YET}, use a base, plus or full IP-Adapter",
    ),
    Layout(
        "ip_adapter_faceid",
        "original",
        (r"^image_proj\.proj\.0\.weight$", r"^image_proj\.norm\.weight$"),
        "an IP-Adapter FaceID",
        f"{_NOT_YET}, use a base, plus or full IP-Adapter",
    ),
    Layout(
        "ip_adapter_transformer",
        "original",
        (r"ip_adapter_(double|single)_stream|^ip_adapter_proj_model\.",),
        "an IP-Adapter of a transformer (Flux)",
        _NO_UNET,
    ),
    Layout("motion_lora", "original", (r"motion_modules\..*\.temporal_transformer\..*lora",), *_MOTION_LORA),
    Layout("motion_lora", "diffusers", (r"motion_modules.*lora|lora.*motion_modules",), *_MOTION_LORA),
    Layout("pia", "original", (r"motion_modules", r"^conv_in\."), "a PIA motion module", _NOT_YET),
    Layout(
        "unet_motion",
        "diffusers",
        (r"motion_modules", r"^conv_out\."),
        "a whole UNet with motion modules",
        "load it with diffusers' UNetMotionModel, or take its MotionAdapter",
    ),
    Layout(
        "motion_adapter",
        "original",
        (r"motion_modules\.\d+\.temporal_transformer\.",),
        "a motion module",
        _MOTION,
        motion.from_original,
        keep=r".*motion_modules\.",
        implies={"norm": "frame"},
    ),
    Layout(
        "motion_adapter",
        "diffusers",
        (r"^(down|up)_blocks\.\d+\.motion_modules\.",),
        "a motion module",
        _MOTION,
        dict,
        keep=r".*motion_modules\.",
    ),
    # diffusers' load_lora_weights passes over these names without an error.
    Layout(
        "lora",
        "processors",
        (r"^(down_blocks|up_blocks|mid_block)\..*\.processor\.\w+_lora\.",),
        "a LoRA of a UNet (such as AnimateDiff's domain adapter)",
        "load its weights with pipe.unet.load_lora_adapter(weights, prefix=None)",
    ),
    Layout(
        "lora",
        "original",
        (r"lora_(up|down|A|B)\b|lora\.(up|down)\b|^lora_(unet|te)|lora_linear_layer|\.hada_w1|\.lokr_w1",),
        "a LoRA",
        "load it with pipe.load_lora_weights",
    ),
    Layout(
        "controlnet",
        "diffusers",
        (r"^controlnet_(cond_embedding|down_blocks)\.",),
        "a ControlNet",
        _CONTROLNET,
        dict,
    ),
    Layout(
        "controlnet",
        "original difference",
        (r"^difference$", r"^control_model\."),
        "a ControlNet",
        _CONTROLNET,
        controlnet.from_original,
        keep=r"control_model\.",
        prefix="control_model.",
    ),
    Layout(
        "controlnet",
        "original",
        (r"^control_model\.",),
        "a ControlNet",
        _CONTROLNET,
        controlnet.from_original,
        keep=r"control_model\.",
        prefix="control_model.",
    ),
    Layout(
        "controlnet",
        "original without prefix",
        (r"^(input_hint_block|zero_convs)\.",),
        "a ControlNet",
        _CONTROLNET,
        controlnet.from_original,
    ),
    Layout("ip_adapter", "original", (r"^(image_proj|ip_adapter)\.",), "an IP-Adapter", _IP_ADAPTER, dict),
    Layout(
        "ip_adapter",
        "training checkpoint",
        (r"^image_proj_model\.",),
        "an IP-Adapter",
        _IP_ADAPTER,
        ip_adapter.from_training,
        keep=r"image_proj_model\.|.*_ip\.",
    ),
    Layout(
        "ip_adapter",
        "diffusers",
        (r"^encoder_hid_proj\.image_projection_layers\.",),
        "an IP-Adapter",
        _IP_ADAPTER,
        ip_adapter.from_diffusers,
        keep=r"encoder_hid_proj\.image_projection_layers\.|.*_ip\.",
    ),
    Layout(
        "qformer",
        "transformers",
        (r"^query_tokens$", r"^qformer\.encoder\.layer\.0\.crossattention\."),
        "a Q-Former",
        _QFORMER,
        qformer.from_transformers,
        keep=qformer.MEMBERS,
    ),
    Layout("annotator", "controlnet-aux", (r"^block1\.convs\.", r"^block5\.projection\."), *_annotator("softedge")),
    Layout("annotator", "controlnet-aux", (r"^model0\.1\.", r"^model4\.1\."), *_annotator("lineart_realistic")),
    Layout("annotator", "controlnet-aux", (r"^backbone\.features\.", r"^block23\."), *_annotator("mlsd")),
    Layout("annotator", "transformers", (r"^neck\.(reassemble|fusion)_stage\.",), *_annotator("depth")),
    Layout("annotator", "transformers", (r"^decode_head\.", r"^backbone\."), *_annotator("segmentation")),
    Layout("annotator", "original", (r"^scratch\.refinenet",), "a depth network of MiDaS", "use the annotator depth"),
    Layout("annotator", "original", (r"^Mconv1_stage",), "a pose network of OpenPose", "use the annotator pose"),
    Layout("t2i_adapter", "original", (r"^(adapter\.)?body\.\d+\.",), "a T2I-Adapter", _NOT_YET),
    Layout(
        "base",
        "original",
        (r"^model\.diffusion_model\.",),
        "a whole base model",
        "load it with load_pipeline",
    ),
    Layout(
        "unet",
        "diffusers",
        (r"^down_blocks\.", r"^up_blocks\.", r"^conv_out\."),
        "a UNet in diffusers' layout",
        "load the pipeline that it belongs to with load_pipeline",
    ),
    Layout("vae", "original", (r"^encoder\.", r"^decoder\."), "a VAE", "load it as part of a pipeline"),
    Layout(
        "transformer",
        "original",
        (r"^(double_blocks|joint_blocks|single_transformer_blocks|transformer_blocks)\.",),
        "a diffusion transformer (Flux, SD 3 or the like)",
        _NO_UNET,
    ),
    Layout(
        "encoder",
        "transformers",
        (r"^(text_model|vision_model)\.",),
        "a CLIP encoder",
        "load it with transformers, an image encoder as image_encoder=",
    ),
    Layout(
        "textual_inversion",
        "original",
        (r"^(string_to_param|emb_params$|clip_[lg]$|<.+>$)",),
        "a textual inversion",
        "load it with pipe.load_textual_inversion",
    ),
)


def recognise(names: Iterable[str]) -> Layout | None:
    """The first layout of the table that these keys match."""
    names = list(names)
    return next((layout for layout in LAYOUTS if layout.recognises(names)), None)
