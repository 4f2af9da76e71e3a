"""The tab on which pictures are made."""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mahlstick.errors import MahlstickError
from mahlstick.page import canvas, scripts, status
from mahlstick.page.faults import sentence
from mahlstick.page.history import History
from mahlstick.page.jobs import Cancelled, Jobs, pictures
from mahlstick.page.models import Models
from mahlstick.page.sentences import translated
from mahlstick.page.texts import label, say
from mahlstick.page.units import (
    ControlUnit,
    ImagePromptUnit,
    UnitFault,
    Updates,
    Values,
    error_line,
    option_updates,
    slide,
)
from mahlstick.pictures import load_picture
from mahlstick.pipelines import schedulers
from mahlstick.pipelines.load import embedded_folder
from mahlstick.pipelines.recipe import Recipe, read_recipe
from mahlstick.pipelines.request import ControlSpec, ImagePromptSpec, Request, open_mask, open_picture

CONTROLS = 4
IMAGE_PROMPTS = 3
PICTURES = 16  # at once

_UNIT = re.compile(r"(controls|image_prompts)\[(\d+)\]")


class Create:
    """The tab's components and what they do."""

    def __init__(self, models: Models, jobs: Jobs, history: History, session: gr.BrowserState) -> None:
        self._models, self._jobs, self._history, self._session = models, jobs, history, session
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=5, min_width=320, elem_classes="left"):
                self._lay_prompt()
                self._lay_settings()
                self._lay_units()
                self._lay_init()
            with gr.Column(scale=6, min_width=320, elem_classes="right"):
                self._lay_result()
        self._wire()

    # What is on the screen.

    def _lay_prompt(self) -> None:
        with gr.Group():
            self.prompt = gr.Textbox(
                label=label("prompt"),
                placeholder=label("prompt_hint"),
                lines=2,
                max_lines=8,
                elem_id="prompt",
                autofocus=True,
            )
            self.negative = gr.Textbox(
                label=label("negative"), placeholder=label("negative_hint"), lines=1, max_lines=4, elem_id="negative"
            )
        self.error = error_line()
        with gr.Row(elem_classes="actions"):
            self.paint = gr.Button(label("paint"), variant="primary", elem_id="paint", scale=3, min_width=160)
            self.cancel = gr.Button(
                label("cancel"), variant="stop", elem_id="cancel", scale=1, min_width=100, visible=False
            )

    def _lay_settings(self) -> None:
        with gr.Accordion(label("settings"), open=True, elem_id="settings"):
            with gr.Row():
                self.model = gr.Dropdown(
                    self._models.bases, value="embedded", label=label("model"), elem_id="model", min_width=140
                )
                self.sampler = gr.Dropdown(
                    [(label("own_sampler"), ""), *sampler_choices()], value="", label=label("sampler"), min_width=140
                )
            with gr.Row():
                self.steps = gr.Slider(1, 100, 20, step=1, label=label("steps"), min_width=140, buttons=[])
                self.images = gr.Slider(1, PICTURES, 1, step=1, label=label("pictures"), min_width=140, buttons=[])
            with gr.Row():
                self.width = gr.Number(None, label=label("width"), placeholder=label("own"), precision=0, min_width=100)
                self.height = gr.Number(
                    None, label=label("height"), placeholder=label("own"), precision=0, min_width=100
                )
                self.guidance = gr.Number(None, label=label("guidance"), placeholder=label("own"), min_width=100)
            with gr.Row(elem_id="seeds"):
                self.seed = gr.Number(
                    None,
                    label=label("seed"),
                    placeholder=label("seed_hint"),
                    precision=0,
                    elem_id="seed",
                    min_width=120,
                )
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
            self.init_error = error_line()
            self.init = canvas.mask(label("init_hint"), files=True, elem_id="init-picture")
            self.strength = gr.Slider(0.05, 1.0, 0.8, step=0.05, label=label("strength"), buttons=[])

    def _lay_result(self) -> None:
        self.status = gr.HTML("", elem_id="status", elem_classes="sentence", padding=False)
        with gr.Column(elem_id="empty") as self.empty:
            gr.Markdown(label("empty"))
            with gr.Row():
                self.examples = [
                    gr.Button(label(key), size="sm", min_width=110, elem_id=key.replace("_", "-")) for key in _EXAMPLES
                ]
        self.gallery = gr.Gallery(
            label=label("result"),
            columns=4,
            height=460,
            object_fit="contain",
            preview=True,
            interactive=False,
            buttons=["download", "fullscreen"],
            elem_id="gallery",
            visible=False,
        )
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
            self.drop = gr.File(label=label("drop"), height=64, elem_id="drop")
            self.drop_error = error_line()
        with gr.Accordion(label("code"), open=False, elem_id="code"):
            self.refresh = gr.Button(label("refresh"), size="sm", elem_id="refresh")
            self.code_error = error_line()
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
    def dropdowns(self) -> list[tuple[str, gr.Dropdown]]:
        """Where models are chosen, each with the name of its list in :class:`Models`."""
        nets = [("nets", unit.adapter) for unit in self.controls]
        return [("bases", self.model), *nets, *(("image_prompts", unit.adapter) for unit in self.image_prompts)]

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
    def _screen(self) -> list[Any]:
        """What a request can change: the fields, the groups of the units and the sections."""
        of_units = [component for unit in self.units for component in unit.outputs]
        sections = [self.controls_section, self.prompts_section, self.init_section]
        return [*dict.fromkeys([*self.fields, *of_units, *sections, *self._errors])]

    @property
    def _errors(self) -> list[Any]:
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

    def write(self, request: Request) -> Updates:
        """The request on the screen. Raises :class:`MahlstickError` where it has more units than the page."""
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
            self.steps: slide(request.steps, 1, 100),
            self.images: slide(request.images, 1, PICTURES),
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
            **self._clear_errors(),
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
        return updates

    def _clear_errors(self) -> Updates:
        return {line: "" for line in self._errors}

    def _complain(self, error: Exception, values: Values, browser: gr.Request) -> Updates:
        """The fault as a sentence, beside the field that it is about."""
        return {self._line_for(error, str(error), values): status.error(sentence(error, browser))}

    def _line_for(self, error: Exception, message: str, values: Values) -> gr.HTML:
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
        everything = {*self.fields, self._session, self.chosen, self.shown, self.search, self.overlay}
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        outputs = [self._session, self.status, *self._result, *self._code_shown, *self._errors]
        self.paint.click(self._paint, everything, outputs, **quiet)
        self.cancel.click(self._jobs.cancel, [self._session], None, queue=False, **quiet)
        self.dice.click(lambda: secrets.randbelow(2**32), None, self.seed, **quiet)
        self.reuse.click(self._reuse, [self._session, self.shown, self.chosen], self.seed, **quiet)
        self.gallery.select(self._choose, [self._session, self.shown], [self.chosen, self.texts[0]], **quiet)
        found = [self._session, self.search, self.overlay]
        self.search.input(self._find, found, [*self._result, self.status], trigger_mode="always_last", **quiet)
        self.overlay.input(self._lay_over, [*found, self.chosen], self._result, **quiet)
        self.refresh.click(self._code, everything, [*self._code_shown, *self._errors], **quiet)
        dropped = [self.drop, self._session]
        self.drop.upload(self._restore_file, dropped, [*self._screen, self.drop, self.status], **quiet)
        pictured = [self._session, self.shown, self.chosen]
        self.restore.click(self._restore_chosen, pictured, [*self._screen, self.status], **quiet)
        self.to_init.click(self._send_init, pictured, [self.init, self.init_section], **quiet)
        self.to_control.click(self._send_control, everything, [*self._screen, self.status], **quiet)
        self.to_image_prompt.click(self._send_image_prompt, everything, [*self._screen, self.status], **quiet)
        for key, button in zip(_EXAMPLES, self.examples, strict=True):
            button.click(lambda key=key: self.write(_example(key)), None, self._screen, **quiet)
        self._wire_units(quiet)

    def _wire_units(self, quiet: dict[str, Any]) -> None:
        for add, units in ((self.add_control, self.controls), (self.add_image_prompt, self.image_prompts)):
            states: list[Any] = [unit.shown for unit in units]
            groups: list[Any] = [unit.group for unit in units]
            add.click(_show_next, states, [*groups, *states], **quiet)
        for unit in self.units:
            unit.remove.click(lambda unit=unit: unit.write(None), None, unit.outputs, **quiet)
            unit.masked.input(self._open_mask(unit), [unit.masked, *_below(unit)], unit.mask, **quiet)
        for control in self.controls:
            seen = [control.seen, control.error, control.mask]
            control.annotator.input(option_updates, control.annotator, control.options, **quiet).then(
                self._see(control), {*control.fields}, seen, **quiet
            )
            gr.on(
                [control.picture.change, *(option.input for option in control.options)],
                self._see(control),
                {*control.fields},
                seen,
                trigger_mode="always_last",
                **quiet,
            )

    def _see(self, control: ControlUnit) -> Any:
        def see(values: Values, browser: gr.Request) -> Updates:
            try:
                seen, told = control.see(values), ""
            except MahlstickError as error:
                seen, told = None, status.error(translated(str(error), browser))
            shown = {control.seen: gr.update(value=seen, visible=seen is not None), control.error: told}
            if not values[control.masked]:
                return shown
            return {**shown, control.mask: canvas.above(values[control.picture], values[control.mask])}

        return see

    def _open_mask(self, unit: Any) -> Any:
        def open_mask(masked: bool, below: Any = None) -> Any:
            return gr.update(visible=masked, value=canvas.above(below) if masked else None)

        return open_mask

    async def _paint(self, values: Values, browser: gr.Request) -> AsyncIterator[Updates]:
        session = values[self._session] or History.new_session()
        idle = [unit for unit in self.units if unit.is_idle(values)]
        hints = {unit.error: status.note(say("idle_unit", browser)) for unit in idle}
        yield {
            **self._clear_errors(),
            **hints,
            self._session: session,
            self.status: status.bar(say("loading", browser)),
            **self._faces(values[self.shown], values[self.search], working=True),
        }
        job, after = None, self._faces(values[self.shown], values[self.search])
        try:
            if not (values[self.prompt] or "").strip():
                raise MahlstickError(say("no_prompt", browser))
            request = self.read(values)
            self._models.check(request, self._history.results(session))
            work = pictures(request, lambda result: self._history.add(session, result))
            job = self._jobs.submit(work, session)
            yield self._texts(session, request, browser)
            async for shown in status.watch(self._jobs, job, browser):
                yield {self.status: shown}
            saved = job.future.result()
            yield {self.status: "", self.search: "", **self._gallery(session, values[self.overlay], first=saved)}
        except Cancelled:
            yield {self.status: status.note(say("cancelled", browser)), **after}
        except Exception as error:
            yield {self.status: "", **after, **self._complain(error, values, browser)}
        finally:
            if job is not None and not job.future.done():  # the person has gone
                job.cancel()

    async def generate(self, request: dict[str, Any]) -> list[str]:
        """Makes the pictures of a request and returns the PNG files.

        ``request`` holds the fields of mahlstick.Request as JSON; pictures in it are ``data:`` URLs, as
        ``Request.to_json`` writes them. Models and adapters are those that the page offers.
        """
        try:
            wanted = Request(**request)
            only_data(request)
            if wanted.images > PICTURES:
                raise MahlstickError(f"images: at most {PICTURES} at once here, not {wanted.images}")
            self._models.check(wanted)
            job = self._jobs.submit(pictures(wanted, lambda made: self._history.add(History.new_session(), made)))
            try:
                async for _ in status.watch(self._jobs, job, None):
                    pass
                return [str(path) for path in job.future.result()]
            finally:
                job.cancel()
        except MahlstickError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def enter(self, session: str | None) -> Updates:
        """What a browser sees at first: its session's pictures."""
        session = session or History.new_session()
        # A number that begins as None is shown as 0, but one that becomes None as an empty field.
        return {self._session: session, **dict.fromkeys(self._numbers), **self._gallery(session)}

    @property
    def entered(self) -> list[Any]:
        return [self._session, *self._numbers, *self._result]

    @property
    def _result(self) -> list[Any]:
        """What changes with the pictures that there are."""
        return [self.gallery, self.shown, self.chosen, self.cancel, self.send, self.search, self.empty]

    def _gallery(
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
        found = self._gallery(session, overlay, words=words)
        nothing = status.note(say("none_found", browser)) if words and not found[self.shown] else ""
        return {**found, self.status: nothing}

    def _lay_over(self, session: str, words: str, overlay: bool, chosen: int) -> Updates:
        return self._gallery(session, overlay, words=words, chosen=chosen)

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
            named = str(error).replace(str(path), Path(path).name)
            return {self.drop_error: status.error(translated(named, browser)), self.drop: None}

    def _restore_chosen(self, session: str, shown: list[str], chosen: int, browser: gr.Request) -> Updates:
        try:
            return self._restored(self._path(session, shown, chosen), session, browser)
        except MahlstickError as error:
            return {self.error: status.error(translated(str(error), browser))}

    def _restored(self, path: Path, session: str, browser: gr.Request) -> Updates:
        recipe = read_recipe(path)
        only_data(recipe.request.model_dump(mode="json"))
        request = recipe.request.model_copy(update={"seeds": [_seed(recipe)], "images": 1, "seed": None})
        self._models.check(request, self._history.results(session))
        lost = _lost(request)
        told = say("restored_without", browser, names=", ".join(lost)) if lost else say("restored", browser)
        return {**self.write(request), self.status: status.note(told)}

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
                pictures = [str(self._chosen_path(values))]
                shown = {unit.group: gr.update(visible=True), unit.shown: True, unit.pictures: pictures}
                return {**shown, self.prompts_section: gr.update(open=True)}
        return {self.status: status.note(say("full", browser))}

    def _chosen_path(self, values: Values) -> Path:
        return self._path(values[self._session], values[self.shown], values[self.chosen])

    def _code(self, values: Values, browser: gr.Request) -> Updates:
        try:
            texts = self._texts(values[self._session], self.read(values), browser, recipe=False)
            return {**self._clear_errors(), **texts}
        except MahlstickError as error:
            return {**self._clear_errors(), self.code_error: status.error(translated(str(error), browser))}

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


def sampler_choices() -> list[tuple[str, str]]:
    names = schedulers.names()
    return [(name, name) for name in [*names, *(f"{name}_karras" for name in names if name.startswith("dpm++"))]]


def _seed(recipe: Recipe) -> int:
    assert recipe.request.seeds is not None
    return recipe.request.seeds[recipe.index or 0]


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


def only_data(value: Any) -> None:
    """Raises :class:`MahlstickError` where a request from outside names a picture on this machine."""
    pictures = ("init", "mask", "image", "images", "negative")
    if isinstance(value, dict):
        for name, inner in value.items():
            for source in inner if isinstance(inner, list) else [inner]:
                if name in pictures and isinstance(source, str) and not source.startswith("data:"):
                    raise MahlstickError(f"{name}: give the picture as a data: URL, as Request.to_json() writes it")
            only_data(inner)
    elif isinstance(value, list):
        for inner in value:
            only_data(inner)


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
