"""What a training run needs to know: one typed record, from a TOML or YAML file, from flags, or from Python."""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, Self, Union, get_args, get_origin

from pydantic import Field, model_validator

from mahlstick.errors import MahlstickError
from mahlstick.pipelines.request import Spec

TaskName = Literal["controlnet", "ip-adapter", "motion", "lora", "base", "vae", "clip", "captioner", "qformer"]
Prediction = Literal["epsilon", "v_prediction", "flow_prediction"]

# Peak learning rates that the papers and their programs use with Adam, for a batch of some dozens.
RATES: dict[TaskName, float] = {
    "controlnet": 1e-5,  # 2302.05543, and its program
    "ip-adapter": 1e-4,  # 2308.06721, section 4.1.2
    "motion": 1e-4,  # 2307.04725, and its program
    "lora": 1e-4,
    "base": 1e-4,
    "vae": 1e-4,
    "clip": 5e-4,  # 2103.00020, table 19
    "captioner": 3e-4,  # 2201.12086, section 4.1
    "qformer": 1e-4,  # 2301.12597, section 3.4
}


class TrainConfig(Spec):
    """A training run. What is left open is filled in from the task and the base, and saved with the result."""

    task: TaskName = Field(description="what is learned")
    data: str = Field(
        description="folder of pictures (motion: clips) with captions, a Hugging Face dataset folder, or .tar shards"
    )
    out: str = Field(description="folder of the result, its checkpoints and its log")
    base: str = Field("embedded", description="'embedded', a diffusers folder, a hub id or a .safetensors file")
    start: str | None = Field(
        None,
        description="weights to go on from, instead of fresh ones; base, vae and clip go on from the base, or"
        " from 'scratch'; an IP-Adapter also from the Q-Former that its projector begins with",
    )

    control: str | None = Field(None, description="folder of control pictures, named like the pictures")
    annotator: str | None = Field(
        None, description="makes the control pictures where there are none, and measures, e.g. canny"
    )
    annotator_options: dict[str, Any] = Field({}, description="of the annotator, e.g. low=80")
    reference: str | None = Field(None, description="folder of reference pictures; left out, the pictures themselves")
    image_encoder: str | None = Field(None, description="CLIP, SigLIP or DINOv2 for image prompts (folder or hub id);"
        " left out, the base's own")  # fmt: skip
    image_layer: int | Literal["patches"] | None = Field(
        None, description="hidden layer of it that patches are read from, -1 being the last; 'patches': the last"
        " without class token; left out, -2"
    )  # fmt: skip
    projector: Literal[
        "linear", "resampler", "mlp", "video", "concat", "cross_attention", "merger", "qformer", "instruct_qformer"
    ] = Field(
        "linear", description="of an IP-Adapter; video learns from clips, instruct_qformer reads the captions too"
    )
    tokens: int = Field(4, ge=1, le=1024, description="image tokens of an IP-Adapter, queries of a Q-Former")
    depth: int = Field(4, ge=1, le=64, description="layers of a projector or a Q-Former")
    heads: int = Field(12, ge=1, le=64, description="heads of a projector or a Q-Former, each 64 wide")
    join: int = Field(4, ge=1, le=64, description="neighbouring patches of which concat makes a token")
    tokenizer: str | None = Field(None, description="folder or hub id of the one with which a Q-Former reads; left out,"
        " the base's own")  # fmt: skip
    momentum: float = Field(0, ge=0, lt=1, description="of an average of a Q-Former's weights that softens targets;"
        " 0.995 is usual, 0: off")  # fmt: skip
    frames: int = Field(16, ge=2, le=256, description="of a clip (motion, projector video); a motion module knows no"
        " longer ones")  # fmt: skip
    fps: float = Field(8, gt=0, le=240, description="frames a second taken from a video (motion, projector video);"
        " those of a folder are taken as they are")  # fmt: skip
    positions: Literal["sinusoidal", "learned", "rotary"] = Field(
        "sinusoidal", description="how a fresh motion module tells the frames apart"
    )
    norm: Literal["clip", "frame"] = Field(
        "clip", description="what a fresh motion module normalises over: the clip, as diffusers does, or each frame by"
        " itself, as AnimateDiff's own do"
    )  # fmt: skip
    mid_block: bool = Field(
        True, description="a fresh motion module acts in the UNet's middle too, as AnimateDiff's v2 does"
    )
    decoder_only: bool = Field(False, description="a VAE's encoder stays, and with it the latents that a UNet knows")
    latent_noise: float = Field(
        0.0, ge=0, le=10, description="with decoder_only: how noisy latents are that a decoder learns to make clean"
        " pictures from, in the UNet's latents' units"
    )  # fmt: skip
    locked_image: bool = Field(False, description="a CLIP's image encoder stays, and its text encoder learns to match")
    rank: int = Field(8, ge=1, le=1024, description="of a LoRA")
    train_text: bool = Field(False, description="a LoRA or a base learns in the text encoders too")

    resolution: int | None = Field(None, ge=8, le=4096, description="pixels of a square picture; left out, the base's")
    buckets: bool = Field(True, description="keep the pictures' proportions, in batches of one size")
    held_out: float = Field(0.05, ge=0, lt=1, description="share of the pictures kept for validation")
    cache: str | None = Field(None, description="folder of the encoded pictures; left out, OUT/cache")

    steps: int = Field(1000, ge=1, description="optimiser steps")
    batch: int = Field(4, ge=1, description="pictures or clips an optimiser step, over all processes")
    micro_batch: int | None = Field(None, ge=1, description="pictures at once in one process; left out, as many as fit")
    optimiser: Literal["adamw", "adamw8bit", "schedule-free", "muon"] = Field("adamw", description="fused, 8-bit,"
        " without a schedule, or Muon, which learns more from a step")  # fmt: skip
    rate: float | None = Field(None, gt=0, description="peak learning rate; left out, the task's usual one")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    warmup: int = Field(50, ge=0, description="steps of rising rate")
    weight_decay: float = Field(1e-2, ge=0, description="of matrices; none on biases and norms")
    clip_norm: float = Field(1.0, gt=0, description="longest gradient")
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of an average of the weights, which is what is saved; 0: off"
    )

    prediction: Prediction | None = Field(None, description="what the UNet predicts; left out, as the base does")
    min_snr: float | None = Field(None, gt=0, description="weigh the loss by min-SNR with this gamma (5 is usual)")
    noise_offset: float = Field(0.0, ge=0, le=1, description="share of noise common to a channel")
    text_dropout: float | None = Field(None, ge=0, le=1, description="share of captions left empty; task's own if not"
        " given")  # fmt: skip
    image_dropout: float = Field(0.05, ge=0, le=1, description="share of references left out (ip-adapter)")

    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of the arithmetic; weights stay float32")
    gradient_checkpointing: bool = Field(False, description="less memory for a third more time")
    compile: bool = Field(False, description="torch.compile, which pays off after some hundred steps")
    workers: int = Field(0, ge=0, le=64, description="processes that read the cache ahead")
    seed: int = Field(0, ge=0, lt=2**31, description="of everything random")

    checkpoint_every: int = Field(250, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    validate_every: int = Field(250, ge=0, description="steps between validations; 0: none")
    log_every: int = Field(10, ge=1, description="steps between lines of log.jsonl")
    tracker: Literal["none", "tensorboard", "trackio"] = Field("none", description="beside log.jsonl")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch must divide batch; {self.micro_batch} does not divide {self.batch}")
        if self.train_text and self.task not in ("base", "lora"):
            raise ValueError(f"train_text is for a base or a LoRA; a {self.task} learns without, so leave it out")
        if self.decoder_only and (self.task != "vae" or self.start == "scratch"):
            raise ValueError("decoder_only is for a vae that is not from scratch; leave it out")
        if self.latent_noise and not self.decoder_only:
            raise ValueError("latent_noise is for a vae with decoder_only; give both, or leave it out")
        if self.locked_image and (self.task != "clip" or self.start == "scratch"):
            raise ValueError("locked_image is for a clip that is not from scratch; leave it out")
        if self.momentum and self.task != "qformer":
            raise ValueError("momentum is for a qformer; leave it out")
        if self.tokenizer is not None and self.task != "qformer" and self.projector != "instruct_qformer":
            raise ValueError("tokenizer is for what reads beside the base: a qformer, or projector instruct_qformer")
        if self.start == "scratch" and self.task not in ("base", "vae", "clip"):
            raise ValueError(f"start is 'scratch', but a {self.task} starts fresh by itself; leave it out")
        return self

    @property
    def peak_rate(self) -> float:
        return self.rate if self.rate is not None else RATES[self.task]

    @property
    def cache_folder(self) -> Path:
        return Path(self.cache) if self.cache is not None else Path(self.out) / "cache"


def read_config(path: str | Path) -> dict[str, Any]:
    """The fields of a TOML, YAML or JSON file. Raises ``MahlstickError`` where it cannot be read."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            fields: Any = tomllib.loads(text)
        else:
            import yaml

            fields = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise MahlstickError(f"{path}: cannot be read ({error}); give a TOML or YAML file") from error
    except ValueError as error:  # tomllib's
        raise MahlstickError(f"{path}: is no TOML ({error})") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] != "yaml":
            raise
        raise MahlstickError(f"{path}: is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(fields, dict):
        raise MahlstickError(f"{path}: holds no fields; write lines such as steps = 1000")
    return fields


# Where `--help` starts a group, and its title.
GROUPS = {
    "data": "what from, and where to",
    "start": "what is learned",
    "resolution": "pictures",
    "steps": "learning",
    "prediction": "loss",
    "precision": "speed and memory",
    "checkpoint_every": "keeping and telling",
}


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are ours."""

    def error(self, message: str) -> NoReturn:
        raise MahlstickError(f"{message} (see {self.prog} --help)")


def parser(program: str = "mahlstick train") -> argparse.ArgumentParser:
    """A flag for each field of :class:`TrainConfig`, with the field's own description and default."""
    flags = _Parser(
        prog=program,
        usage=f"{program} TASK --data FOLDER --out FOLDER [options]",
        description="Teach an adapter from your own pictures. A run that was stopped goes on when the command is"
        " given again.",
        epilog="Example: mahlstick train controlnet --data my_pictures --annotator canny --out my_net --steps 2000",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    flags.add_argument("task", nargs="?", default=None, choices=get_args(TaskName), help="what is learned")
    flags.add_argument("--config", metavar="FILE", help="TOML or YAML with the same fields; flags win over it")
    group: Any = flags
    for name, field in TrainConfig.model_fields.items():
        if name == "task":
            continue
        if name in GROUPS:
            group = flags.add_argument_group(GROUPS[name])
        shown = f" (default {field.default})" if field.default not in (None, "", {}) else ""
        shown = " (required)" if field.is_required() else shown
        group.add_argument(f"--{name.replace('_', '-')}", help=f"{field.description}{shown}", **_how(field.annotation))
    return flags


def _how(annotation: Any) -> dict[str, Any]:
    """How argparse reads a field: a switch, a choice, NAME=VALUE pairs, or text that pydantic turns into a number."""
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(annotation) is dict:
        return {"metavar": "NAME=VALUE", "action": "append"}
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kind = next(kind for kind in kinds if kind is not NoneType)
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    return {"metavar": {int: "N", float: "X"}.get(kind, "TEXT")}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def from_flags(arguments: Sequence[str]) -> TrainConfig:
    """The run that a command line asks for. Raises ``MahlstickError`` for what is wrong with it."""
    given = vars(parser().parse_args(list(arguments)))
    fields = read_config(given.pop("config")) if "config" in given else {}
    pairs = [text.partition("=") for text in given.pop("annotator_options", [])]
    if any(not equals for _, equals, _ in pairs):
        raise MahlstickError("--annotator-options: give NAME=VALUE, e.g. low=80")
    if pairs:
        given["annotator_options"] = {name: _value(text) for name, _, text in pairs}
    fields |= {name: value for name, value in given.items() if value is not None}
    if "task" not in fields:
        raise MahlstickError(f"train: say what is learned: {', '.join(get_args(TaskName))}")
    return TrainConfig(**fields)
