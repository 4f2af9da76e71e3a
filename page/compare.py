"""The tab on which pictures that differ in one setting or two are made side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mahlstick.errors import MahlstickError
from mahlstick.page import parts, status
from mahlstick.page.create import CONTROLS, IMAGE_PROMPTS, Create, with_found
from mahlstick.page.endpoints import answer, as_fields, endpoint
from mahlstick.page.faults import named
from mahlstick.page.history import History
from mahlstick.page.jobs import Job, Jobs, Work, forming
from mahlstick.page.limits import AXIS_LETTERS, WORDS_LETTERS
from mahlstick.page.making import Begun, Maker
from mahlstick.page.models import Models
from mahlstick.page.parts import QUIET, Updates, Values
from mahlstick.page.texts import label, say
from mahlstick.page.units import UnitFault
from mahlstick.pipelines import schedulers
from mahlstick.pipelines.compare import CELL, CHOICES, Axis, cells, compare, grid, read_grid
from mahlstick.pipelines.generate import Result
from mahlstick.pipelines.load import Loader
from mahlstick.pipelines.request import Request

CELLS = 64  # of a grid
KIND = "grids"  # the folder in a session's
PREVIEW = 480  # pixels, sides of the forming grid at most

_PLAIN = ("seed", "steps", "guidance", "scheduler", "strength", "prompt", "negative_prompt")
_PARTS = {"controls": ("scale", "start", "end", "mode", "adapter"), "image_prompts": ("scale", "end", "blocks")}
_UNIT = re.compile(r"(controls|image_prompts)\[(\d+)\]\.(\w+)")
_NO_WORD = re.compile(r"\W+")
_WORDS = ("prompt", "negative_prompt")


class Compare(Maker):
    """The tab's components and what they do."""

    kind = KIND

    def __init__(
        self, create: Create, models: Models, jobs: Jobs, history: History, session: gr.BrowserState, tab: gr.Tab
    ) -> None:
        """``create`` is the tab whose settings all pictures share, and ``tab`` the one around this."""
        super().__init__(jobs, history, session)
        self._create, self._models, self._tab = create, models, tab
        left, right = parts.columns()
        with left:
            self._lay_axes()
        with right:
            self._lay_result()
        self._wire()

    # What is on the screen.

    def _lay_axes(self) -> None:
        gr.Markdown(label("cmp_from"), elem_classes="explained")
        self.x = _AxisField("x", self._create, self._models, "steps", "5, 10, 20")
        self.y = _AxisField("y", self._create, self._models, "", "")
        self.error = parts.error_line()
        self.run, self.cancel = parts.actions("cmp_run", "cmp-run", "cmp-cancel")

    def _lay_result(self) -> None:
        self.status = parts.status_line("cmp-status")
        self.empty, self.examples = parts.invitation("cmp_empty", "cmp-empty", [*_EXAMPLES])
        self.gallery = parts.gallery("cmp_grids", "cmp-gallery", columns=3, height=560)
        self.shown = gr.State([])  # names of the grids in it
        self.chosen = gr.State(0)
        self.restore = gr.Button(label("restore"), size="sm", elem_id="cmp-restore", visible=False)
        self.drop = parts.drop_line("cmp_drop", "cmp-drop", file_types=[".png"])
        self.drop_error = parts.error_line()

    @property
    def axes(self) -> list[_AxisField]:
        return [self.x, self.y]

    @property
    def fields(self) -> list[Any]:
        return [field for axis in self.axes for field in (axis.field, axis.text)]

    @property
    def errors(self) -> list[Any]:
        return [self.x.error, self.y.error, self.error, self.drop_error]

    @property
    def result(self) -> list[Any]:
        return [self.gallery, self.shown, self.chosen, self.cancel, self.restore, self.empty]

    # Between the screen and a grid.

    def read(self, values: Values) -> tuple[Request, Axis, Axis | None]:
        """The request that is on Create, and the axes. Raises :class:`MahlstickError`."""
        request, offered = self._create.read(values), self.offered(self._models, values[self._session])
        x, y = (axis.read(values, offered) for axis in self.axes)
        if x is None:
            x, y = y, None
        if x is None:
            raise UnitFault(say("cmp_no_axis"), self.x.error)
        _check_size(x, y)
        try:
            for row in cells(request, x, y):
                for cell in row:
                    offered.check(cell)
        except MahlstickError as error:
            raise self._blamed(error, request, values, offered) from error
        return request, x, y

    def _blamed(self, error: MahlstickError, request: Request, values: Values, offered: Models) -> MahlstickError:
        """The error beside the axis that is at fault alone."""
        for axis in self.axes:
            try:
                if (read := axis.read(values, offered)) is not None:
                    cells(request, read)
            except MahlstickError as fault:
                if str(fault) == str(error):
                    return UnitFault(str(error), axis.error)
        return error

    def write(self, request: Request, x: Axis, y: Axis | None, offered: Models) -> Updates:
        """A grid's settings on the screen: the axes here, the rest on Create."""
        return {**self._create.write(request, offered), **self.x.write(x, offered), **self.y.write(y, offered)}

    # What happens.

    def _wire(self) -> None:
        made = self.wire_run([*self._create.fields, *self.fields])
        made.then(self._create.show, [self._session], self._create.result, **QUIET)
        self.gallery.select(_place, None, self.chosen, **QUIET)
        units = [unit.shown for unit in self._create.units]
        self._tab.select(self._offer, [*units, self.x.field, self.y.field], [self.x.field, self.y.field], **QUIET)
        axes = [output for axis in self.axes for output in axis.outputs]
        screen = [*self._create.screen, *axes, self.status, *self.errors]
        self.restore.click(self._restore_chosen, [self._session, self.shown, self.chosen], screen, **QUIET)
        self.drop.upload(self._restore_file, [self.drop, self._session], [*screen, self.drop], **QUIET)
        for axis in self.axes:
            chosen = [axis.field, self._session]
            axis.field.input(self._suit(axis), chosen, [*axis.outputs[1:], axis.error], **QUIET)
            axis.fill.click(self._fill(axis), chosen, axis.text, **QUIET)
        for key, button in zip(_EXAMPLES, self.examples, strict=True):
            button.click(lambda key=key: self._example(key), None, axes, **QUIET)

    def begin(self, values: Values, session: str, browser: gr.Request) -> Begun:
        if not (values[self._create.prompt] or "").strip():
            raise MahlstickError(say("cmp_no_prompt", browser))
        request, x, y = self.read(values)
        kept: list[Path] = []
        return Begun(comparison(request, x, y, self._history, session, kept.extend), kept=kept)

    def working(self, values: Values, browser: gr.Request) -> Updates:
        return self._faces(False, working=True)

    def left(self, values: Values, session: str, browser: gr.Request) -> Updates:
        return self._show(session)

    def line_for(self, error: Exception, values: Values) -> gr.HTML:
        return error.line if isinstance(error, UnitFault) and error.line in self.errors else self.error

    @endpoint
    async def compare(self, request: dict[str, Any], x: dict[str, Any], y: dict[str, Any] | None) -> list[str]:
        """Makes a grid of pictures and returns its PNG, and then the pictures' own, row after row.

        ``request`` holds the fields of mahlstick.Request as JSON; pictures in it are ``data:`` URLs, as
        ``Request.to_json`` writes them. ``x`` and ``y`` are what differs from column to column and from row to row,
        such as ``{"field": "steps", "values": [4, 8]}`` or ``{"field": "controls[0].scale", "values": [0.5, 1]}``;
        ``y`` may be null.
        """
        wanted, across = Request(**as_fields(request, "request")), Axis(**as_fields(x, "x"))
        down = Axis(**as_fields(y, "y")) if y is not None else None
        _check_size(across, down)
        for row in cells(wanted, across, down):
            for cell in row:
                self._models.check(cell)
        kept: list[Path] = []
        work = comparison(wanted, across, down, self._history, History.new_session(), kept.extend)
        return [str(await answer(self._jobs, work)), *map(str, kept)]

    def enter(self, session: str | None) -> Updates:
        """What a browser sees at first: its session's grids."""
        return self._show(session or "")

    @property
    def entered(self) -> list[Any]:
        return self.result

    def _show(self, session: str) -> Updates:
        grids = self._history.others(session, KIND)
        faces = self._faces(bool(grids))
        shown = {"value": [str(path) for path in grids], "selected_index": 0 if grids else None}
        return {
            **faces,
            self.gallery: gr.update(**shown, **faces[self.gallery]),
            self.shown: [path.name for path in grids],
            self.chosen: 0,
        }

    def _faces(self, shown: bool, working: bool = False) -> Updates:
        """What is visible, while a grid is made and otherwise."""
        return {
            self.cancel: gr.update(visible=working),
            self.empty: gr.update(visible=not (working or shown)),
            **{each: gr.update(visible=shown and not working) for each in (self.gallery, self.restore)},
        }

    def _offer(self, *given: Any) -> list[Any]:
        """The settings to choose from: those of the units that are on Create, and what is chosen already."""
        shown, chosen = given[:-2], given[-2:]
        units = [*(f"controls[{i}]" for i in range(CONTROLS)), *(f"image_prompts[{i}]" for i in range(IMAGE_PROMPTS))]
        there = [unit for unit, is_shown in zip(units, shown, strict=True) if is_shown]
        return [
            gr.update(choices=axis.choices([*there, field.partition(".")[0]]))
            for axis, field in zip(self.axes, chosen, strict=True)
        ]

    def _suit(self, axis: _AxisField) -> Callable[[str, str | None], Updates]:
        return lambda field, session: {axis.error: "", **axis.suited(field, "", self.offered(self._models, session))}

    def _fill(self, axis: _AxisField) -> Callable[[str, str | None], str]:
        return lambda field, session: ", ".join(axis.names(field, self.offered(self._models, session)))

    def _example(self, key: str) -> Updates:
        x, y = (Axis.parse(*parts) for parts in _EXAMPLES[key])
        return {**self.x.write(x, self._models), **self.y.write(y, self._models)}

    def _restore_chosen(self, session: str, shown: list[str], chosen: int, browser: gr.Request) -> Updates:
        if not 0 <= chosen < len(shown):
            return {self.status: status.note(say("no_selection", browser))}
        return self._restored(self._history.folder(session) / KIND / shown[chosen], session, browser)

    def _restore_file(self, path: str, session: str | None, browser: gr.Request) -> Updates:
        return {**self._restored(Path(path), session, browser), self.drop: None}

    def _restored(self, path: Path, session: str | None, browser: gr.Request) -> Updates:
        cleared: Updates = dict.fromkeys(self.errors, "")
        try:
            recipe, offered = read_grid(path), self.offered(self._models, session)
            request = with_found(recipe.request)
            offered.check(request)
            for axis in [recipe.x] + ([recipe.y] if recipe.y is not None else []):
                _check_shown(axis, request)
            note = status.note(say("cmp_restored", browser))
            return {**cleared, **self.write(request, recipe.x, recipe.y, offered), self.status: note}
        except MahlstickError as error:
            return {**cleared, self.drop_error: named(error, path, browser)}


