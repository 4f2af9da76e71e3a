"""The components of a control and of an image prompt, and how they become specs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
from PIL import Image

from mahlstick import annotators
from mahlstick.annotators import Option
from mahlstick.errors import MahlstickError
from mahlstick.page import canvas, parts
from mahlstick.page.models import Choice, Models
from mahlstick.page.parts import Updates, Values
from mahlstick.page.texts import label
from mahlstick.pipelines.request import ControlSpec, ImagePromptSpec, open_mask, open_picture

SLIDERS = 3  # of an annotator's options; the most that one has
PREVIEW_SIDE = 768  # pixels
_HIDDEN = {"model", "mask"}  # options that are not a person's at the page: where weights come from, and the unit's mask


class UnitFault(MahlstickError):
    """What is wrong with a unit, and the line in which it is said."""

    def __init__(self, sentence: str, line: gr.HTML) -> None:
        super().__init__(sentence)
        self.line = line


class _Unit:
    """What both kinds share: a group that can be shown and hidden, a dose, a mask."""

    def __init__(self, number: int, name: str, adapters: list[Choice], shown: bool) -> None:
        self.group = gr.Column(visible=shown, elem_classes="unit", elem_id=f"{name}-{number}")
        self.shown = gr.State(shown)
        self.name = name
        self.number = number
        self.adapters = adapters
        self.first = adapters[0][1] if adapters else None
        self.error: gr.HTML

    def _head(self) -> None:
        with gr.Row(elem_classes="unit-head"):
            gr.HTML(f"<h3>{self.number + 1}</h3>", padding=False, elem_classes="unit-number")
            self.remove = gr.Button(label("remove"), size="sm", variant="secondary", elem_classes="quiet", min_width=80)

    def _dose(self) -> None:
        self.scale, self.start, self.end = parts.dose()

    def _mask(self) -> None:
        self.masked = gr.Checkbox(False, label=label("masked"), container=False)
        self.mask = canvas.mask(label("mask"), visible=False, elem_id=f"{self.name}-{self.number}-mask")

    @property
    def _usual(self) -> Updates:
        """The settings of a unit that nobody has touched, but for what it follows and the net."""
        return {self.scale: 1.0, self.start: 0.0, self.end: 1.0, self.masked: False}

    def filled(self, values: Values) -> bool:
        """Whether there is a picture, without which a unit does nothing."""
        raise NotImplementedError

    def is_idle(self, values: Values) -> bool:
        """Whether a person has set something here and given no picture."""
        touched = any(values[field] != usual for field, usual in self._usual.items())
        return bool(values[self.shown]) and touched and not self.filled(values)

    def _read_dose(self, values: Values) -> dict[str, Any]:
        return {"scale": values[self.scale], "start": values[self.start], "end": values[self.end]}

    def _read_mask(self, values: Values) -> Image.Image | None:
        return canvas.painted(values[self.mask]) if values[self.masked] else None

    def _write_dose(self, spec: ControlSpec | ImagePromptSpec) -> Updates:
        scale = spec.scale if isinstance(spec.scale, float | int) else 1.0
        return {self.scale: parts.slide(scale, 0, 2), self.start: spec.start, self.end: spec.end}

    def _hide(self) -> Updates:
        return {
            self.group: gr.update(visible=False),
            self.shown: False,
            self.error: "",
            **self._usual,
            self.scale: parts.slide(1.0, 0, 2),
            **self._write_mask(None, None),
        }

    def _write_mask(self, picture: Image.Image | None, mask: Image.Image | None) -> Updates:
        below = picture if picture or not mask else Image.new("RGB", mask.size, "white")
        shown = canvas.value(below, mask) if mask else None
        return {self.masked: mask is not None, self.mask: gr.update(value=shown, visible=mask is not None)}


class ControlUnit(_Unit):
    """A picture to follow, how it becomes a control picture, and the net."""

    def __init__(self, number: int, models: Models, shown: bool) -> None:
        super().__init__(number, "control", models.nets, shown)
        with self.group:
            self._head()
            self.error = parts.error_line()
            self.picture = canvas.drawing(label("follow"), elem_id=f"control-{number}-picture")
            with gr.Row():
                self.adapter = gr.Dropdown(models.nets, value=self.first, label=label("net"), min_width=140)
                self.annotator = parts.annotator(self.first)
            self._options()
            seen: dict[str, Any] = {"height": 200, "elem_classes": [], "elem_id": f"control-{number}-seen"}
            self.seen = parts.picture("seen", alt_text="what the control net sees", **seen)
            self._dose()
            with gr.Row():
                self.mode = gr.Dropdown(
                    [(label(f"{mode}_mode" if mode != "balanced" else mode), mode) for mode in _MODES],
                    value="balanced",
                    label=label("mode"),
                    min_width=140,
                )
                self.resize = gr.Dropdown(
                    [(label(way), way) for way in ("crop", "pad", "stretch")],
                    value="crop",
                    label=label("resize"),
                    min_width=140,
                )
            self._mask()

    def _options(self) -> None:
        """Places for the options of whichever annotator is chosen."""
        updates = option_updates(self.annotator.value)
        with gr.Row():
            self.sliders = [gr.Slider(**_initial(update), min_width=120, buttons=[]) for update in updates[:SLIDERS]]
            self.choice = gr.Dropdown(**_initial(updates[SLIDERS]), min_width=120)
            self.switch = gr.Checkbox(**_initial(updates[SLIDERS + 1]), min_width=120)

    @property
    def options(self) -> list[Any]:
        return [*self.sliders, self.choice, self.switch]

    @property
    def fields(self) -> list[Any]:
        dose = [self.scale, self.start, self.end, self.mode, self.resize, self.masked, self.mask]
        return [self.shown, self.picture, self.adapter, self.annotator, *self.options, *dose]

    @property
    def outputs(self) -> list[Any]:
        return [self.group, self.seen, self.error, *self.fields]

    @property
    def _usual(self) -> Updates:
        own = {self.annotator: parts.suiting(self.first), self.mode: "balanced", self.resize: "crop"}
        return {**super()._usual, **own}

    def filled(self, values: Values) -> bool:
        return bool(values[self.shown]) and not canvas.is_empty(values[self.picture])

    def read(self, values: Values) -> ControlSpec | None:
        """None where there is no picture. Raises :class:`MahlstickError`."""
        picture = canvas.flattened(values[self.picture]) if self.filled(values) else None
        if picture is None:
            return None
        annotator = values[self.annotator] or None
        options = _read_options(annotator, [values[field] for field in self.options])
        mask = self._read_mask(values)
        if annotator == "inpaint":
            options, mask = ({"mask": mask} if mask else {}), None
        return ControlSpec(
            adapter=values[self.adapter] or "",
            image=picture,
            annotator=annotator,
            options=options,
            mode=values[self.mode],
            resize=values[self.resize],
            mask=mask,
            **self._read_dose(values),
        )

    def write(self, spec: ControlSpec | None) -> Updates:
        """Shows the spec; None hides the unit and clears it."""
        if spec is None:
            return {
                **self._hide(),
                self.picture: None,
                self.adapter: self.first,
                **dict(zip(self.options, option_updates(parts.suiting(self.first)), strict=True)),
                self.seen: gr.update(value=None, visible=False),
            }
        picture = open_picture(spec.image, f"control {self.number + 1}", alpha=spec.annotator == "inpaint")
        mask = open_mask(spec.mask, "mask") if spec.mask is not None else None
        return {
            self.group: gr.update(visible=True),
            self.shown: True,
            self.picture: canvas.value(picture),
            self.adapter: spec.adapter,
            self.annotator: spec.annotator or "",
            **dict(zip(self.options, option_updates(spec.annotator, spec.options), strict=True)),
            self.mode: spec.mode,
            self.resize: spec.resize,
            **self._write_dose(spec),
            **self._write_mask(picture, mask),
        }

    def see(self, values: Values) -> Image.Image | None:
        """What the net will see, small. Raises :class:`MahlstickError` as the annotator does."""
        spec = self.read(values)
        if spec is None or spec.annotator is None:
            return None
        small = spec.image.copy()
        small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        return annotators.annotate(spec.annotator, small, **spec.options)


_MODES = ("balanced", "prompt", "control", "guess")


def _shown_options(annotator: str | None) -> tuple[list[Option], Option | None, Option | None]:
    """Those for sliders, for the dropdown and for the checkbox."""
    options = annotators.get(annotator).options.values() if annotator else ()
    shown = [option for option in options if option.name not in _HIDDEN]
    numbers = [option for option in shown if option.range is not None]
    choices = [option for option in shown if option.choices]
    switches = [option for option in shown if option.type is bool]
    return numbers, next(iter(choices), None), next(iter(switches), None)


def option_updates(annotator: str | None, given: Mapping[str, Any] | None = None) -> list[Any]:
    """Updates for a unit's ``options``: the annotator's, with their defaults where not given, and the rest hidden."""
    numbers, choice, switch = _shown_options(annotator)

    def value(option: Option) -> Any:
        return (given or {}).get(option.name, option.default)

    updates: list[Any] = [gr.update(visible=False)] * (SLIDERS + 2)
    for i, option in enumerate(numbers):
        assert option.range is not None
        updates[i] = gr.update(
            visible=True,
            label=option.name,
            minimum=option.range.low,
            maximum=option.range.high,
            step=1 if option.type is int else 0.01,
            value=value(option),
        )
    if choice is not None:
        updates[SLIDERS] = gr.update(visible=True, label=choice.name, choices=list(choice.choices), value=value(choice))
    if switch is not None:
        updates[SLIDERS + 1] = gr.update(visible=True, label=switch.name, value=value(switch))
    return updates


def _initial(update: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in update.items() if name != "__type__"}


def _read_options(annotator: str | None, values: list[Any]) -> dict[str, Any]:
    """Those that differ from the annotator's defaults."""
    numbers, choice, switch = _shown_options(annotator)
    places: list[Option | None] = [*numbers, *[None] * (SLIDERS - len(numbers)), choice, switch]
    given = {option.name: value for option, value in zip(places, values, strict=True) if option is not None}
    defaults = annotators.get(annotator).options if annotator else {}
    return {name: value for name, value in given.items() if value is not None and value != defaults[name].default}


