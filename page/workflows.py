"""The tab on which workflows run: a form is made of a workflow's inputs."""

from __future__ import annotations

import hashlib
import html
import secrets
import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gradio as gr

from mahlstick.errors import MahlstickError
from mahlstick.nodes.files import whole
from mahlstick.nodes.folders import Folders, inside, using
from mahlstick.page import canvas, forms, parts, status
from mahlstick.page.endpoints import answer, endpoint
from mahlstick.page.faults import named, sentence
from mahlstick.page.forms import Entry, Group
from mahlstick.page.history import History
from mahlstick.page.jobs import Job, Jobs, Work
from mahlstick.page.making import Begun, Maker
from mahlstick.page.parts import QUIET, Updates, Values
from mahlstick.page.texts import label, say
from mahlstick.pictures import load_picture, save_png
from mahlstick.pipelines.load import embedded_folder
from mahlstick.pipelines.request import open_picture

CACHE = 256 << 20  # bytes of results kept in memory from one run to the next, of all sessions
SHOWN = 24  # results

_DROPPED = [".json", ".png", ".webp"]
_LOADED = ["image", "video", "audio", ".latent"]
_IN_GALLERY = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4", ".webm"}


class Workflows:
    """The tab's components and what they do."""

    def __init__(self, models: Path | None, jobs: Jobs, history: History, session: gr.BrowserState) -> None:
        """``models`` is a folder laid out as ComfyUI's, where workflows find models beside the embedded ones."""
        self._models, self._jobs, self._history, self._session = models, jobs, history, session
        self.workflow = gr.State(None)  # {"api", "name", "turn"}, which is another each time the form is to be new
        left, right = parts.columns()
        with left:
            self._lay_sources()
        with right:
            self._lay_result()
        gr.on([self.workflow.change], self._note_missing, [self.workflow, session], [self.error], **QUIET)
        self.drop.upload(self._take_drop, [self.drop, self.workflow], [*self._opened, self.drop], **QUIET)
        self.example.input(self._take_example, [self.example, session, self.workflow], self._opened, **QUIET)
        self.files.upload(self._take_files, [self.files, session, self.workflow], [self.workflow, self.files], **QUIET)

    # What is on the screen.

    def _lay_sources(self) -> None:
        self.drop = parts.drop_line("wf_drop", "wf-drop", file_types=_DROPPED)
        self.example = gr.Dropdown(
            [(name.replace("_", " "), name) for name in examples()],
            value=None,
            label=label("wf_example"),
            elem_id="wf-example",
        )
        self.error = parts.error_line()
        form = gr.Column(elem_id="wf-form")
        with gr.Accordion(label("wf_files"), open=False, elem_id="wf-files"):
            self.files = parts.drop_line("wf_files_hint", "wf-files-drop", file_types=_LOADED, file_count="multiple")
        with form:
            gr.render([self.workflow, self._session], [self.workflow.change], show_progress="hidden")(self._lay_form)

    def _lay_result(self) -> None:
        self.status = parts.status_line("wf-status")
        parts.invitation("wf_empty", "wf-empty")
        self.gallery = parts.gallery("result", "wf-gallery", visible=True)
        self.others = gr.File(label=label("wf_others"), file_count="multiple", interactive=False, visible=False)
        with gr.Accordion(label("wf_code"), open=False, elem_id="wf-code"):
            self.write = gr.Button(label("wf_write"), size="sm", elem_id="wf-write")
            self.code_error = parts.error_line()
            self.written = gr.File(
                label=label("wf_written"), file_count="multiple", interactive=False, visible=False, elem_id="wf-written"
            )

    @property
    def _opened(self) -> list[Any]:
        """What changes when another workflow comes."""
        return [self.workflow, self.error, self.code_error, self.written]

    def _lay_form(self, workflow: dict[str, Any] | None, session: str | None) -> None:
        """The form of a workflow's inputs, and all that uses them."""
        if workflow is None or session is None:
            return
        form = _Form(self, session)
        first, rest = forms.groups(workflow["api"], self._nodes)
        texts = [group for group in first if group.entries[0].is_long]
        for group in texts:
            form.lay(group)
        form.run, form.cancel = parts.actions("wf_run", "wf-run", "wf-cancel", working=True)
        with gr.Column(elem_classes="wf-late"):
            for group in first[len(texts) :]:
                form.lay(group)
            if rest:
                with gr.Accordion(label("wf_more"), open=not first):
                    for group in rest:
                        form.lay(group)
        entered = [*form.components.values(), self.workflow]
        form.wire_run(entered)
        self.write.click(self._writing(form), {*entered, self._session}, [self.written, *form.errors], **QUIET)

    def picture(self, session: str, name: str) -> Any:
        """A picture of the session's input folder on a canvas, or an empty one."""
        path = self._path(session, name)
        return canvas.value(load_picture(path, alpha=True)) if path is not None else None

    # Between workflows and the screen.

    @cached_property
    def _nodes(self) -> Mapping[str, Any]:
        from mahlstick.nodes.builtin import all_nodes

        return all_nodes()

    @cached_property
    def _cache(self) -> Any:
        from mahlstick.nodes.cache import MemoryCache

        return MemoryCache(CACHE)

    def _where(self, session: str) -> Folders:
        """A session's folders: nothing else can be read or written, but models."""
        root = self._history.folder(session) / "workflows"
        return Folders(self._models or root / "models", root / "input", root / "output", root / "temp")

    def _path(self, session: str, name: str) -> Path | None:
        """A picture that a workflow names, where it is there."""
        try:
            path = inside(self._where(session).input, name)
        except MahlstickError:
            return None
        return path if path.is_file() else None

    def _keep(self, session: str, value: Any) -> str:
        """Writes the picture of a canvas into the input folder, the same picture once; returns its name there."""
        background, paint = canvas.background(value), canvas.painted(value)
        picture = canvas.flattened(value) if paint is not None else background
        if picture is None:
            raise MahlstickError("picture: is missing; give one")
        return self._keep_picture(session, picture)

    def _keep_picture(self, session: str, picture: Any) -> str:
        name = f"{hashlib.sha256(f'{picture.mode}{picture.size}'.encode() + picture.tobytes()).hexdigest()[:12]}.png"
        path = self._where(session).input / name
        return name if path.is_file() else save_png(picture, path).name

    def _keep_file(self, session: str, path: Path) -> None:
        """Puts a file into the input folder under its own name, whole: a workflow may be reading the one before."""
        with whole(inside(self._where(session).input, path.name)) as unfinished:
            shutil.copyfile(path, unfinished)

    def changed(self, form: _Form, values: Values) -> Any:
        """The workflow with what is on the screen."""
        api = {node: {**step, "inputs": dict(step["inputs"])} for node, step in values[self.workflow]["api"].items()}
        for place, entry in form.entries.items():
            given = values[form.components[place]]
            if not _same(given, form.shown[place]):
                is_picture = entry.kind == "picture"
                value = self._keep(values[self._session], given) if is_picture else given
                api[entry.node]["inputs"][entry.name] = value
        return api

    # What happens.

    def _take_drop(self, path: str, before: dict[str, Any] | None, browser: gr.Request) -> Updates:
        from mahlstick.nodes.comfy.ui import read

        try:
            if Path(path).suffix.lower() not in _DROPPED:  # a script would be run
                raise MahlstickError(say("wf_kinds", browser))
            api = read(Path(path), self._nodes)
        except MahlstickError as error:
            return {self.error: named(error, path, browser), self.drop: None}
        return {**self._open(api, Path(path).stem, before), self.drop: None}

    def _take_example(self, name: str, session: str, before: dict[str, Any] | None) -> Updates:
        from mahlstick.nodes.comfy.ui import read

        api = read(examples()[name], self._nodes)
        for picture in (embedded_folder().parent / "examples").glob("*.png"):
            if any(picture.name in step["inputs"].values() for step in api.values()):
                self._keep_file(session, picture)
        return self._open(api, name, before)

    def _open(self, api: Any, name: str, before: dict[str, Any] | None) -> Updates:
        turn = before["turn"] + 1 if before else 0
        hidden = gr.update(value=None, visible=False)
        workflow = {"api": api, "name": name, "turn": turn}
        return {self.workflow: workflow, self.error: "", self.code_error: "", self.written: hidden}

    def _note_missing(self, workflow: dict[str, Any] | None, session: str, browser: gr.Request) -> str:
        """What the workflow needs and is not here, as a sentence."""
        if workflow is None:
            return ""
        api = workflow["api"]
        if names := forms.unknown(api, self._nodes):
            return status.error(say("wf_unknown", browser, names=", ".join(names)))
        fault = self.fault(api, session)
        if fault is None:
            return ""
        names = forms.absent_files(api, fault)
        return status.error(say("wf_missing", browser, names=", ".join(names)) if names else str(fault))

    def _take_files(self, paths: list[str], session: str, workflow: dict[str, Any] | None) -> Updates:
        """Puts files where workflows look for them, under their own names."""
        for path in paths:
            self._keep_file(session, Path(path))
        again = {self.workflow: {**workflow, "turn": workflow["turn"] + 1}} if workflow else {}
        return {**again, self.files: None}

    def fault(self, api: Any, session: str) -> Any:
        """Why the workflow will not run, if it will not."""
        with using(self._where(session)):
            return forms.faults(api, self._nodes)

    def begun(self, api: Any, session: str) -> Begun:
        """The work that runs a workflow."""
        progress = Progress(api, self._nodes)
        return Begun(self._work(api, self._where(session), progress), shown=progress.shown)

    def sentence(self, error: Exception, session: str, browser: gr.Request) -> str:
        """An error's, without the folders of the session."""
        if isinstance(error, MahlstickError):
            error = MahlstickError(str(error).replace(f"{self._history.folder(session)}/workflows/", ""))
        return sentence(error, browser)

    def _work(self, api: Any, where: Folders, progress: Progress) -> Work:
        """The work that runs a workflow, and returns the files that it saved and the words that it showed."""

        def work(job: Job, loader: Any, **device: Any) -> tuple[list[Path], str]:
            from mahlstick.nodes import runner
            from mahlstick.nodes.builtin import loaders

            progress.job = job
            try:
                with loaders.using(loaders.Keeping(loader, **device)):  # which has the bases of other tabs
                    outcome = runner.run(api, nodes=self._nodes, where=where, cache=self._cache, listen=progress)
            except Exception:
                job.tell(job.step, job.total)  # a node's failure may be that it was cancelled
                raise
            texts = [text for shown in outcome.ui.values() for text in shown.get("text", ()) if isinstance(text, str)]
            return runner.saved(outcome, where), "\n".join(texts)

        return work

    def results(self, session: str, files: list[Path]) -> Updates:
        """What was made, before what the session's workflows made until now."""
        output = self._where(session).output
        found = sorted(output.rglob("*"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        shown = [path for path in dict.fromkeys([*files, *found]) if path.suffix.lower() in _IN_GALLERY][:SHOWN]
        others = [str(path) for path in files if path.suffix.lower() not in _IN_GALLERY]
        return {
            self.gallery: gr.update(value=[str(path) for path in shown], selected_index=0 if shown else None),
            self.others: gr.update(value=others or None, visible=bool(others)),
        }

    def _writing(self, form: _Form) -> Callable[..., Updates]:
        def write(values: Values, browser: gr.Request) -> Updates:
            from mahlstick.nodes import runner

            session, name = values[self._session], values[self.workflow]["name"]
            folder = self._history.folder(session) / "workflows" / "code" / secrets.token_hex(4)
            try:
                api = self.changed(form, values)
                targets = [(f"{name}.json", "ui"), (f"{name}-api.json", "api"), (f"{name}.py", "api")]
                paths = [runner.write(api, folder / file, form, self._nodes) for file, form in targets]  # type: ignore[arg-type]
            except MahlstickError as error:
                return {self.code_error: status.error(self.sentence(error, session, browser))}
            return {self.written: gr.update(value=[str(path) for path in paths], visible=True), self.code_error: ""}

        return write

    @endpoint
    async def run_workflow(self, workflow: dict[str, Any], changes: dict[str, Any] | None) -> list[str]:
        """Runs a workflow and returns the files that it saved.

        ``workflow`` is JSON in either of ComfyUI's forms, not the name of a file. ``changes`` are values of inputs by
        "title.input" or "id.input", as ``mahlstick run --set`` takes them, or null; pictures are ``data:`` URLs.
        """
        from mahlstick.nodes import runner

        session = History.new_session()
        if not isinstance(workflow, dict):  # it would be taken for a file of this machine, and a script be run
            raise MahlstickError("workflow: is no JSON object; give the JSON itself, as ComfyUI saved it")
        if not isinstance(changes, dict | None):
            raise MahlstickError('changes: are no JSON object; give values by "title.input", or null')
        kept = {place: self._from_outside(session, value) for place, value in (changes or {}).items()}
        api = runner.with_changes(runner.load(workflow, self._nodes), kept, self._nodes)
        files, _ = await answer(self._jobs, self.begun(api, session).work)
        return [str(path) for path in files]

    def _from_outside(self, session: str, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("data:image/"):
            return self._keep_picture(session, open_picture(value, "picture", alpha=True))
        return value

    def enter(self, session: str) -> Updates:
        """What a browser sees at first: what its session's workflows made."""
        return self.results(session, [])

    @property
    def entered(self) -> list[Any]:
        return [self.gallery, self.others]


class _Form(Maker):
    """The components for the entries of a workflow, by ``node.input``, and what runs it."""

    kind = "workflows"

    def __init__(self, tab: Workflows, session: str) -> None:
        super().__init__(tab._jobs, tab._history, tab._session)
        self._tab, self._of = tab, session
        self.status = tab.status
        self.entries: dict[str, Entry] = {}
        self.components: dict[str, Any] = {}
        self.shown: dict[str, Any] = {}
        self.lines: dict[str, gr.HTML] = {}  # by node

    @property
    def errors(self) -> list[gr.HTML]:
        return [*self.lines.values(), self._tab.error, self._tab.code_error]

    @property
    def result(self) -> list[Any]:
        return self._tab.entered

    def begin(self, values: Values, session: str, browser: gr.Request) -> Begun:
        api = self._tab.changed(self, values)
        if (fault := self._tab.fault(api, session)) is not None:
            raise _Refused(str(fault), forms.complaints(api, fault))
        return self._tab.begun(api, session)

    def made(self, found: tuple[list[Path], str], values: Values, session: str, browser: gr.Request) -> Updates:
        files, words = found
        return {self.status: status.note(words) if words else "", **self._tab.results(session, files)}

    def complain(self, error: Exception, values: Values, browser: gr.Request) -> Updates:
        said = error.complaints.items() if isinstance(error, _Refused) else ()
        beside: Updates = {self.lines[node]: status.error(each) for node, each in said if node in self.lines}
        told = status.error(self._tab.sentence(error, values[self._session], browser))
        return beside or {self._tab.error: told}

    def lay(self, group: Group) -> None:
        """The entries of a node: large ones below each other, small ones side by side."""
        large = [entry for entry in group.entries if entry.is_long or entry.kind == "picture"]
        small = [entry for entry in group.entries if entry not in large]
        alone = len(group.entries) == 1 and group.entries[0].kind != "picture"
        with gr.Column(elem_classes="wf-node"):
            if not alone:
                gr.HTML(f"<h3>{html.escape(group.title)}</h3>", padding=False)
            self.lines.setdefault(group.node, parts.error_line())
            for entry in large:
                self._add(entry, group.title if alone else _words(entry.name))
            if small:
                with gr.Row():
                    for entry in small:
                        self._add(entry, f"{group.title}: {_words(entry.name)}" if alone else _words(entry.name))

    def _add(self, entry: Entry, name: str) -> None:
        place = f"{entry.node}.{entry.name}"
        component, shown = self._component(entry, name)
        self.entries[place], self.components[place], self.shown[place] = entry, component, shown

    def _component(self, entry: Entry, name: str) -> tuple[Any, Any]:
        """The component for an entry, and what it shows."""
        value = entry.value
        if entry.kind == "picture":
            drawing = canvas.drawing(label("wf_picture"))
            drawing.value = self._tab.picture(self._of, value) if isinstance(value, str) else None
            return drawing, drawing.value
        if entry.kind == "choice":
            choices = list(entry.input.choices or ())
            shown = value if value in choices else None
            return gr.Dropdown(choices, value=shown, label=name, interactive=True, min_width=150), shown
        if entry.kind == "switch":
            return gr.Checkbox(bool(value), label=name, interactive=True, min_width=150), bool(value)
        if entry.kind == "number":
            return self._number(entry, name)
        lines = 3 if entry.is_long else 1
        text = gr.Textbox(str(value), label=name, lines=lines, max_lines=12, interactive=True, min_width=150)
        return text, str(value)

    def _number(self, entry: Entry, name: str) -> tuple[gr.Number, Any]:
        shown = entry.value if isinstance(entry.value, int | float) else None
        whole = entry.input.type == "INT"
        fields: dict[str, Any] = {"label": name, "precision": 0 if whole else None, "interactive": True}
        if not entry.is_seed:
            step = entry.input.options.get("step", 1 if whole else 0.01)
            return gr.Number(shown, step=step, min_width=110, **fields), shown
        with gr.Row(elem_classes="wf-seed"):
            number = gr.Number(shown, min_width=110, **fields)
            dice = gr.Button(label("dice"), size="sm", min_width=80, scale=0)
        dice.click(lambda: secrets.randbelow(2**32), None, number, **QUIET)
        return number, shown


class _Refused(MahlstickError):
    """A workflow that will not run, and what is wrong with each node."""

    def __init__(self, sentence: str, complaints: dict[str, str]) -> None:
        super().__init__(sentence)
        self.complaints = complaints


class Progress:
    """Hears what a run tells of its nodes, and tells its job."""

    def __init__(self, api: Mapping[str, Any], nodes: Mapping[str, Any]) -> None:
        self.job: Job | None = None
        self._names = forms.titles(api, nodes)
        self._done = 0
        self._node = ""
        self._steps = (0, 0)

    def __call__(self, event: str, data: Mapping[str, Any]) -> None:
        assert self.job is not None
        if event == "execution_cached":
            self._done = len(data["nodes"])
        elif event == "executing":
            self._done += bool(self._node)
            self._node, self._steps = data["display_node"], (0, 0)
        elif event == "progress":
            self._steps = data["value"], data["max"]
        self.job.tell(min(self._done, len(self._names)), len(self._names), data.get("image"))

    def shown(self, job: Job, browser: gr.Request | None) -> str:
        """Where the run stands: the node, and its step."""
        if not self._node:
            return status.bar(say("loading", browser))
        total, (step, steps) = len(self._names), self._steps
        name = self._names.get(self._node, self._node)
        sentence = say("wf_node", browser, node=name, number=min(self._done + 1, total), total=total)
        sentence += f" · {say('painting', browser, step=step, total=steps)}" if steps else ""
        return status.bar(sentence, min(1.0, (self._done + (step / steps if steps else 0)) / total), job.preview)


def examples() -> dict[str, Path]:
    """The workflows that come with mahlstick, by name."""
    return {path.stem: path for path in sorted((embedded_folder().parent / "workflows").glob("*.json"))}


def _words(name: str) -> str:
    return name.replace("_", " ")


def _same(given: Any, shown: Any) -> bool:
    """Whether a value is as it was shown. A browser has no whole numbers beyond 2**53."""
    if isinstance(given, int | float) and isinstance(shown, int | float):
        return float(given) == float(shown)
    return bool(given == shown)