class _AxisField:
    """A setting to choose, and its values as a text."""

    def __init__(self, name: str, create: Create, models: Models, field: str, text: str) -> None:
        self.name, self._create = name, create
        first = [f"{units}[0]" for units in _PARTS]
        with gr.Column(elem_classes="axis", elem_id=f"cmp-{name}"):
            with gr.Row(elem_classes="axis-row"):
                self.field = gr.Dropdown(
                    self.choices(first),
                    value=field,
                    label=label(f"cmp_{name}"),
                    min_width=150,
                    elem_id=f"cmp-{name}-field",
                )
                self.text = gr.Textbox(
                    text,
                    label=label("cmp_values"),
                    placeholder="0.2, 0.5, 1",
                    lines=1,
                    max_lines=4,
                    min_width=150,
                    visible=bool(field),
                    elem_id=f"cmp-{name}-values",
                )
            self.about = gr.Markdown(self._about(field, models), elem_classes="about")
            self.fill = gr.Button(label("cmp_fill"), size="sm", visible=False, elem_id=f"cmp-{name}-fill")
            self.error = parts.error_line()

    @property
    def outputs(self) -> list[Any]:
        return [self.field, self.text, self.about, self.fill]

    def choices(self, units: list[str]) -> list[tuple[Any, str]]:
        """What can differ, with the parts of these units."""
        fields = [*_PLAIN, *_unit_fields()]
        shown = [field for field in fields if field in _PLAIN or field.partition(".")[0] in units]
        none = [(label("cmp_none"), "")] if self.name == "y" else []
        return [*none, *((label(f"cmp_{_NO_WORD.sub('_', field)}"), field) for field in shown)]

    def names(self, field: str, models: Models) -> dict[str, str]:
        """Names that a value may have, and what they mean; empty where it is no name."""
        part = field.rpartition(".")[2]
        if part == "scheduler":
            return {name: name for name in schedulers.names()}
        if part == "adapter":
            return dict(models.nets)
        return {name: name for name in CHOICES.get(part, ())}

    def suited(self, field: str, text: str, models: Models) -> Updates:
        """What changes with the setting: the values, how they are written, and a button for all names."""
        return {
            self.text: gr.update(value=text, visible=bool(field)),
            self.about: self._about(field, models),
            self.fill: gr.update(visible=bool(self.names(field, models))),
        }

    def _about(self, field: str, models: Models) -> Any:
        if names := self.names(field, models):
            return ", ".join(names)
        return label("cmp_words" if field in _WORDS else "cmp_numbers") if field else label("cmp_nothing")

    def read(self, values: Values, models: Models) -> Axis | None:
        """None where no setting is chosen. Raises :class:`UnitFault`."""
        field = values[self.field]
        if not field:
            return None
        try:
            if len(values[self.text] or "") > AXIS_LETTERS:
                raise MahlstickError(f"{field}: the values may have at most {AXIS_LETTERS} letters here; give fewer")
            names = self.names(field, models)
            return Axis.parse(self._placed(field, values), values[self.text] or "", names or None)
        except MahlstickError as error:
            raise UnitFault(str(error), self.error) from error

    def _placed(self, field: str, values: Values) -> str:
        """The field as the request has it, which has only the units with a picture."""
        found = _UNIT.fullmatch(field)
        if found is None:
            return field
        units: list[Any] = self._create.controls if found[1] == "controls" else self._create.image_prompts
        unit = units[int(found[2])]
        filled = [each for each in units if each.filled(values)]
        if unit not in filled:
            raise MahlstickError(say(f"cmp_no_{found[1]}", number=int(found[2]) + 1))
        return f"{found[1]}[{filled.index(unit)}].{found[3]}"

    def write(self, axis: Axis | None, models: Models) -> Updates:
        """Shows the axis; None is no axis."""
        field = axis.field if axis is not None else ""
        text = axis.text(self.names(field, models)) if axis is not None else ""
        units = [*(f"{units}[0]" for units in _PARTS), field.partition(".")[0]]
        return {self.field: gr.update(choices=self.choices(units), value=field), **self.suited(field, text, models)}


