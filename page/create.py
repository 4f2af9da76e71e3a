"""The tab on which pictures are made."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mahlstick.errors import MahlstickError
from mahlstick.page import canvas, parts, scripts, status
from mahlstick.page.endpoints import answer, as_fields, endpoint, only_data
from mahlstick.page.faults import named, sentence
from mahlstick.page.history import History
from mahlstick.page.jobs import Jobs, pictures
from mahlstick.page.making import Begun, Maker
from mahlstick.page.models import Models
from mahlstick.page.parts import QUIET, Updates, Values
from mahlstick.page.texts import label, say
from mahlstick.page.units import ControlUnit, ImagePromptUnit, UnitFault, option_updates
from mahlstick.pictures import load_picture
from mahlstick.pipelines.load import embedded_folder
from mahlstick.pipelines.recipe import Recipe, read_recipe
from mahlstick.pipelines.request import ControlSpec, ImagePromptSpec, Request, open_mask, open_picture

CONTROLS = 4
IMAGE_PROMPTS = 3
PICTURES = 16  # at once

_UNIT = re.compile(r"(controls|image_prompts)\[(\d+)\]")


class Create(Maker):
    """The tab's components and what they do."""

    def __init__(self, models: Models, jobs: Jobs, history: History, session: gr.BrowserState) -> None:
        super().__init__(jobs, history, session)
        self._models = models
        left, right = parts.columns()
        with left:
            self._lay_prompt()
            self._lay_settings()
            self._lay_units()
            self._lay_init()
        with right:
            self._lay_result()
        self._wire()

    # What is on the screen.

    def _lay_prompt(self) -> None:
        with gr.Group():
            self.prompt, self.negative = parts.prompts(autofocus=True)
        self.error = parts.error_line()
        self.run, self.cancel = parts.actions("paint", "paint", "cancel")

    def _lay_settings(self) -> None:
        with gr.Accordion(label("settings"), open=True, elem_id="settings"):
            with gr.Row():
                self.model = gr.Dropdown(
                    self._models.bases, value="embedded", label=label("model"), elem_id="model", min_width=140
                )
                self.sampler = parts.sampler()
            with gr.Row():
                self.steps = gr.Slider(1, 100, 20, step=1, label=label("steps"), min_width=140, buttons=[])
                self.images = gr.Slider(1, PICTURES, 1, step=1, label=label("pictures"), min_width=140, buttons=[])
            with gr.Row():
                self.width, self.height = parts.open_number("width"), parts.open_number("height")
                self.guidance = parts.open_number("guidance", whole=False)
            with gr.Row(elem_id="seeds"):
                self.seed = parts.open_number("seed", placeholder=label("seed_hint"), elem_id="seed", min_width=120)
                self.dice = gr.Button(label("dice"), size="sm", min_width=80, scale=0, elem_id="dice")
                self.reuse = gr.Button(label("reuse"), size="sm", min_width=80, scale=0, elem_id="reuse")

    def _lay_units(self) -> None:
        with gr.Accordion(label("controls"), open=False, elem_id="controls") as self.controls_section:
            self.controls = [ControlUnit(i, self._models, shown=i == 0) for i in range(CONTROLS)]
            self.add_control = gr.Button(label("add_control"), size="sm", elem_classes="add")
        with gr.Accordion(label("image_prompts"), open=False, elem_id="image-prompts") as self.prompts_section:
            self.image_prompts = [ImagePromptUnit(i, self._models, shown=i == 0) for i in range(IMAGE_PROMPTS)]
            self.add_image_prompt = gr.Button(label("add_image_prompt"), size="sm", elem_classes="add")

    def _lay_init(self) -> None:
        with gr.Accordion(label("init"), open=False, elem_id="init") as self.init_section:
            self.init_error = parts.error_line()
            self.init = canvas.mask(label("init_hint"), files=True, elem_id="init-picture")
            self.strength = gr.Slider(0.05, 1.0, 0.8, step=0.05, label=label("strength"), buttons=[])

    def _lay_result(self) -> None:
        self.status = parts.status_line("status")
        self.empty, self.examples = parts.invitation("empty", "empty", [*_EXAMPLES])
        self.gallery = parts.gallery("result", "gallery")
        self.chosen = gr.State(0)  # place in the gallery
        self.shown = gr.State([])  # names of the pictures in it
        with gr.Column(elem_id="send", visible=False) as self.send:
            with gr.Row():
                self.to_init = gr.Button(label("to_init"), size="sm", min_width=110, elem_id="to-init")
                self.to_control = gr.Button(label("to_control"), size="sm", min_width=110, elem_id="to-control")
                self.to_image_prompt = gr.Button(
                    label("to_image_prompt"), size="sm", min_width=110, elem_id="to-image-prompt"
                )
                self.restore = gr.Button(label("restore"), size="sm", min_width=110, elem_id="restore")
            self.overlay = gr.Checkbox(False, label=label("overlay"), container=False, elem_id="overlay")
        self.search = gr.Textbox(
            placeholder=label("search"), label=label("search"), show_label=False, elem_id="search", visible=False
        )
        with gr.Column(elem_id="drop-place"):
            self.drop = parts.drop_line("drop", "drop")
            self.drop_error = parts.error_line()
        with gr.Accordion(label("code"), open=False, elem_id="code"):
            self.refresh = gr.Button(label("refresh"), size="sm", elem_id="refresh")
            self.code_error = parts.error_line()
            with gr.Tabs():
                self.texts = []
                for key in ("recipe", "python", "shell", "workflow"):
                    with gr.Tab(label(key)):
                        self.texts.append(
                            gr.Textbox(
                                label=label(key),
                                show_label=False,
                                lines=6,
                                max_lines=16,
                                buttons=["copy"],
                                interactive=False,
                                elem_id=f"code-{key}",
                                elem_classes="mono",
                            )
                        )
            self.workflow_note = gr.HTML("", elem_classes="sentence", padding=False)

    @property
    def _code_shown(self) -> list[Any]:
        return [*self.texts, self.workflow_note]

    @property
    def units(self) -> list[Any]:
        return [*self.controls, *self.image_prompts]

    @property
    def choosers(self) -> list[Any]:
        """What changes with the models that there are."""
        return [self.model, *(unit.adapter for unit in self.units)]

    def offer(self, models: Models) -> Updates:
        """What there is to choose from."""
        lists = [models.bases, *[models.nets] * CONTROLS, *[models.image_prompts] * IMAGE_PROMPTS]
        return {chooser: gr.update(choices=list_) for chooser, list_ in zip(self.choosers, lists, strict=True)}

    @property
    def fields(self) -> list[Any]:
        own = [
            self.prompt, self.negative, self.model, self.steps, self.images, self.width, self.height, self.guidance,
            self.sampler, self.seed, self.init, self.strength,
        ]  # fmt: skip
        return [*own, *(field for unit in self.units for field in unit.fields)]

    @property
    def _numbers(self) -> list[Any]:
        return [self.width, self.height, self.guidance, self.seed]

    @property
    def screen(self) -> list[Any]:
        """What a request can change: the fields, the groups of the units and the sections."""
        of_units = [component for unit in self.units for component in unit.outputs]
        sections = [self.controls_section, self.prompts_section, self.init_section]
        return [*dict.fromkeys([*self.fields, *of_units, *sections, *self.errors])]

    @property
    def errors(self) -> list[Any]:
        return [self.error, self.init_error, self.drop_error, self.code_error, *(unit.error for unit in self.units)]

    # Between the screen and a request.

    def read(self, values: Values) -> Request:
        """The request that is on the screen. Raises :class:`MahlstickError`."""
        init = canvas.background(values[self.init])
        repaint = canvas.painted(values[self.init]) if init is not None else None
        return Request(
            prompt=values[self.prompt] or "",
            negative_prompt=values[self.negative] or "",
            base=values[self.model],
            steps=values[self.steps],
            images=values[self.images],
            width=values[self.width] or None,
            height=values[self.height] or None,
            guidance=values[self.guidance],
            scheduler=values[self.sampler] or None,
            seed=values[self.seed],
            init=init,
            mask=repaint,
            strength=values[self.strength] if init is not None else None,
            controls=_read_all(self.controls, values),
            image_prompts=_read_all(self.image_prompts, values),
        )

    def write(self, request: Request, offered: Models | None = None) -> Updates:
        """The request on the screen, and what there is to choose from where that may have changed. Raises
        :class:`MahlstickError` where it has more units than the page."""
        for field, given, most in (
            ("controls", request.controls, CONTROLS),
            ("image_prompts", request.image_prompts, IMAGE_PROMPTS),
        ):
            if len(given) > most:
                raise MahlstickError(f"{field}: the picture has {len(given)}, and this page shows {most}")
        init = open_picture(request.init, "init") if request.init is not None else None
        repaint = open_mask(request.mask, "mask") if request.mask is not None else None
        updates: Updates = {
            self.prompt: request.prompt,
            self.negative: request.negative_prompt,
            self.model: request.base,
            self.steps: parts.slide(request.steps, 1, 100),
            self.images: parts.slide(request.images, 1, PICTURES),
            self.width: request.width,
            self.height: request.height,
            self.guidance: request.guidance,
            self.sampler: request.scheduler or "",
            self.seed: request.seeds[0] if request.seeds else request.seed,
            self.init: canvas.value(init, repaint),
            self.strength: request.effective_strength,
            self.controls_section: gr.update(open=bool(request.controls)),
            self.prompts_section: gr.update(open=bool(request.image_prompts)),
            self.init_section: gr.update(open=init is not None),
            **dict.fromkeys(self.errors, ""),
        }
        both: list[tuple[list[Any], list[Any]]] = [
            (self.controls, request.controls),
            (self.image_prompts, request.image_prompts),
        ]
        for units, specs in both:
            for unit, spec in zip(units, [*specs, *[None] * len(units)], strict=False):
                updates |= unit.write(spec)
            if not specs:  # an empty unit that invites
                updates |= {units[0].group: gr.update(visible=True), units[0].shown: True}
        choices = self.offer(offered) if offered is not None else {}
        return updates | {chooser: update | {"value": updates[chooser]} for chooser, update in choices.items()}

    def line_for(self, error: Exception, values: Values) -> gr.HTML:
        message = str(error)
        if isinstance(error, UnitFault):
            return error.line
        if found := _UNIT.match(message):
            units: list[Any] = self.controls if found[1] == "controls" else self.image_prompts
            used = [unit for unit in units if unit.filled(values)]
            if int(found[2]) < len(used):
                return used[int(found[2])].error
        return self.init_error if message.startswith(("init", "mask", "strength")) else self.error

    # What happens.

    def _wire(self) -> None:
        pictured = [self._session, self.shown, self.chosen]
        seen = [*self.fields, *pictured, self.search, self.overlay]
        everything = {*seen}
        self.wire_run(seen, self._code_shown)
        self.dice.click(lambda: secrets.randbelow(2**32), None, self.seed, **QUIET)
        self.reuse.click(self._reuse, pictured, self.seed, **QUIET)
        self.gallery.select(self._choose, [self._session, self.shown], [self.chosen, self.texts[0]], **QUIET)
        found = [self._session, self.search, self.overlay]
        self.search.input(self._find, found, [*self.result, self.status], trigger_mode="always_last", **QUIET)
        self.overlay.input(self._lay_over, [*found, self.chosen], self.result, **QUIET)
        self.refresh.click(self._code, everything, [*self._code_shown, *self.errors], **QUIET)
        dropped = [self.drop, self._session]
        self.drop.upload(self._restore_file, dropped, [*self.screen, self.drop, self.status], **QUIET)
        self.restore.click(self._restore_chosen, pictured, [*self.screen, self.status], **QUIET)
        self.to_init.click(self._send_init, pictured, [self.init, self.init_section], **QUIET)
        self.to_control.click(self._send_control, everything, [*self.screen, self.status], **QUIET)
        self.to_image_prompt.click(self._send_image_prompt, everything, [*self.screen, self.status], **QUIET)
        for key, button in zip(_EXAMPLES, self.examples, strict=True):
            button.click(lambda key=key: self.write(_example(key)), None, self.screen, **QUIET)
        self._wire_units()

    def _wire_units(self) -> None:
        for add, units in ((self.add_control, self.controls), (self.add_image_prompt, self.image_prompts)):
            states: list[Any] = [unit.shown for unit in units]
            groups: list[Any] = [unit.group for unit in units]
            add.click(_show_next, states, [*groups, *states], **QUIET)
        for unit in self.units:
            unit.remove.click(lambda unit=unit: unit.write(None), None, unit.outputs, **QUIET)
            unit.masked.input(self._open_mask(unit), [unit.masked, *_below(unit)], unit.mask, **QUIET)
        for control in self.controls:
            seen = [control.seen, control.error, control.mask]
            control.annotator.input(option_updates, control.annotator, control.options, **QUIET).then(
                self._see(control), {*control.fields}, seen, **QUIET
            )
            gr.on(
                [control.picture.change, *(option.input for option in control.options)],
                self._see(control),
                {*control.fields},
                seen,
                trigger_mode="always_last",
                **QUIET,
            )

    def _see(self, control: ControlUnit) -> Any:
        def see(values: Values, browser: gr.Request) -> Updates:
            try:
                seen, told = control.see(values), ""
            except MahlstickError as error:
                seen, told = None, status.error(sentence(error, browser))
            shown = {control.seen: gr.update(value=seen, visible=seen is not None), control.error: told}
            if not values[control.masked]:
                return shown
            return {**shown, control.mask: canvas.above(values[control.picture], values[control.mask])}

        return see

    def _open_mask(self, unit: Any) -> Any:
        def open_mask(masked: bool, below: Any = None) -> Any:
            return gr.update(visible=masked, value=canvas.above(below) if masked else None)

        return open_mask

    def begin(self, values: Values, session: str, browser: gr.Request) -> Begun:
        if not (values[self.prompt] or "").strip():
            raise MahlstickError(say("no_prompt", browser))
        request = self.read(values)
        self.offered(self._models, session).check(request)
        work = pictures(request, lambda result: self._history.add(session, result))
        return Begun(work, meanwhile=self._texts(session, request, browser))

    def working(self, values: Values, browser: gr.Request) -> Updates:
        idle = [unit for unit in self.units if unit.is_idle(values)]
        hints = {unit.error: status.note(say("idle_unit", browser)) for unit in idle}
        return {**hints, **self._faces(values[self.shown], values[self.search], working=True)}

    def made(self, found: list[Path], values: Values, session: str, browser: gr.Request) -> Updates:
        return {self.search: "", **self.show(session, values[self.overlay], first=found)}

    def left(self, values: Values, session: str, browser: gr.Request) -> Updates:
        return self._faces(values[self.shown], values[self.search])

    @endpoint
    async def generate(self, request: dict[str, Any]) -> list[str]:
        """Makes the pictures of a request and returns the PNG files.

        ``request`` holds the fields of mahlstick.Request as JSON; pictures in it are ``data:`` URLs, as
        ``Request.to_json`` writes them. Models and adapters are those that the page offers.
        """
        wanted = Request(**as_fields(request, "request"))
        if wanted.images > PICTURES:
            raise MahlstickError(f"images: at most {PICTURES} at once here, not {wanted.images}")
        self._models.check(wanted)
        made = pictures(wanted, lambda made: self._history.add(History.new_session(), made))
        return [str(path) for path in await answer(self._jobs, made)]

    def enter(self, session: str | None) -> Updates:
        """What a browser sees at first: its session's pictures."""
        session = session or History.new_session()
        # A number that begins as None is shown as 0, but one that becomes None as an empty field.
        return {self._session: session, **dict.fromkeys(self._numbers), **self.show(session)}

    @property
    def entered(self) -> list[Any]:
        return [self._session, *self._numbers, *self.result]

    @property
    def result(self) -> list[Any]:
        return [self.gallery, self.shown, self.chosen, self.cancel, self.send, self.search, self.empty]

    def show(
        self, session: str, overlay: bool = False, first: Sequence[Path] = (), words: str = "", chosen: int = 0
    ) -> Updates:
        """The session's pictures that were made from ``words``, those of ``first`` before the others."""
        pictures = self._history.pictures(session, words)
        pictures = [*first, *(path for path in pictures if path not in first)]
        shown = [self._history.overlaid(path) for path in pictures] if overlay else pictures
        names, place = [path.name for path in pictures], chosen if pictures else None
        gallery = {"value": [str(path) for path in shown], "selected_index": place}
        faces = self._faces(names, words)
        return {
            **faces,
            self.gallery: gr.update(**gallery, **faces[self.gallery]),
            self.shown: names,
            self.chosen: chosen,
        }

    def _faces(self, shown: list[str], words: str, working: bool = False) -> Updates:
        """What is visible, while a picture is made and otherwise."""
        return {
            self.cancel: gr.update(visible=working),
            self.empty: gr.update(visible=not (working or shown or words)),
            self.search: gr.update(visible=bool(shown or words) and not working),
            **{each: gr.update(visible=bool(shown) and not working) for each in (self.gallery, self.send)},
        }

    def _find(self, session: str, words: str, overlay: bool, browser: gr.Request) -> Updates:
        found = self.show(session, overlay, words=words)
        nothing = status.note(say("none_found", browser)) if words and not found[self.shown] else ""
        return {**found, self.status: nothing}

    def _lay_over(self, session: str, words: str, overlay: bool, chosen: int) -> Updates:
        return self.show(session, overlay, words=words, chosen=chosen)

    def _path(self, session: str, shown: list[str], chosen: int) -> Path:
        """The chosen picture. Raises :class:`MahlstickError` where none is."""
        if not 0 <= chosen < len(shown):
            raise MahlstickError(say("no_selection"))
        return self._history.folder(session) / shown[chosen]

    def _choose(self, session: str, shown: list[str], event: gr.SelectData) -> tuple[int, str]:
        path = self._path(session, shown, event.index)
        return event.index, read_recipe(path).text()["parameters"]

    def _reuse(self, session: str, shown: list[str], chosen: int) -> int | None:
        try:
            return _seed(read_recipe(self._path(session, shown, chosen)))
        except MahlstickError:
            return None

    def _restore_file(self, path: str, session: str, browser: gr.Request) -> Updates:
        try:
            return {**self._restored(Path(path), session, browser), self.drop: None}
        except MahlstickError as error:
            return {self.drop_error: named(error, path, browser), self.drop: None}

    def _restore_chosen(self, session: str, shown: list[str], chosen: int, browser: gr.Request) -> Updates:
        try:
            return self._restored(self._path(session, shown, chosen), session, browser)
        except MahlstickError as error:
            return {self.error: status.error(sentence(error, browser))}

    def _restored(self, path: Path, session: str, browser: gr.Request) -> Updates:
        recipe = read_recipe(path)
        again = with_found(recipe.request)
        request = again.model_copy(update={"seeds": [_seed(recipe)], "images": 1, "seed": None})
        offered = self.offered(self._models, session)
        offered.check(request)
        lost = _lost(request)
        told = say("restored_without", browser, names=", ".join(lost)) if lost else say("restored", browser)
        return {**self.write(request, offered), self.status: status.note(told)}

    def _send_init(self, session: str, shown: list[str], chosen: int) -> tuple[Any, Any]:
        picture = load_picture(self._path(session, shown, chosen))
        return canvas.value(picture), gr.update(open=True)

    def _send_control(self, values: Values, browser: gr.Request) -> Updates:
        for unit in self.controls:
            if not unit.filled(values):
                picture = load_picture(self._chosen_path(values))
                shown = {unit.group: gr.update(visible=True), unit.shown: True, unit.picture: canvas.value(picture)}
                return {**shown, self.controls_section: gr.update(open=True)}
        return {self.status: status.note(say("full", browser))}

    def _send_image_prompt(self, values: Values, browser: gr.Request) -> Updates:
        for unit in self.image_prompts:
            if not unit.filled(values):
                pictures = canvas.strip_value([load_picture(self._chosen_path(values))])
                shown = {unit.group: gr.update(visible=True), unit.shown: True, unit.pictures: pictures}
                return {**shown, self.prompts_section: gr.update(open=True)}
        return {self.status: status.note(say("full", browser))}

    def _chosen_path(self, values: Values) -> Path:
        return self._path(values[self._session], values[self.shown], values[self.chosen])

    def _code(self, values: Values, browser: gr.Request) -> Updates:
        try:
            texts = self._texts(values[self._session], self.read(values), browser, recipe=False)
            return {**dict.fromkeys(self.errors, ""), **texts}
        except MahlstickError as error:
            return {**dict.fromkeys(self.errors, ""), self.code_error: status.error(sentence(error, browser))}

    def _texts(self, session: str, request: Request, browser: gr.Request, recipe: bool = True) -> Updates:
        """The request as code, with its pictures in files."""
        kept = self._with_files(session, request)
        line = scripts.command(kept)
        if line is None:
            line = f"mahlstick generate --request {self._history.keep_request(session, kept)} --out out"
        workflow, left_out = scripts.workflow(kept)
        run = f"mahlstick run workflow.json --input {self._history.inputs(session)}"
        notes = [say("run_it", browser, command=run)]
        notes += [say("left_out", browser, what="; ".join(left_out))] if left_out else []
        _, python, shell, comfy = self.texts
        texts = {python: scripts.python(kept), shell: line, comfy: workflow}
        texts[self.workflow_note] = "".join(status.note(each) for each in notes)
        return {**texts, self.texts[0]: kept.to_json()} if recipe else texts

    def _with_files(self, session: str, request: Request) -> Request:
        """The request with every picture as the path of a file that keeps it."""

        def keep(picture: Any) -> str | None:
            return str(self._history.keep(session, picture)) if picture is not None else None

        def control(spec: ControlSpec) -> ControlSpec:
            options = {
                name: keep(value) if isinstance(value, Image.Image) else value for name, value in spec.options.items()
            }
            return spec.model_copy(update={"image": keep(spec.image), "mask": keep(spec.mask), "options": options})

        def image_prompt(spec: ImagePromptSpec) -> ImagePromptSpec:
            images = [keep(picture) for picture in spec.images]
            return spec.model_copy(update={"images": images, "mask": keep(spec.mask), "negative": keep(spec.negative)})

        return request.model_copy(
            update={
                "init": keep(request.init),
                "mask": keep(request.mask),
                "controls": [control(spec) for spec in request.controls],
                "image_prompts": [image_prompt(spec) for spec in request.image_prompts],
            }
        )


