"""The tab on which adapters are trained."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Protocol, Union, get_args, get_origin

import gradio as gr
import pandas as pd

from mahlstick import annotators
from mahlstick.errors import MahlstickError
from mahlstick.page import datasets, parts, status
from mahlstick.page.history import History
from mahlstick.page.jobs import Job, Jobs
from mahlstick.page.models import Models, trained
from mahlstick.page.parts import QUIET, Updates, Values
from mahlstick.page.runs import NAME, Run, runs
from mahlstick.page.sentences import translated
from mahlstick.page.texts import label, say
from mahlstick.page.weights import how_to_use, look
from mahlstick.pipelines.load import choose_device
from mahlstick.training.config import GROUPS, TrainConfig

REFRESH = 2.0  # seconds between two looks at a run
CHECKPOINT_EVERY = 50  # steps: what a kill costs at most
PLOT_HEIGHT = 280  # pixels

_TASKS = ("controlnet", "ip-adapter", "lora", "motion", "qformer")
_ANNOTATOR = "canny"
# Fields that have a place of their own, that name files, or that are of no use here.
_NOT_LISTED = {"task", "data", "out", "base", "steps", "batch", "rate", "resolution", "annotator", "tracker"}
_LOOKING = ("ip-adapter", "qformer")
_OF_TASK = {
    "annotator_options": ("controlnet",), "projector": ("ip-adapter",), "tokens": _LOOKING, "depth": _LOOKING,
    "heads": _LOOKING, "join": ("ip-adapter",), "image_layer": _LOOKING, "image_dropout": ("ip-adapter",),
    "momentum": ("qformer",), "frames": ("motion",), "fps": ("motion",), "positions": ("motion",), "norm": ("motion",),
    "mid_block": ("motion",),
    "rank": ("lora",), "train_text": ("lora",),
}  # fmt: skip
_OF_DATA = ("data", "control", "reference")
_log = logging.getLogger(__name__)


class Choosing(Protocol):
    """A tab on which models are chosen."""

    @property
    def choosers(self) -> list[Any]:
        """What changes with the models that there are."""

    def offer(self, models: Models) -> Updates:
        """What there is to choose from."""


class Train:
    """The tab's components and what they do."""

    def __init__(
        self,
        models: Models,
        jobs: Jobs,
        history: History,
        session: gr.BrowserState,
        data: Path | None,
        device: str | None = None,
        others: Sequence[Choosing] = (),
    ) -> None:
        """``data``: the folder of which a person may choose others. ``others``: tabs that are to offer
        what was trained.

        On an accelerator a run waits in the queue of ``jobs``, and they for it. On a CPU runs have a queue of their
        own, and pictures are made beside them.
        """
        self._models, self._history, self._session, self._data = models, history, session, data
        self._jobs = Jobs(device) if choose_device(device) == "cpu" else jobs
        self._others = others
        self._live: dict[Path, Job] = {}
        self._stopping: set[Path] = set()
        left, right = parts.columns()
        with left:
            self._lay_data()
            self._lay_settings()
            self._lay_more()
            self.start = gr.Button(label("tr_start"), variant="primary", elem_id="tr-start")
        with right:
            self._lay_run()
        self._wire()

    def close(self) -> None:
        """Ends the runs as Ctrl-C does, and the queue."""
        self._jobs.close()

    # What is on the screen.

    def _lay_data(self) -> None:
        self.task = gr.Radio(
            [(label(f"tr_{task}"), task) for task in _TASKS], value=_TASKS[0], label=label("tr_task"), elem_id="tr-task"
        )
        self.data = gr.Dropdown(
            list(datasets.folders(self._data)), value=None, label=label("tr_data"), elem_id="tr-data"
        )
        self.zip = parts.drop_line("tr_zip", "tr-zip")
        self.remove_data = parts.Removal("tr_remove_data", "tr-remove-data")
        if self._data is None:
            gr.Markdown(label("tr_no_data"), elem_classes="hint")
        self.data_note = gr.HTML("", elem_classes="sentence", padding=False)
        self.data_error = parts.error_line()
        with gr.Row():
            self.control = gr.Dropdown(
                [(label("tr_made"), "")], value="", label=label("tr_control"), elem_id="tr-control", min_width=140
            )
            self.reference = gr.Dropdown(
                [(label("tr_itself"), "")],
                value="",
                label=label("tr_reference"),
                visible=False,
                elem_id="tr-reference",
                min_width=140,
            )
            self.annotator = gr.Dropdown(
                [name for name in annotators.names() if name not in ("inpaint", "shuffle")],
                value=_ANNOTATOR,
                label=label("annotator"),
                elem_id="tr-annotator",
                min_width=140,
            )

    def _lay_settings(self) -> None:
        with gr.Row():
            self.name = gr.Textbox(label=label("tr_name"), max_lines=1, elem_id="tr-name", min_width=140)
            self.base = gr.Dropdown(
                self._models.bases, value="embedded", label=label("model"), elem_id="tr-base", min_width=140
            )
        self.name_error = parts.error_line()
        defaults = TrainConfig.model_fields
        with gr.Row():
            self.steps = gr.Number(
                defaults["steps"].default, label=label("steps"), precision=0, elem_id="tr-steps", min_width=100
            )
            self.batch = gr.Number(
                defaults["batch"].default, label=label("tr_batch"), precision=0, elem_id="tr-batch", min_width=100
            )
            self.rate = parts.open_number("tr_rate", whole=False, elem_id="tr-rate")
            self.resolution = parts.open_number("tr_resolution", elem_id="tr-resolution")
        self.error = parts.error_line()

    def _lay_more(self) -> None:
        """A component for each other field of a config, with the field's own description."""
        self.more: dict[str, Any] = {}
        with gr.Accordion(label("tr_more"), open=False, elem_id="tr-more"):
            group = ""
            for name, field in TrainConfig.model_fields.items():
                if name in GROUPS and name != "data":
                    group = name
                    gr.HTML(f"<h3>{GROUPS[group]}</h3>", padding=False)
                # What is told of the thing to be learned belongs to one task, which may not be offered here.
                fits = name not in _NOT_LISTED and (group != "start" or name in _OF_TASK)
                if fits and (component := _component(name, field)) is not None:
                    self.more[name] = component
            self.more_error = parts.error_line()

    def _lay_run(self) -> None:
        parts.invitation("tr_empty", "tr-empty")
        self.run = gr.Dropdown([], label=label("tr_runs"), visible=False, elem_id="tr-run")
        self.status = parts.status_line("tr-status")
        with gr.Row(elem_classes="actions"):
            self.stop = gr.Button(label("tr_stop"), variant="stop", visible=False, elem_id="tr-stop")
            self.resume = gr.Button(label("tr_resume"), visible=False, elem_id="tr-resume")
        self.remove_run = parts.Removal("tr_remove", "tr-remove")
        self.loss, self.fidelity = (
            gr.LinePlot(
                x="step",
                y="value",
                color="measure",
                label=label(key),
                y_title=" ",
                height=PLOT_HEIGHT,
                visible=False,
                elem_classes="plot",
            )
            for key in ("tr_loss", "tr_fidelity")
        )
        self.samples = gr.Image(
            label=label("tr_samples"),
            alt_text="what the adapter makes of held-out pictures",
            interactive=False,
            visible=False,
            buttons=["fullscreen"],
            elem_id="tr-samples",
        )
        self.result = gr.File(
            label=label("tr_result"), file_count="multiple", interactive=False, visible=False, elem_id="tr-result"
        )
        self.uses = [parts.code_line("shell"), parts.code_line("python")]
        self.timer = gr.Timer(REFRESH, active=False)

    @property
    def _errors(self) -> list[gr.HTML]:
        return [self.data_error, self.name_error, self.error, self.more_error]

    @property
    def _run_view(self) -> list[Any]:
        """What a run changes."""
        buttons = [self.stop, self.resume, *self.remove_run.components]
        seen = [self.status, *buttons, self.loss, self.fidelity, self.samples, self.result, *self.uses]
        return [self.run, *seen, self.timer, *(each for other in self._others for each in other.choosers)]

    @property
    def _folders(self) -> list[Any]:
        return [self.data, self.control, self.reference]

    def _wire(self) -> None:
        own = [self.task, *self._folders, self.annotator, self.name, self.base, self.steps, self.batch, self.rate]
        everything = {*own, self.resolution, *self.more.values(), self._session}
        view = [*self._run_view, *self._errors]
        self.start.click(self._start, everything, view, **QUIET)
        chosen = [self._session, self.run]
        self.stop.click(self._stop, chosen, self._run_view, queue=False, **QUIET)
        self.resume.click(self._resume, chosen, view, **QUIET)
        self.run.input(self._view, chosen, self._run_view, **QUIET)
        self.timer.tick(self._tick, chosen, self._run_view, queue=False, **QUIET)
        of_task = [self.control, self.reference, self.annotator, *(self.more[name] for name in self._of_task)]
        self.task.input(self._choose_task, self.task, of_task, **QUIET)
        outputs = [*self._folders, self.data_note, self.data_error, self.zip, *self.remove_data.components]
        self.zip.upload(self._unpack, [self.zip, self._session], outputs, **QUIET)
        self.remove_run.do.click(self._remove_run, chosen, [*self._run_view, self.error], **QUIET)
        removable = [*self.remove_data.components, *self._folders, self.data_note, self.data_error]
        for event, act in ((self.data.input, self._choose_data), (self.remove_data.do.click, self._remove_data)):
            event(act, [self._session, self.data], removable, **QUIET)

    @property
    def _of_task(self) -> dict[str, tuple[str, ...]]:
        return {name: tasks for name, tasks in _OF_TASK.items() if name in self.more}

    # Data.

    def _all_data(self, session: str) -> dict[str, Path]:
        """The folders that a session may choose, by what they are called: its own archives first."""
        return {**datasets.uploaded(self._home(session)), **datasets.folders(self._data)}

    def _home(self, session: str) -> Path:
        return self._history.results(session) / ".data"

    def _offer_data(self, session: str) -> Updates:
        names = [(name, name) for name in self._all_data(session)]
        return {
            self.data: gr.update(choices=names),
            self.control: gr.update(choices=[(label("tr_made"), ""), *names]),
            self.reference: gr.update(choices=[(label("tr_itself"), ""), *names]),
        }

    def _unpack(self, path: str, session: str, browser: gr.Request) -> Updates:
        try:
            folder, left = datasets.unpack(Path(path), self._home(session))
        except MahlstickError as error:
            return {self.data_error: status.error(str(error)), self.data_note: "", self.zip: None}
        finally:
            Path(path).unlink(missing_ok=True)
        kept = sum(file.is_file() for file in folder.rglob("*"))
        said = say("tr_unpacked", browser, name=folder.name, kept=kept, left=left)
        offered = self._offer_data(session)
        offered[self.data] = gr.update(**{**offered[self.data], "value": folder.name})
        told = {self.data_note: status.note(said), self.data_error: "", self.zip: None}
        return {**offered, **told, **self.remove_data.shown(True)}

    def _choose_data(self, session: str, name: str) -> Updates:
        return self.remove_data.shown(name in datasets.uploaded(self._home(session)))

    def _remove_data(self, session: str, name: str, browser: gr.Request) -> Updates:
        if name not in datasets.uploaded(self._home(session)):
            return self._choose_data(session, name)
        folder = self._home(session) / name
        if any(run.is_live and run.reads(folder) for run in runs(self._history.results(session))):
            return {self.data_error: status.error(say("tr_at_once", browser)), **self.remove_data.shown(True)}
        shutil.rmtree(folder, ignore_errors=True)
        offered = self._offer_data(session)
        offered[self.data] = gr.update(**{**offered[self.data], "value": None})
        return {**offered, self.data_note: "", self.data_error: "", **self.remove_data.shown(False)}

    def _choose_task(self, task: str) -> Updates:
        return {
            self.control: gr.update(visible=task == "controlnet"),
            self.annotator: gr.update(visible=task == "controlnet"),
            self.reference: gr.update(visible=task == "ip-adapter"),
            **{self.more[name]: gr.update(visible=task in tasks) for name, tasks in self._of_task.items()},
        }

    def _read(self, values: Values, browser: gr.Request) -> TrainConfig:
        """The config on the screen. Raises :class:`MahlstickError`."""
        session, task, name = values[self._session], values[self.task], (values[self.name] or "").strip()
        known = self._all_data(session)
        if values[self.data] not in known:
            raise MahlstickError(f"data: {say('tr_choose_data', browser)}")
        if not NAME.fullmatch(name):
            raise MahlstickError(f"name: {say('tr_no_name', browser)}")
        run = Run(self._history.results(session), name)
        if run in runs(run.folder) or run.out.exists():
            raise MahlstickError(f"name: {say('tr_taken', browser, name=name)}")
        offered = self._models.of(run.folder).bases
        if values[self.base] not in [meant for _, meant in offered]:
            raise MahlstickError(f"base: {values[self.base]} is not offered on this page")
        more = {
            field: values[component]
            for field, component in self.more.items()
            if values[component] not in (None, "") and task in self._of_task.get(field, _TASKS)
        }
        of_task: dict[str, Any] = {}
        if task == "controlnet":
            of_task = {"annotator": values[self.annotator], "control": _path(known, values[self.control])}
        if task == "ip-adapter":
            of_task = {"reference": _path(known, values[self.reference])}
        own = {"steps": values[self.steps], "batch": values[self.batch], "rate": values[self.rate] or None}
        own["resolution"] = values[self.resolution] or None
        fields = {**more, **of_task, **own, "annotator_options": _pairs(more.get("annotator_options", ""))}
        return TrainConfig(
            task=task, data=str(known[values[self.data]]), out=str(run.out), base=values[self.base], **fields
        )

    def _complain(self, error: MahlstickError, session: str, browser: gr.Request) -> Updates:
        """The fault as a sentence, beside the field that it is about."""
        sentence = str(error)
        field = found[1] if (found := re.match(r"(\w+):", sentence)) else ""
        known = self._all_data(session)
        for name, folder in sorted(known.items(), key=lambda each: -len(str(each[1]))):
            sentence = sentence.replace(str(folder), name)
        line = self.more_error if field in self.more else self.error
        line = self.name_error if field in ("name", "base") else self.data_error if field in _OF_DATA else line
        sentence = sentence.removeprefix(f"{field}: ") if field in ("name", *_OF_DATA) else sentence
        return {line: status.error(translated(sentence, browser))}

    # Runs.

    async def _start(self, values: Values, browser: gr.Request) -> Updates:
        session = values[self._session]
        clear: Updates = dict.fromkeys(self._errors, "")
        try:
            if any(run.is_live for run in runs(self._history.results(session))):
                raise MahlstickError(say("tr_at_once", browser))
            config = self._read(values, browser)
            try:
                await asyncio.to_thread(_check_data, config)
            except MahlstickError as error:
                raise MahlstickError(f"data: {error}") from error
            run = Run(self._history.results(session), Path(config.out).name)
            run.begin(config)
            self._submit(run, session)
        except MahlstickError as error:
            return {**clear, **self._complain(error, session, browser)}
        return {**clear, **self._view(session, run.name, browser)}

    def _submit(self, run: Run, session: str) -> None:
        """Raises :class:`MahlstickError` where the queue is full; the run can be begun again then."""
        run.wait()
        self._stopping.discard(run.out)
        try:
            job = self._jobs.submit(run.work(), f"{session}/training", is_training=True)
        except MahlstickError:
            run.leave()
            raise
        self._live[run.out] = job
        job.future.add_done_callback(lambda _: self._end(run, job))

    def _end(self, run: Run, job: Job) -> None:
        if self._live.get(run.out) is job:
            del self._live[run.out]
            self._stopping.discard(run.out)
            run.leave()
        if not job.future.cancelled() and (error := job.future.exception()) is not None:
            _log.info("the run %s ended: %r", run.name, error)

    def _stop(self, session: str, name: str, browser: gr.Request) -> Updates:
        run = self._find(session, name)
        if run is None:
            return {}
        if (job := self._live.get(run.out)) is None:
            run.stop()
        else:
            job.cancel()
            if run.state == "waiting":
                self._live.pop(run.out, None)  # it may have ended by itself in between
                run.leave()
                return self._view(session, name, browser)
            self._stopping.add(run.out)
        return self._view(session, name, browser)

    def _resume(self, session: str, name: str, browser: gr.Request) -> Updates:
        run = self._find(session, name)
        if run is None:
            return {}
        if any(other.is_live for other in runs(run.folder)):
            return {self.error: status.error(say("tr_at_once", browser))}
        try:
            self._submit(run, session)
        except MahlstickError as error:
            return {self.error: status.error(str(error))}
        return {self.error: "", **self._view(session, name, browser)}

    def _remove_run(self, session: str, name: str, browser: gr.Request) -> Updates:
        run = self._find(session, name)
        try:
            if run is not None:
                run.remove()
        except MahlstickError as error:
            return {self.error: status.error(str(error)), **self.remove_run.shown(False)}
        known = runs(self._history.results(session))
        if known:
            return self._view(session, known[0].name, browser)
        seen = [self.stop, self.resume, self.loss, self.fidelity, self.samples]
        nothing = dict.fromkeys(seen, gr.update(visible=False))
        shown = {**nothing, **self._show_result(None), **self.remove_run.shown(False), **self._offer(session)}
        return {**shown, self.status: "", self.run: gr.update(choices=[], value=None, visible=False)}

    def _find(self, session: str, name: str) -> Run | None:
        run = Run(self._history.results(session), name or "")
        return run if run in runs(run.folder) else None

    def _tick(self, session: str, name: str, browser: gr.Request) -> Updates:
        view = self._view(session, name, browser)
        return {component: update for component, update in view.items() if component is not self.run}

    def _view(self, session: str, name: str, browser: gr.Request) -> Updates:
        """A run as it stands."""
        known = runs(self._history.results(session))
        run = next((each for each in known if each.name == name), None)
        if run is None:
            return {self.run: gr.update(choices=[each.name for each in known], visible=bool(known))}
        state, total = run.state, run.config.steps
        live = state in ("waiting", "running")
        result = trained(run.folder).get(name) if state == "done" else None
        samples = run.samples()
        return {
            self.run: gr.update(choices=[each.name for each in known], value=name, visible=True),
            self.status: self._sentence(run, state, total, browser),
            self.stop: gr.update(visible=live),
            self.resume: gr.update(visible=state in ("stopped", "failed")),
            **self.remove_run.shown(not live),
            self.loss: _plot(run.losses()),
            self.fidelity: _plot(run.fidelities()),
            self.samples: gr.update(value=str(samples) if samples else None, visible=samples is not None),
            **self._show_result(result),
            self.timer: gr.Timer(active=live),
            **({} if live else self._offer(session)),
        }

    def _sentence(self, run: Run, state: str, total: int, browser: gr.Request) -> str:
        if state == "waiting":
            return status.bar(say("tr_waiting", browser))
        if state == "running" and run.out in self._stopping:
            return status.bar(say("tr_stopping", browser))
        if state == "running" and not run.step:
            return status.bar(run.estimate() or say("tr_preparing", browser))
        if state == "running":
            said = say("painting", browser, step=run.step, total=total)
            return status.bar(f"{said} · {run.estimate()}" if run.estimate() else said, run.step / total)
        if state == "failed":
            return status.error(say("tr_failed", browser, reason=translated(run.reason(), browser)))
        return status.note(say(f"tr_{state}", browser, step=run.step, total=total, name=run.name))

    def _show_result(self, result: Path | None) -> Updates:
        """The files of a result, and how to use it."""
        if result is None:
            return {each: gr.update(value=None, visible=False) for each in (self.result, *self.uses)}
        folder = result if result.is_dir() else result.parent
        files = sorted(str(path) for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".md"))
        lines = zip(self.uses, how_to_use(look(result), str(result)), strict=True)
        uses = {line: gr.update(value=text, visible=bool(text)) for line, text in lines}
        return {self.result: gr.update(value=files, visible=True), **uses}

    def _offer(self, session: str) -> Updates:
        """What a session may choose on other tabs: with what it has trained."""
        models = self._models.of(self._history.results(session))
        return {chooser: update for other in self._others for chooser, update in other.offer(models).items()}

    def enter(self, session: str, browser: gr.Request) -> Updates:
        """What a browser sees at first: the run that is at work, or the last one."""
        known = runs(self._history.results(session))
        shown = next((run for run in known if run.is_live), known[0] if known else None)
        view = self._view(session, shown.name, browser) if shown else {}
        # A number that begins as None is shown as 0, but one that becomes None as an empty field.
        return {**dict.fromkeys(self._open_numbers), **self._offer_data(session), **self._offer(session), **view}

    @property
    def _open_numbers(self) -> list[Any]:
        own = [self.rate, self.resolution, *self.more.values()]
        return [each for each in own if isinstance(each, gr.Number) and each.value is None]

    @property
    def entered(self) -> list[Any]:
        return [*self._open_numbers, *self._folders, *self._run_view]