class ImagePromptUnit(_Unit):
    """Reference pictures, and how much of them is taken."""

    def __init__(self, number: int, models: Models, shown: bool) -> None:
        super().__init__(number, "image-prompt", models.image_prompts, shown)
        with self.group:
            self._head()
            self.error = parts.error_line()
            self.pictures = canvas.strip(label("references"), elem_id=f"image-prompt-{number}-pictures")
            self.library = models.library
            self.search = gr.Textbox(
                label=label("found_by"),
                placeholder=label("found_by_hint"),
                max_lines=1,
                visible=self.library is not None,
                elem_id=f"image-prompt-{number}-search",
            )
            with gr.Row():
                self.adapter = gr.Dropdown(
                    models.image_prompts, value=self.first, label=label("adapter"), min_width=140
                )
                self.blocks = gr.Dropdown(
                    [(label(part), part) for part in ("all", "style", "layout")],
                    value="all",
                    label=label("blocks"),
                    min_width=140,
                )
            self._dose()
            self.negative = canvas.strip(label("unlike"), several=False, elem_id=f"image-prompt-{number}-unlike")
            self._mask()

    @property
    def fields(self) -> list[Any]:
        dose = [self.scale, self.start, self.end, self.masked, self.mask]
        return [self.shown, self.pictures, self.search, self.adapter, self.blocks, self.negative, *dose]

    @property
    def outputs(self) -> list[Any]:
        return [self.group, self.error, *self.fields]

    @property
    def _usual(self) -> Updates:
        return {**super()._usual, self.blocks: "all"}

    def filled(self, values: Values) -> bool:
        return bool(values[self.shown] and (values[self.pictures] or self._words(values)))

    def _words(self, values: Values) -> str:
        return (values[self.search] or "").strip()

    def read(self, values: Values) -> ImagePromptSpec | None:
        """None where there is no picture. Raises :class:`MahlstickError` where a file is none."""
        if not self.filled(values):
            return None
        words = self._words(values)
        return ImagePromptSpec(
            adapter=values[self.adapter] or "",
            search=words or None,
            library=str(self.library) if words else None,
            images=canvas.pictures(values[self.pictures]),
            blocks=values[self.blocks],
            negative=next(iter(canvas.pictures(values[self.negative])), None),
            mask=self._read_mask(values),
            **self._read_dose(values),
        )

    def write(self, spec: ImagePromptSpec | None) -> Updates:
        """Shows the spec; None hides the unit and clears it."""
        if spec is None:
            empty = {self.pictures: None, self.search: "", self.negative: None}
            return {**self._hide(), **empty, self.adapter: self.first}
        mask = open_mask(spec.mask, "mask") if spec.mask is not None else None
        unlike = [spec.negative] if spec.negative is not None else []
        return {
            self.group: gr.update(visible=True),
            self.shown: True,
            self.pictures: canvas.strip_value([open_picture(picture, "reference") for picture in spec.images]),
            self.search: "",
            self.adapter: spec.adapter,
            self.blocks: spec.blocks if isinstance(spec.blocks, str) else "all",
            self.negative: canvas.strip_value([open_picture(each, "negative") for each in unlike]),
            **self._write_dose(spec),
            **self._write_mask(None, mask),
        }