def _read_all(units: list[Any], values: Values) -> list[Any]:
    """The specs of the units that have a picture. Raises :class:`UnitFault`."""
    specs = []
    for unit in units:
        try:
            specs.append(unit.read(values))
        except MahlstickError as error:
            raise UnitFault(str(error), unit.error) from error
    return [spec for spec in specs if spec is not None]


def _below(unit: Any) -> list[Any]:
    return [unit.picture] if isinstance(unit, ControlUnit) else []


def _show_next(*shown: bool) -> list[Any]:
    """One unit more than before."""
    after = list(shown)
    if False in after:
        after[after.index(False)] = True
    return [*(gr.update(visible=visible) for visible in after), *after]


def _seed(recipe: Recipe) -> int:
    assert recipe.request.seeds is not None
    return recipe.request.seeds[recipe.index or 0]


def with_found(request: Request) -> Request:
    """The request of a recipe, with the pictures that words found in place of the words: the library may be another by
    now. Raises :class:`MahlstickError` where it names a picture on this machine."""
    only_data(request.model_dump(mode="json"))
    bare: dict[str, Any] = {"search": None, "library": None, "found": [], "count": 1, "least": None}
    specs = [spec.model_copy(update=bare) if spec.images else spec for spec in request.image_prompts]
    return request.model_copy(update={"image_prompts": specs})


