"""Every published checkpoint layout to ours and back, recognised by keys and shapes, never by file name.

Ours are diffusers' key names and config for a ControlNet, and the original repository's flat key names for an
IP-Adapter. Nothing outside this package knows a foreign key name.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mahlstick.adapters.formats import controlnet, motion, motion_lora, qformer, sparse_control
from mahlstick.adapters.formats.bases import base_by_widths, base_of, cross_attention_widths, require_fit
from mahlstick.adapters.formats.checkpoint import (
    METADATA_KEY,
    SUFFIXES,
    Checkpoint,
    open_checkpoint,
    save_folder,
    save_tensors,
)
from mahlstick.adapters.formats.layouts import KINDS, Kind, Layout, recognise
from mahlstick.errors import MahlstickError

__all__ = [
    "Info",
    "check_heads",
    "cross_attention_widths",
    "inspect",
    "read",
    "read_motion_lora",
    "require_fit",
    "write",
]


@dataclass(frozen=True)
class Info:
    """What a checkpoint's header tells.

    ``kind``: ``controlnet | ip_adapter | motion_adapter | lora | base | …``; ``base``: ``sd1 | sd2 | sdxl | unknown``.
    ``config`` is what the adapter's class needs (empty for kinds that are not loaded here); ``dtype`` is that of most
    weights; ``tensors`` maps the names in the file to their shapes; ``note`` says what it is and what loads it.
    """

    path: Path
    kind: str
    layout: str
    base: str
    dtype: str
    parameters: int
    config: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    note: str


def inspect(path: str | os.PathLike[str]) -> Info:
    """Kind, layout, base family and config of a file, folder or hub id, from the header alone.

    Raises MahlstickError if nothing is there, it is damaged, or its layout is not known.
    """
    checkpoint = open_checkpoint(path)
    layout = _recognise(checkpoint, KINDS)
    config: dict[str, Any] = {}
    tensors: Mapping[str, Tensor] = checkpoint.tensors
    with _naming(checkpoint):
        if layout.kind in KINDS:
            tensors = layout.ours(checkpoint.tensors)
            config = _config(layout, checkpoint, tensors, {})
    counts: Counter[str] = Counter()
    for value in tensors.values():
        counts[str(value.dtype).removeprefix("torch.")] += value.numel()
    return Info(
        path=checkpoint.path,
        kind=layout.kind,
        layout=layout.name,
        base=_base(config, checkpoint.tensors),
        dtype=counts.most_common(1)[0][0] if counts else "unknown",
        parameters=counts.total(),
        config=config,
        tensors={name: tuple(value.shape) for name, value in checkpoint.tensors.items()},
        note=f"{layout.title}: {layout.way_out}",
    )


def read(
    path: str | os.PathLike[str], kind: str, *, base: Any = None, **config: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and state dict (on the CPU, in the stored dtype, under our key names) of an adapter of this kind.

    ``config`` overrides single fields: what a file cannot tell is ``heads`` (one number; for a ControlNet also one
    per level). ``base`` is the UNet, or a pipeline with it, that a difference file was taken from.

    Raises MahlstickError for another kind, for missing, unexpected, misshapen, NaN or infinite weights, and for all
    that ``inspect`` raises.
    """
    checkpoint = open_checkpoint(path)
    wanted = _kind(kind)
    layout = _recognise(checkpoint, [kind])
    if layout.kind != kind:
        raise MahlstickError(f"{path} is {layout.title}, not {wanted.title}: {layout.way_out}.")
    with _naming(checkpoint):
        header = layout.ours(checkpoint.tensors)
        whole = _config(layout, checkpoint, header, config)
        wanted.check_heads(whole, header)
        _require_match(header, wanted.expected(whole))
        state_dict = layout.ours(checkpoint.load(layout.members(checkpoint.tensors)))
        if layout.name == "original difference":
            state_dict = controlnet.add_base(state_dict, base)
    return whole, state_dict


def read_motion_lora(path: str | os.PathLike[str]) -> dict[str, motion_lora.Change]:
    """The changes in a motion LoRA's file, by the name of the weight in diffusers' MotionAdapter.

    Raises MahlstickError for another kind, for keys that are no pairs, and for all that ``inspect`` raises.
    """
    checkpoint = open_checkpoint(path)
    layout = _recognise(checkpoint, ["motion_adapter"])
    if layout.kind != "motion_lora":
        raise MahlstickError(f"{path} is {layout.title}, not a motion LoRA: {layout.way_out}.")
    with _naming(checkpoint):
        return motion_lora.changes(checkpoint.load(checkpoint.tensors), checkpoint.metadata)


