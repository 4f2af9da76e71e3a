"""Parts of the page that look the same on several tabs: components, and what events share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from mahlstick import annotators
from mahlstick.page.texts import label
from mahlstick.pipelines import schedulers

Values = Mapping[Any, Any]  # component -> what is on the screen
Updates = dict[Any, Any]  # component -> what is to be there

# For events that are no business of the API's.
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}


def columns() -> tuple[gr.Column, gr.Column]:
    """The left one, for what a person enters, and the right one, for what comes out."""
    with gr.Row(elem_classes="columns"):
        return (
            gr.Column(scale=5, min_width=320, elem_classes="left"),
            gr.Column(scale=6, min_width=320, elem_classes="right"),
        )


def error_line() -> gr.HTML:
    """A place for a sentence next to the fields that it is about; it takes none while it is empty."""
    return gr.HTML("", elem_classes="sentence", padding=False)


def prompts(prefix: str = "", **options: Any) -> tuple[gr.Textbox, gr.Textbox]:
    """What to paint, and what to keep out."""
    prompt = gr.Textbox(
        label=label("prompt"),
        placeholder=label("prompt_hint"),
        lines=2,
        max_lines=8,
        elem_id=f"{prefix}prompt",
        **options,
    )
    hint, elem_id = label("negative_hint"), f"{prefix}negative"
    return prompt, gr.Textbox(label=label("negative"), placeholder=hint, lines=1, max_lines=4, elem_id=elem_id)


def actions(run: str, run_id: str, cancel_id: str, working: bool = False) -> tuple[gr.Button, gr.Button]:
    """The button that begins the work, and the one that cancels it."""
    with gr.Row(elem_classes="actions"):
        return (
            gr.Button(label(run), variant="primary", elem_id=run_id, scale=3, min_width=160),
            gr.Button(label("cancel"), variant="stop", elem_id=cancel_id, scale=1, min_width=100, visible=working),
        )


def status_line(elem_id: str) -> gr.HTML:
    """The place for progress and news."""
    return gr.HTML("", elem_id=elem_id, elem_classes="sentence", padding=False)


def open_number(key: str, whole: bool = True, **options: Any) -> gr.Number:
    """A number that may be left to the model."""
    fields = {"placeholder": label("own"), "min_width": 100} | options
    return gr.Number(None, label=label(key), precision=0 if whole else None, **fields)


def sampler() -> gr.Dropdown:
    names = schedulers.names()
    names += [f"{name}_karras" for name in names if name.startswith("dpm++")]
    choices = [(label("own_sampler"), ""), *((name, name) for name in names)]
    return gr.Dropdown(choices, value="", label=label("sampler"), min_width=140)


def annotator(net: str | None) -> gr.Dropdown:
    """The annotators, those that work at once first, with the one that suits a net."""
    free = [name for name in annotators.names() if annotators.get(name).weights is None]
    others = [name for name in annotators.names() if name not in free]
    choices = [(label("no_annotator"), ""), *((name, name) for name in free), *((f"{name} ↓", name) for name in others)]
    return gr.Dropdown(choices, value=suiting(net), label=label("annotator"), min_width=140)


def suiting(net: str | None) -> str:
    """The annotator of the same name as the net, where there is one."""
    return net if net in annotators.names() else ""


def dose() -> tuple[gr.Slider, gr.Slider, gr.Slider]:
    """How strongly a unit acts, and from when to when."""
    scale = gr.Slider(0, 2, 1.0, step=0.05, label=label("scale"), buttons=[])
    with gr.Row():
        start = gr.Slider(0, 1, 0.0, step=0.05, label=label("start"), min_width=120, buttons=[])
        end = gr.Slider(0, 1, 1.0, step=0.05, label=label("end"), min_width=120, buttons=[])
    return scale, start, end


def slide(value: float, low: float, high: float) -> Any:
    """A slider's update that also reaches values which its ends do not."""
    return gr.update(value=value, minimum=min(low, value), maximum=max(high, value))


def invitation(key: str, elem_id: str, examples: Sequence[str] = ()) -> tuple[gr.Column, list[gr.Button]]:
    """What teaches where nothing has been made yet, with a button for each example."""
    with gr.Column(elem_id=elem_id, elem_classes="teach") as place:
        gr.Markdown(label(key))
        with gr.Row(visible=bool(examples)):
            buttons = [
                gr.Button(label(name), size="sm", min_width=110, elem_id=name.replace("_", "-")) for name in examples
            ]
    return place, buttons


def gallery(key: str, elem_id: str, columns: int = 4, height: int = 460, visible: bool = False) -> gr.Gallery:
    """Pictures that were made, one of them large."""
    return gr.Gallery(
        label=label(key),
        columns=columns,
        height=height,
        object_fit="contain",
        preview=True,
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id=elem_id,
        visible=visible,
    )


def picture(key: str, **options: Any) -> gr.Image:
    """A picture that only tells something, such as frames side by side."""
    shown: dict[str, Any] = {"height": 130, "elem_classes": "strip", "alt_text": "frames side by side"} | options
    return gr.Image(label=label(key), interactive=False, visible=False, buttons=[], format="png", **shown)


def drop_line(key: str, elem_id: str, classes: Sequence[str] = (), **options: Any) -> gr.File:
    """A line on which files are dropped."""
    return gr.File(label=label(key), height=64, elem_id=elem_id, elem_classes=["drop-line", *classes], **options)


class Removal:
    """A button that removes something for good, once a person has said so twice."""

    def __init__(self, key: str, elem_id: str) -> None:
        classes = ["quiet", "remove"]
        self.ask = gr.Button(label(key), size="sm", visible=False, elem_id=elem_id, elem_classes=classes)
        with gr.Row(visible=False, elem_classes="sure") as self.sure:
            gr.Markdown(label("remove_sure"), elem_classes="hint")
            self.do = gr.Button(label("remove_do"), variant="stop", size="sm", min_width=110, elem_id=f"{elem_id}-do")
            keep = gr.Button(label("remove_not"), size="sm", min_width=110)
        self.ask.click(lambda: gr.update(visible=True), None, self.sure, **QUIET)
        keep.click(lambda: gr.update(visible=False), None, self.sure, **QUIET)

    @property
    def components(self) -> list[Any]:
        return [self.ask, self.sure]

    def shown(self, there: bool) -> Updates:
        """Whether there is something to remove, of which nothing has been said yet."""
        return {self.ask: gr.update(visible=there), self.sure: gr.update(visible=False)}


def code_line(key: str) -> gr.Code:
    """A place for a line to copy, hidden until there is one."""
    return gr.Code(
        label=label(key),
        language=None,  # whose colours are hard to read
        lines=1,
        interactive=False,
        show_line_numbers=False,
        wrap_lines=True,
        visible=False,
    )