def _check_data(config: TrainConfig) -> None:
    """Raises :class:`MahlstickError` where there is nothing to learn from."""
    from mahlstick.training.tasks import TASKS

    TASKS[config.task].read(config)


def _path(known: dict[str, Path], name: str) -> str | None:
    return str(known[name]) if name in known else None


def _pairs(text: str) -> dict[str, Any]:
    """``low=80, high=160`` as a dict. Raises :class:`MahlstickError`."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    found = {name.strip(): value.strip() for name, _, value in pairs}
    if any(not equals for _, equals, _ in pairs) or "model" in found:  # which would name a file of this machine
        raise MahlstickError("annotator_options: give NAME=VALUE, e.g. low=80, high=160")
    return {name: _number(value) for name, value in found.items()}


def _number(text: str) -> Any:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return {"true": True, "false": False}.get(text.lower(), text)


def _component(name: str, field: Any) -> Any:
    """The component for a field of a config; None for one that takes words, which may name a file."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else (field.annotation,)
    kind = next(each for each in kinds if each is not NoneType)
    shown: dict[str, Any] = {
        "label": name.replace("_", " "),
        "info": field.description,
        "visible": _TASKS[0] in _OF_TASK.get(name, _TASKS),
        "elem_id": f"tr-{name.replace('_', '-')}",
    }
    if kind is bool:
        return gr.Checkbox(field.default, **shown)
    if get_origin(kind) is Literal:
        choices = [*([("", "")] if field.default is None else []), *((each, each) for each in get_args(kind))]
        return gr.Dropdown(choices, value=field.default or "", **shown)
    if kind in (int, float):
        default = CHECKPOINT_EVERY if name == "checkpoint_every" else field.default
        return gr.Number(default, precision=0 if kind is int else None, placeholder=label("own"), **shown)
    return gr.Textbox("", max_lines=1, **shown) if get_origin(kind) is dict else None


def _plot(points: list[tuple[int, str, float]]) -> Any:
    frame = pd.DataFrame(points, columns=["step", "measure", "value"])
    frame["measure"] = frame["measure"].str.replace("_", " ")
    return gr.update(value=frame, visible=frame["step"].nunique() > 1)  # one point is no line