def write(
    path: str | os.PathLike[str],
    kind: str,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    layout: str = "diffusers",
) -> Path:
    """Write an adapter in the layout that diffusers or the original repository reads; returns the folder or file.

    ``path`` is one file if it ends in .safetensors, else a folder. In a folder, all but an IP-Adapter and a Q-Former
    lie in layout ``diffusers`` as diffusers' ``from_pretrained`` reads them; everything else is the one file
    ``<kind>.safetensors``. In layout ``original`` a ControlNet's keys are ``control_model.*``, a motion module's and a
    SparseCtrl encoder's those of AnimateDiff; an IP-Adapter's are the same either way, since diffusers'
    ``load_ip_adapter`` reads the original layout, and a Q-Former's always those of transformers' BLIP-2. A file's
    metadata keep the config. Raises MahlstickError, before anything is written, if the weights do not match the config,
    or the name asks for another format.
    """
    target = Path(path).expanduser()
    wanted = _kind(kind)
    if layout not in ("diffusers", "original"):
        raise MahlstickError(f"layout {layout!r} is not known: write 'diffusers' or 'original'.")
    if target.suffix in SUFFIXES and target.suffix != ".safetensors":
        raise MahlstickError(f"{target} was not written: give a folder or a name in .safetensors, not {target.suffix}.")
    try:
        whole = wanted.config_of(state_dict, {k: v for k, v in config.items() if not k.startswith("_")})
        _require_match(state_dict, wanted.expected(whole))
    except MahlstickError as error:
        raise MahlstickError(f"{target} was not written: {error}.") from error
    if kind not in ("ip_adapter", "qformer") and layout == "diffusers" and target.suffix != ".safetensors":
        return save_folder(target, state_dict, whole, wanted.class_name)
    if kind == "controlnet" and layout == "original":
        translated = controlnet.to_original(state_dict, whole)
        state_dict = {f"control_model.{name}": value for name, value in translated.items()}
    if kind == "motion_adapter" and layout == "original":
        state_dict = motion.to_original(state_dict)
    if kind == "sparse_controlnet" and layout == "original":
        state_dict = sparse_control.to_original(state_dict)
    if kind == "qformer":
        state_dict = qformer.to_transformers(state_dict)
    file = target if target.suffix == ".safetensors" else target / f"{kind}.safetensors"
    return save_tensors(file, state_dict, whole)


def check_heads(kind: str, config: Mapping[str, Any]) -> None:
    """Raise MahlstickError for a config whose heads do not go with its widths."""
    _kind(kind).check_heads(config, {})


def _kind(name: str) -> Kind:
    if name not in KINDS:
        raise MahlstickError(f"kind {name!r} cannot be read or written: there are {', '.join(KINDS)}.")
    return KINDS[name]


def _recognise(checkpoint: Checkpoint, wanted: Iterable[str]) -> Layout:
    layout = recognise(checkpoint.tensors)
    if layout is None:
        needs = "; ".join(f"{KINDS[kind].title} has {KINDS[kind].needs}" for kind in wanted)
        raise MahlstickError(
            f"{checkpoint.path} has a layout that is not known: found {_listed(checkpoint.tensors)}; {needs}."
        )
    return layout


def _config(
    layout: Layout, checkpoint: Checkpoint, tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """From shapes, then from the config that came with the file, then from the caller."""
    kind = KINDS[layout.kind]
    fields = kind.config_of(tensors, {})
    unknown = [name for name in overrides if name not in fields and name != "heads"]
    if unknown:
        raise MahlstickError(f"{', '.join(unknown)} is no config field of {kind.title} ({', '.join(fields)})")
    stored = {name: value for name, value in _stored_config(kind, checkpoint).items() if name in fields}
    return kind.config_of(tensors, {**layout.implies, **stored, **overrides})


def _stored_config(kind: Kind, checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The config.json of this class beside the weights, or the config that ``write`` put into the metadata."""
    if checkpoint.config and checkpoint.config.get("_class_name") == kind.class_name:
        return checkpoint.config
    try:
        stored = json.loads(checkpoint.metadata.get(METADATA_KEY, "{}"))
    except ValueError:
        return {}
    return stored if isinstance(stored, dict) else {}


def _base(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    if "cross_attention_dim" in config:
        return base_of(config["cross_attention_dim"], config.get("addition_embed_type") == "text_time")
    if "block_out_channels" in config:
        return base_by_widths(config["block_out_channels"])
    widths = (value.shape[1] for name, value in tensors.items() if name.endswith("attn2.to_k.weight"))
    return base_of(next(widths, None))


def _require_match(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    troubles = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": misshapen,
    }
    found = [f"{len(names)} {trouble} ({_listed(names)})" for trouble, names in troubles.items() if names]
    if found:
        raise MahlstickError(f"its weights do not match its config: {'; '.join(found)}")


def _listed(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f", … {len(names)} in all" if len(names) > limit else "")


@contextmanager
def _naming(checkpoint: Checkpoint) -> Iterator[None]:
    """Put the file's name before an error that does not have it."""
    try:
        yield
    except MahlstickError as error:
        if str(checkpoint.path) in str(error):
            raise
        raise MahlstickError(f"{checkpoint.path} cannot be read: {error}.") from error
