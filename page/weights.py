"""The tab that says what a file of weights is, what it fits, and how to use it."""

from __future__ import annotations

import html
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from mahlstick.adapters import formats
from mahlstick.adapters.formats import Info
from mahlstick.adapters.formats.bases import BASE_NAMES, base_of
from mahlstick.errors import MahlstickError
from mahlstick.page import parts, status
from mahlstick.page.history import History
from mahlstick.page.models import Models, trained, weights
from mahlstick.page.parts import QUIET, Updates
from mahlstick.page.sentences import translated
from mahlstick.page.texts import label, say
from mahlstick.pipelines.load import embedded_adapters, read_json, unet_config
from mahlstick.pipelines.recipe import read_recipe

# kind -> the line for a shell and that for Python, with the file's path and, for workflows, its name
_USES = {
    "controlnet": (
        'mahlstick generate -p "red apple" --control {path}=drawing.png',
        "net = ms.ControlNet.from_pretrained({literal})",
    ),
    "sparse_controlnet": ("", "net = ms.load_adapter({literal})"),
    "ip_adapter": (
        'mahlstick generate -p "red apple" --image-prompt {path}=reference.png',
        "ip = ms.IPAdapter.from_pretrained({literal})",
    ),
    "motion_adapter": (
        'mahlstick animate -p "red apple" --motion {path} --out clip.mp4',
        "module = ms.MotionAdapter.from_pretrained({literal})",
    ),
    "motion_lora": (
        'mahlstick animate -p "red apple" --motion-lora {path} --out clip.mp4',
        "module = module.with_lora({literal})",
    ),
    "lora": ("mahlstick run lora.json --set LoraLoader.lora_name={name}", "pipe.load_lora_weights({literal})"),
    "textual_inversion": ("", "pipe.load_textual_inversion({literal})"),
    "base": ('mahlstick generate -p "red apple" --base {path}', "pipe = ms.load_pipeline({literal})"),
}


class Inspect:
    """The tab's components and what they do."""

    def __init__(self, models: Models, history: History, session: gr.BrowserState, model: gr.Dropdown) -> None:
        """``model`` is where the base is chosen that a file may fit."""
        self._models, self._history = models, history
        left, right = parts.columns()
        with left:
            self.drop = parts.drop_line("in_drop", "in-drop")
            self.chosen = gr.Dropdown(list(self._files("")), value=None, label=label("in_choose"), elem_id="in-choose")
            if models.folder is None:
                gr.Markdown(label("in_large"), elem_classes="hint")
            self.error = parts.error_line()
        with right:
            parts.invitation("in_empty", "in-empty")
            self.facts = gr.HTML("", elem_id="in-facts", padding=False)
            self.lines = [parts.code_line("shell"), parts.code_line("python")]
        outputs = [self.error, self.facts, *self.lines]
        self.drop.upload(self._inspect_drop, [self.drop, model], [*outputs, self.drop, self.chosen], **QUIET)
        self.chosen.input(self._inspect_chosen, [self.chosen, session, model], outputs, **QUIET)

    def _files(self, session: str) -> dict[str, Path]:
        """What may be looked at by its name: what comes with mahlstick, the folder's files, and what was trained."""
        own = trained(self._history.results(session)) if session else {}
        return {**embedded_adapters(), **weights(self._models.folder), **own}

    def enter(self, session: str) -> Any:
        """The names that a browser may choose from."""
        return gr.update(choices=list(self._files(session)))

    @property
    def entered(self) -> Any:
        return self.chosen

    def _inspect_drop(self, path: str, base: str, browser: gr.Request) -> Updates:
        try:
            return {**self._shown(Path(path), Path(path).name, base, browser), self.drop: None, self.chosen: None}
        finally:
            Path(path).unlink(missing_ok=True)  # weights are large, and it was only looked at

    def _inspect_chosen(self, name: str, session: str, base: str, browser: gr.Request) -> Updates:
        path = self._files(session).get(name)
        if path is None:
            return self._refused(say("in_gone", browser, name=name))
        return self._shown(path, str(path), base, browser)

    def _shown(self, path: Path, called: str, base: str, browser: gr.Request) -> Updates:
        try:
            if path.suffix.lower() == ".png":
                recipe = f'<pre class="recipe">{html.escape(read_recipe(path).text()["parameters"])}</pre>'
                return {self.error: "", self.facts: recipe, **{line: _line("") for line in self.lines}}
            info = look(path)
        except MahlstickError as error:
            return self._refused(translated(str(error).replace(str(path), Path(called).name), browser))
        uses = [_line(text) for text in how_to_use(info, called)]
        facts = _table(_facts(info, path, base, browser))
        return {self.error: "", self.facts: facts, **dict(zip(self.lines, uses, strict=True))}

    def _refused(self, sentence: str) -> Updates:
        return {self.error: status.error(sentence), self.facts: "", **{line: _line("") for line in self.lines}}