def comparison(
    request: Request, x: Axis, y: Axis | None, history: History, session: str, keep: Callable[[list[Path]], None]
) -> Work:
    """The work that makes a grid and returns its file.

    Each picture is saved, and its file given to ``keep``, as soon as it is made: a grid that is cancelled has not been
    made in vain.
    """

    def work(job: Job, loader: Loader, **where: Any) -> Path:
        filling = _Filling(job, cells(request, x, y), x, y)

        def add(result: Result) -> None:
            keep(history.add(session, result))
            filling.add(result.images[0])

        made = compare(request, x, y, loader=loader, progress=False, callback=filling.on_step, on_result=add, **where)
        return made.save(history.next(session, KIND, ".png"))

    return work


class _Filling:
    """Tells a job how far a grid has come, and shows it."""

    def __init__(self, job: Job, requests: list[list[Request]], x: Axis, y: Axis | None) -> None:
        self._job, self._x, self._y = job, x, y
        self._steps = [_steps(request) for row in requests for request in row]
        self._seen = 0
        self._made: list[Image.Image] = []
        self._side = PREVIEW // max(len(x.values), len(requests))

    def on_step(self, pipe: Any, i: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        self._seen += 1
        total = self._seen + pipe.num_timesteps - i - 1 + sum(self._steps[len(self._made) + 1 :])
        now = forming(pipe, state["latents"])
        full = now.resize((now.width * pipe.vae_scale_factor, now.height * pipe.vae_scale_factor))
        self._job.tell(self._seen, total, self._sheet(self._small(full)))
        return state

    def add(self, picture: Image.Image) -> None:
        self._made.append(self._small(picture.copy()))

    def _small(self, picture: Image.Image) -> Image.Image:
        side = min(self._side, CELL)
        picture.thumbnail((side, side))
        return picture

    def _sheet(self, now: Image.Image) -> Image.Image:
        shown = [*self._made, now]
        width = len(self._x.values)
        padded = [*shown, *[None] * (len(self._steps) - len(shown))]
        return grid(self._x, self._y, [padded[i : i + width] for i in range(0, len(padded), width)], PREVIEW)


def _steps(request: Request) -> int:
    """About as many as it will take."""
    return max(1, int(request.steps * (request.effective_strength if request.init is not None else 1)))


def _unit_fields() -> list[str]:
    counts = {"controls": CONTROLS, "image_prompts": IMAGE_PROMPTS}
    return [f"{units}[{i}].{part}" for units, parts in _PARTS.items() for i in range(counts[units]) for part in parts]


def _check_size(x: Axis, y: Axis | None) -> None:
    """Raises :class:`MahlstickError` where a grid would have too many pictures, or words are too long."""
    for axis in (x, y) if y is not None else (x,):
        if any(isinstance(value, str) and len(value) > WORDS_LETTERS for value in axis.values):
            raise MahlstickError(f"{axis.name}: words may have at most {WORDS_LETTERS} letters here; give fewer")
    count = len(x.values) * (len(y.values) if y is not None else 1)
    if count > CELLS:
        product = f"{len(x.values)} × {len(y.values)} = {count}" if y is not None else str(count)
        raise MahlstickError(say("cmp_too_many", count=product, most=CELLS))


def _check_shown(axis: Axis, request: Request) -> None:
    """Raises :class:`MahlstickError` where the page has no place for an axis, or the request nothing for it."""
    axis.check(request)
    if axis.field not in (*_PLAIN, *_unit_fields()):
        raise MahlstickError(f"{axis.field}: cannot be compared on this page; use mahlstick.compare in Python")


def _place(event: gr.SelectData) -> int:
    return int(event.index)


# Button -> the axes, as a person writes them.
_EXAMPLES: Mapping[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "cmp_example_steps": (("steps", "5, 10, 20"), ("seed", "1-3")),
    "cmp_example_guidance": (("guidance", "1-7 [4]"), ("scheduler", "ddim, euler, dpm++_2m")),
    "cmp_example_control": (("controls[0].scale", "0.5, 1"), ("controls[0].end", "0.4, 1")),
}