def _lost(request: Request) -> list[str]:
    """Fields of a request that have no place on the page."""
    names = ["base_config"] if request.base_config else []
    names += ["batch"] if request.batch > 1 else []
    both: list[tuple[str, list[Any]]] = [("controls", request.controls), ("image_prompts", request.image_prompts)]
    for field, specs in both:
        for i, spec in enumerate(specs):
            names += [f"{field}[{i}].window"] if spec.window != "steps" else []
            names += [f"{field}[{i}].scale"] if isinstance(spec.scale, list) else []
            names += [f"{field}[{i}].blocks"] if isinstance(getattr(spec, "blocks", ""), dict) else []
            names += [f"{field}[{i}].image_encoder"] if getattr(spec, "image_encoder", None) else []
    return names


# Button -> the fields of the request that it shows; pictures are those of the assets.
_EXAMPLES: dict[str, dict[str, Any]] = {
    "example_text": {"prompt": "red apple"},
    "example_control": {"prompt": "penguin", "drawing": "penguin-drawing.png"},
    "example_image_prompt": {"prompt": "cactus", "reference": "lollipop-reference.png"},
}


def _example(key: str) -> Request:
    folder = embedded_folder().parent / "examples"
    fields = dict(_EXAMPLES[key])
    drawing, reference = fields.pop("drawing", None), fields.pop("reference", None)
    if drawing:
        fields["controls"] = [{"adapter": "lineart", "image": str(folder / drawing), "scale": 0.9}]
    if reference:
        fields["image_prompts"] = [{"images": [str(folder / reference)], "scale": 0.6}]
    return Request(**fields)
