"""The trained nets as the folder that ships: an ordinary pipeline, in half precision, with its adapters beside it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from transformers import BlipTextLMHeadModel, CLIPTextModel

from mahlstick.adapters.controlnet import ControlNet
from mahlstick.adapters.ip_adapter import IPAdapter
from mahlstick.adapters.motion import MotionAdapter
from mahlstick.errors import MahlstickError
from mahlstick.training.recipes.models import copy_vocabulary

log = logging.getLogger(__name__)

LIMIT = 80_000_000  # bytes of assets/ together


@dataclass(frozen=True)
class Extra:
    """A net that ships beside the pipeline: its class, its folder, and where in its run it lies."""

    kind: Any
    folder: str
    part: str = ""


# by the names of their runs; one net for several controls bears all their names
EXTRAS = {
    "controlnet": Extra(ControlNet, "controlnet-canny+color+lineart+mask+scribble"),
    "ip-adapter": Extra(IPAdapter, "ip-adapter"),
    "ip-adapter-plus": Extra(IPAdapter, "ip-adapter-plus"),
    "motion": Extra(MotionAdapter, "motion"),
    "captioner": Extra(BlipTextLMHeadModel, "captioner/decoder", "decoder"),
    "clip": Extra(CLIPTextModel, "clip/text_encoder", "text_encoder"),  # the pipeline's own learned on with the UNet
}


def assemble(model: Path, runs: Mapping[str, Path], out: Path) -> Path:
    """Write ``out/embedded`` from the pipeline folder ``model`` and the results of ``runs``, by their names in EXTRAS;
    what is there already is replaced when the new one is whole. Raises ``MahlstickError`` beyond LIMIT."""
    new, old, folder = out / ".embedded", out / ".embedded-before", out / "embedded"
    shutil.rmtree(new, ignore_errors=True)
    try:
        size = _write(model, runs, new) + _bytes(out / "examples")
        if size > LIMIT:
            raise MahlstickError(f"{folder} would take {size / 1e6:.1f} MB of {LIMIT / 1e6:.0f}; make the nets smaller")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    log.info("%s: %.1f MB with the examples", folder, size / 1e6)
    return folder


def _write(model: Path, runs: Mapping[str, Path], new: Path) -> int:
    """The folder; how many bytes it takes."""
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, requires_safety_checker=False)
    pipe.to(dtype=torch.float16).save_pretrained(new)
    copy_vocabulary(model, new)
    for name, run in runs.items():
        extra = EXTRAS[name]
        extra.kind.from_pretrained(run / extra.part).half().save_pretrained(new / extra.folder)
    portable(new)
    return _bytes(new)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def portable(folder: Path) -> None:
    """Take paths and storage precision out of the configs, so that the nets load as float32 unless asked otherwise."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or path.name in ("vocab.json", "tokenizer.json"):
            continue
        for key in ("_name_or_path", "name_or_path"):
            config.pop(key, None)
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = "float32"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