def look(path: Path) -> Info:
    """What ``mahlstick inspect`` finds, and a whole base in diffusers' folders too, by its UNet."""
    if not (path / "model_index.json").is_file():
        return formats.inspect(path)
    if "unet" not in read_json(path / "model_index.json"):
        raise MahlstickError(f"{path}: a model of diffusers without a UNet; give a Stable Diffusion 1, 2 or XL")
    unet = formats.inspect(path / "unet")
    return replace(unet, path=path, kind="base", note="a whole base model: load it with load_pipeline")


def fit(info: Info, base: str) -> bool | None:
    """Whether it can be used with a base; None where neither header tells. Raises :class:`MahlstickError` with the
    differences."""
    unet = unet_config(base)
    if unet is None or info.kind == "base":
        return None
    if info.config:
        formats.require_fit(info.kind, info.config, unet)
        return True
    family = _family(unet)
    if "unknown" in (family, info.base):
        return None
    if family != info.base:
        raise MahlstickError(f"it was made for {BASE_NAMES[info.base]}, and the model is {BASE_NAMES[family]}")
    return True


def how_to_use(info: Info, path: str) -> tuple[str, str]:
    """The line for a shell and that for Python, each empty where there is none."""
    shell, python = _USES.get(info.kind, ("", ""))
    if info.layout == "processors":
        python = "pipe.unet.load_lora_adapter(load_file({literal}), prefix=None)"
    parts = {"path": shlex.quote(path), "literal": repr(path), "name": shlex.quote(Path(path).name)}
    return shell.format(**parts), python.format(**parts)


def _facts(info: Info, path: Path, base: str, browser: gr.Request) -> dict[str, str]:
    """What there is to know, by what it is called."""
    what, _, way = info.note.partition(": ")
    try:
        fits = fit(info, base)
        sentence = "" if info.kind == "base" else say("in_untold" if fits is None else "in_fits", browser)
    except MahlstickError as error:
        sentence = say("in_unfit", browser, why=str(error))
    facts = {
        "in_what": f"{what[:1].upper()}{what[1:]}",
        "in_layout": info.layout,
        "in_base": "" if info.base == "unknown" else BASE_NAMES[info.base],
        "in_fit": sentence,
        "in_size": _size(path),
        "in_parameters": f"{info.parameters:,} · {info.dtype}",
        "in_tensors": f"{len(info.tensors):,}",
        "in_use": way,
    }
    return {say(key, browser): value for key, value in facts.items() if value}


def _family(unet: Mapping[str, Any]) -> str:
    cross = unet.get("cross_attention_dim")
    cross = cross[0] if isinstance(cross, list) else cross
    return base_of(cross, unet.get("addition_embed_type") == "text_time")


def _size(path: Path) -> str:
    files = path.rglob("*") if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def _table(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f'<table class="facts">{rows}</table>'


def _line(text: str) -> Any:
    return gr.update(value=text, visible=bool(text))
