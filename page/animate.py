"""The tab on which clips are made."""

from __future__ import annotations

import html
import json
import re
from itertools import islice
from pathlib import Path
from typing import Any, cast

import gradio as gr
from PIL import Image

from mahlstick import annotators
from mahlstick.errors import MahlstickError
from mahlstick.page import parts, status
from mahlstick.page.endpoints import answer, as_fields, endpoint
from mahlstick.page.faults import named, sentence
from mahlstick.page.history import History
from mahlstick.page.jobs import Job, Jobs, Work, forming
from mahlstick.page.making import Begun, Maker
from mahlstick.page.models import Models
from mahlstick.page.parts import QUIET, Updates, Values
from mahlstick.page.texts import label, say
from mahlstick.page.units import UnitFault
from mahlstick.pipelines.animate import FPS, animate
from mahlstick.pipelines.load import Loader
from mahlstick.pipelines.request import ClipControlSpec, VideoRequest
from mahlstick.pipelines.sheet import strip
from mahlstick.pipelines.video import is_video, iterate_video, video_comment, video_info

FRAMES = 512  # of a clip
KIND = "clips"  # the folder in a session's
SHOWN = 8  # frames of a strip
SIDE = 384  # pixels of a frame that is looked at before the work
FORMATS = ("mp4", "gif", "webp")

_COLONS = re.compile("[:\uff1a]")  # the other is the one that Chinese keyboards write
_VIDEOS = ["video", ".gif", ".webp"]
# Fields of a request that name something on this machine and have no place on the page.
_ELSEWHERE = ("base_config", "motion_loras", "image_prompts")


class Animate(Maker):
    """The tab's components and what they do."""

    kind = KIND

    def __init__(self, models: Models, jobs: Jobs, history: History, session: gr.BrowserState, tab: gr.Tab) -> None:
        """``tab`` is the one around this; it is seen where there is a motion module to choose."""
        super().__init__(jobs, history, session)
        self._models, self._tab = models, tab
        left, right = parts.columns()
        with left:
            self._lay_prompt()
            self._lay_settings()
            self._lay_control()
            self._lay_init()
        with right:
            self._lay_result()
        self._wire()

    # What is on the screen.

    def _lay_prompt(self) -> None:
        with gr.Group():
            self.prompt, self.negative = parts.prompts("an-")
            self.travel = gr.Textbox(
                label=label("an_travel"),
                placeholder=label("an_travel_hint"),
                lines=2,
                max_lines=12,
                elem_id="an-travel",
            )
        self.travel_error = parts.error_line()
        self.error = parts.error_line()
        self.run, self.cancel = parts.actions("an_run", "an-run", "an-cancel")

    def _lay_settings(self) -> None:
        with gr.Accordion(label("settings"), open=True, elem_id="an-settings"):
            with gr.Row():
                self.model = gr.Dropdown(self._models.bases, value="embedded", label=label("model"), min_width=140)
                first = self._models.motions[0][1] if self._models.motions else None
                self.motion = gr.Dropdown(
                    self._models.motions, value=first, label=label("an_motion"), min_width=140, elem_id="an-motion"
                )
            with gr.Row():
                self.frames = parts.open_number("an_frames", placeholder="16", elem_id="an-frames")
                self.fps = parts.open_number("an_fps", whole=False, placeholder="8")
                self.format = gr.Dropdown(list(FORMATS), value="mp4", label=label("an_format"), min_width=100)
            self.steps = gr.Slider(1, 100, 20, step=1, label=label("steps"), elem_id="an-steps", buttons=[])
            self.motion_scale = gr.Slider(0, 2, 1.0, step=0.05, label=label("an_motion_scale"), buttons=[])
            with gr.Row():
                self.width, self.height = parts.open_number("width"), parts.open_number("height")
                self.guidance = parts.open_number("guidance", whole=False)
            with gr.Row():
                self.sampler = parts.sampler()
                self.seed = parts.open_number("seed", placeholder=label("seed_hint"), min_width=120)
            with gr.Accordion(label("an_context"), open=False):
                self.context_error = parts.error_line()
                with gr.Row():
                    self.context, self.overlap = parts.open_number("an_length"), parts.open_number("an_overlap")

    def _lay_control(self) -> None:
        with gr.Accordion(label("an_control"), open=False, elem_id="an-control") as self.control_section:
            self.control_error = parts.error_line()
            self.control = _video_file("an-control-file")
            with gr.Row():
                first = self._models.nets[0][1] if self._models.nets else None
                self.net = gr.Dropdown(self._models.nets, value=first, label=label("net"), min_width=140)
                self.annotator = parts.annotator(first)
            self.seen = parts.picture("seen")
            self.control_scale, self.control_start, self.control_end = parts.dose()

    def _lay_init(self) -> None:
        with gr.Accordion(label("an_init"), open=False, elem_id="an-init") as self.init_section:
            self.init_error = parts.error_line()
            self.init = _video_file("an-init-file")
            self.init_seen = parts.picture("an_init_seen")
            self.strength = gr.Slider(0.05, 1.0, 0.8, step=0.05, label=label("strength"), buttons=[])

    def _lay_result(self) -> None:
        self.status = parts.status_line("an-status")
        self.empty, _ = parts.invitation("an_empty", "an-empty")
        shown: dict[str, Any] = {"label": label("an_clip"), "visible": False, "interactive": False}
        self.video = gr.Video(autoplay=True, loop=True, height=420, buttons=["download"], elem_id="an-video", **shown)
        self.picture = gr.Image(
            type="filepath",
            alt_text="the clip",
            height=420,
            buttons=["download", "fullscreen"],
            elem_id="an-picture",
            **shown,
        )
        self.strip = parts.picture("an_strip")
        self.figures = gr.HTML("", elem_id="an-figures", padding=False)
        self.clips = gr.Dropdown([], label=label("an_clips"), visible=False, elem_id="an-clips")
        self.restore = gr.Button(label("restore"), size="sm", visible=False, elem_id="an-restore")
        self.drop = parts.drop_line("an_drop", "an-drop", file_types=_VIDEOS)
        self.drop_error = parts.error_line()

    @property
    def fields(self) -> list[Any]:
        return [
            self.prompt, self.negative, self.travel, self.model, self.motion, self.motion_scale, self.steps,
            *self._numbers, self.sampler, self.format, self.control, self.net, self.annotator, self.control_scale,
            self.control_start, self.control_end, self.init, self.strength,
        ]  # fmt: skip

    @property
    def _numbers(self) -> list[Any]:
        size = [self.width, self.height]
        return [self.frames, self.fps, *size, self.guidance, self.seed, self.context, self.overlap]

    @property
    def errors(self) -> list[Any]:
        beside = [self.travel_error, self.context_error, self.control_error, self.init_error]
        return [self.error, *beside, self.drop_error]

    @property
    def result(self) -> list[Any]:
        shown = [self.video, self.picture, self.strip, self.figures, self.clips, self.restore]
        return [*shown, self.cancel, self.empty]

    # Between the screen and a request.

    def read(self, values: Values) -> VideoRequest:
        """The request that is on the screen, its videos kept. Raises :class:`MahlstickError`."""
        init = self._kept(values[self.init])
        followed = self._kept(values[self.control])
        given = {
            "frames": values[self.frames],
            "fps": values[self.fps],
            "init": init,
            "strength": values[self.strength] if init else None,
            "controls": [self._read_control(values, followed)] if followed else [],
        }
        return VideoRequest(
            prompt=values[self.prompt] or "",
            negative_prompt=values[self.negative] or "",
            prompts=self._read_travel(values),
            base=values[self.model],
            motion=values[self.motion] or "",
            motion_scale=values[self.motion_scale],
            steps=values[self.steps],
            width=values[self.width] or None,
            height=values[self.height] or None,
            guidance=values[self.guidance],
            scheduler=values[self.sampler] or None,
            seed=values[self.seed],
            context=values[self.context],
            overlap=values[self.overlap],
            **given,
        )

    def _kept(self, path: str | None) -> str | None:
        return str(self._history.keep_video(Path(path))) if path else None

    def _read_travel(self, values: Values) -> dict[int, str]:
        try:
            return travel(values[self.travel] or "")
        except MahlstickError as error:
            raise UnitFault(str(error), self.travel_error) from error

    def _read_control(self, values: Values, followed: str) -> dict[str, Any]:
        return {
            "adapter": values[self.net] or "",
            "image": followed,
            "annotator": values[self.annotator] or None,
            "scale": values[self.control_scale],
            "start": values[self.control_start],
            "end": values[self.control_end],
        }

    def write(self, request: VideoRequest, offered: Models) -> Updates:
        """The request on the screen, but for what :meth:`lost` names."""
        control = request.controls[0] if self._shows_control(request, offered) else None
        init = request.init if self._is_kept(request.init) else None
        chosen = {self.model: request.base, self.motion: request.motion}
        chosen |= {self.net: control.adapter} if control else {}
        choices = {each: update for each, update in self.offer(offered).items() if each in chosen}
        return {
            **{each: update | {"value": chosen[each]} for each, update in choices.items()},
            self.prompt: request.prompt,
            self.negative: request.negative_prompt,
            self.travel: "\n".join(f"{frame}: {words}" for frame, words in sorted(request.prompts.items())),
            self.motion_scale: parts.slide(request.motion_scale, 0, 2),
            self.steps: parts.slide(request.steps, 1, 100),
            self.frames: request.frames,
            self.fps: request.fps,
            self.width: request.width,
            self.height: request.height,
            self.guidance: request.guidance,
            self.seed: request.seed,
            self.context: request.context,
            self.overlap: request.overlap,
            self.sampler: request.scheduler or "",
            self.init: init,
            self.init_section: gr.update(open=init is not None),
            self.strength: request.effective_strength,
            self.control: control.image if control else None,
            self.control_section: gr.update(open=control is not None),
            **(self._write_control(control) if control else {}),
        }

    def _write_control(self, control: ClipControlSpec) -> Updates:
        return {
            self.annotator: control.annotator or "",
            self.control_scale: parts.slide(cast(float, control.scale), 0, 2),
            self.control_start: control.start,
            self.control_end: control.end,
        }

    def lost(self, request: VideoRequest, offered: Models) -> list[str]:
        """Fields of a request that :meth:`write` cannot show."""
        shown = set(VideoRequest.model_fields) - {"schedule", "extend", "norm", "free_noise", "free_init", *_ELSEWHERE}
        given = request.model_dump(exclude_defaults=True, exclude=shown)
        lost = [*given]
        lost += ["init"] if request.init is not None and not self._is_kept(request.init) else []
        lost += ["audio"] if request.audio not in (None, request.init) else []
        return [*lost, *(["controls"] if request.controls and not self._shows_control(request, offered) else [])]

    def _shows_control(self, request: VideoRequest, offered: Models) -> bool:
        if len(request.controls) != 1:
            return False
        (spec,) = request.controls
        plain = spec.mask is None and spec.at is None and spec.window == "steps" and not isinstance(spec.scale, list)
        known = spec.adapter in [meant for _, meant in offered.nets]
        return plain and known and spec.mode == "balanced" and not spec.options and self._is_kept(spec.image)

    def _is_kept(self, source: Any) -> bool:
        """Whether it is a video that the page may read: a file from elsewhere could name any file of this machine."""
        return isinstance(source, str) and Path(source).parent == self._history.videos and Path(source).is_file()

    # What happens.

    def _wire(self) -> None:
        self.wire_run(self.fields)
        self._tab.select(self._open, [self._session, self.motion], self.choosers, **QUIET)
        self.clips.input(self._show, [self._session, self.clips], self.result, **QUIET)
        sections = [self.control_section, self.init_section]
        screen = [*self.fields, *sections, self.seen, self.init_seen, self.status, *self.errors]
        self.restore.click(self._restore_chosen, [self._session, self.clips], screen, **QUIET)
        self.drop.upload(self._restore_file, [self.drop, self._session], [*screen, self.drop], **QUIET)
        followed = [self.control, self.annotator]
        gr.on(
            [self.control.change, self.annotator.input],
            self._see,
            followed,
            [self.seen, self.control_error],
            trigger_mode="always_last",
            **QUIET,
        )
        self.init.change(self._see_init, [self.init], [self.init_seen, self.init_error], **QUIET)

    @property
    def choosers(self) -> list[Any]:
        """What changes with the models that there are; without a motion module the tab is not seen."""
        return [self._tab, self.model, self.motion, self.net]

    def offer(self, models: Models) -> Updates:
        """What there is to choose from."""
        lists = (models.bases, models.motions, models.nets)
        shown: Updates = {each: gr.update(choices=list_) for each, list_ in zip(self.choosers[1:], lists, strict=True)}
        return {**shown, self._tab: gr.update(visible=bool(models.motions))}

    def _open(self, session: str | None, chosen: str | None) -> Updates:
        """What a session finds when it opens the tab: one of the motion modules is chosen."""
        models = self.offered(self._models, session)
        first = models.motions[0][1] if models.motions else None
        return {**self.offer(models), self.motion: gr.update(choices=models.motions, value=chosen or first)}

    def begin(self, values: Values, session: str, browser: gr.Request) -> Begun:
        if not (values[self.prompt] or "").strip():
            raise MahlstickError(say("no_prompt", browser))
        request = _limited(self.read(values))
        self.offered(self._models, session).check(request)
        return Begun(clip(request, self._history, session, values[self.format]))

    def working(self, values: Values, browser: gr.Request) -> Updates:
        return self._faces(None, working=True)

    def made(self, found: Path, values: Values, session: str, browser: gr.Request) -> Updates:
        return self._show(session, found.name, browser)

    def left(self, values: Values, session: str, browser: gr.Request) -> Updates:
        return self._show(session, None, browser)

    @endpoint
    async def animate(self, request: dict[str, Any], init: str | None, control: str | None, format: str) -> str:
        """Makes the clip of a request and returns its file.

        ``request`` holds the fields of mahlstick.VideoRequest as JSON; pictures in it are ``data:`` URLs. ``init`` is a
        video to repaint and ``control`` one that controls[0] follows, each a file or null. ``format`` is mp4, gif or
        webp.
        """
        wanted = VideoRequest(**_with_videos(as_fields(request, "request"), self._kept(init), self._kept(control)))
        if elsewhere := [name for name in (*_ELSEWHERE, "audio") if getattr(wanted, name)]:
            raise MahlstickError(f"{elsewhere[0]}: is not for this page; leave it out")
        if format not in FORMATS:
            raise MahlstickError(f"format: {format} is not known; give one of {', '.join(FORMATS)}")
        self._models.check(wanted)
        return str(await answer(self._jobs, clip(_limited(wanted), self._history, History.new_session(), format)))

    def enter(self, session: str | None, browser: gr.Request) -> Updates:
        """What a browser sees at first: its session's newest clip."""
        # A number that begins as None is shown as 0, but one that becomes None as an empty field.
        return {**dict.fromkeys(self._numbers), **self._show(session or "", None, browser)}

    @property
    def entered(self) -> list[Any]:
        return [*self._numbers, *self.result]

    def _show(self, session: str, name: str | None, browser: gr.Request) -> Updates:
        """A clip of the session, the newest where none is named."""
        clips = self._history.others(session, KIND)
        chosen = next((path for path in clips if path.name == name), clips[0] if clips else None)
        choices = [(_title(path), path.name) for path in clips]
        faces = self._faces(chosen)
        faces[self.clips] = gr.update(
            choices=choices, value=chosen.name if chosen else None, visible=faces[self.clips]["visible"]
        )
        return {**faces, self.figures: _figures(chosen, browser) if chosen else ""}

    def _faces(self, chosen: Path | None, working: bool = False) -> Updates:
        """What is visible, while a clip is made and otherwise."""
        is_video = chosen is not None and chosen.suffix == ".mp4"
        shown = {self.video: chosen if is_video else None, self.picture: None if is_video else chosen}
        players = {
            each: gr.update(value=str(path) if path else None, visible=path is not None) for each, path in shown.items()
        }
        frames = strip(_frames(chosen, SHOWN)) if chosen is not None else None
        return {
            **players,
            self.strip: gr.update(value=frames, visible=frames is not None),
            self.figures: "",
            self.cancel: gr.update(visible=working),
            self.empty: gr.update(visible=not working and chosen is None),
            **{each: gr.update(visible=chosen is not None) for each in (self.clips, self.restore)},
        }

    def complain(self, error: Exception, values: Values, browser: gr.Request) -> Updates:
        told = str(error)
        lines: list[gr.HTML] = []
        for field, line in ((self.init, self.init_error), (self.control, self.control_error)):
            path, kept = values[field], self._kept(values[field])
            if kept and kept in told:
                told = told.replace(kept, Path(path).name)
                lines.append(line)
        beside = {
            ("prompts",): self.travel_error,
            ("context", "overlap"): self.context_error,
            ("controls",): self.control_error,
            ("init", "strength", "audio"): self.init_error,
        }
        lines += [line for names, line in beside.items() if told.startswith(names)]
        line = error.line if isinstance(error, UnitFault) else next(iter(lines), self.error)
        shown = MahlstickError(told) if isinstance(error, MahlstickError) else error
        return {line: status.error(sentence(shown, browser))}

    def _see(self, path: str | None, annotator: str, browser: gr.Request) -> tuple[Any, str]:
        """What the net will see of a video."""
        try:
            frames = _frames(Path(path), 4, early=True) if path else []
            seen = [annotators.annotate(annotator, frame) if annotator else frame for frame in frames]
            return gr.update(value=strip(seen) if seen else None, visible=bool(seen)), ""
        except MahlstickError as error:
            return gr.update(value=None, visible=False), named(error, path, browser)

    def _see_init(self, path: str | None, browser: gr.Request) -> tuple[Any, str]:
        return self._see(path, "", browser)

    def _restore_chosen(self, session: str, name: str, browser: gr.Request) -> Updates:
        return self._restored(self._history.folder(session) / KIND / Path(name).name, session, browser)

    def _restore_file(self, path: str, session: str | None, browser: gr.Request) -> Updates:
        return {**self._restored(Path(path), session, browser), self.drop: None}

    def _restored(self, path: Path, session: str | None, browser: gr.Request) -> Updates:
        cleared: Updates = dict.fromkeys(self.errors, "")
        try:
            request = clip_request(path)
            bare = request.model_copy(update={"controls": [], "image_prompts": []})
            offered = self.offered(self._models, session)
            offered.check(bare)
            lost = self.lost(request, offered)
            told = say("restored_without", browser, names=", ".join(lost)) if lost else say("an_restored", browser)
            format = {self.format: path.suffix[1:]} if path.suffix[1:] in FORMATS else {}
            return {**cleared, **self.write(request, offered), **format, self.status: status.note(told)}
        except MahlstickError as error:
            return {**cleared, self.drop_error: named(error, path, browser)}


def travel(text: str) -> dict[int, str]:
    """Frame → prompt from lines such as ``16: a fox in winter``. Raises :class:`MahlstickError`."""
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        frame, *words = _COLONS.split(line, maxsplit=1)
        if not (frame.strip().isdecimal() and words and words[0].strip()):
            raise MahlstickError(
                f"prompt travel, line {number}: {line.strip()!r} is no change of words; write a frame and what is"
                " there, such as 16: a fox in winter"
            )
        found[int(frame)] = words[0].strip()
    return found


def clip(request: VideoRequest, history: History, session: str, format: str) -> Work:
    """The work that makes a clip and returns its file."""

    def work(job: Job, loader: Loader, **where: Any) -> Path:
        def on_step(pipe: Any, i: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            latents = state["latents"]
            some = [forming(pipe, latents[k : k + 1]) for k in _spread(len(latents), SHOWN)]
            job.tell(i + 1, pipe.num_timesteps, strip(some))
            return state

        path = history.next(session, KIND, f".{format}")
        made = animate(request, path, loader=loader, progress=False, callback=on_step, **where)
        _figures_file(path).write_text(json.dumps(made.figures.to_dict()), encoding="utf-8")
        return path

    return work


def clip_request(path: Path) -> VideoRequest:
    """The request that a clip carries. Raises :class:`MahlstickError` where there is none."""
    comment = video_comment(path)
    if not (comment or "").startswith("{"):
        raise MahlstickError(
            f"{path}: holds no recipe; only a clip that mahlstick made, and nothing edited since, has one"
        )
    return VideoRequest.from_json(cast(str, comment))


def _video_file(elem_id: str) -> gr.File:
    return parts.drop_line("an_file", elem_id, ["video-file"], file_types=_VIDEOS)


def _limited(request: VideoRequest) -> VideoRequest:
    """Raises :class:`MahlstickError` where the clip would be longer than the page allows."""
    source = request.init or (request.controls[0].image if request.controls else None)
    count = request.frames
    if count is None and is_video(source):
        info = video_info(source)
        count = info.frames_at(request.fps or (float(info.fps) if info.fps else FPS))
    if count is not None and count > FRAMES:
        raise MahlstickError(f"frames: {count} are too many here; ask for at most {FRAMES}")
    return request


def _with_videos(request: dict[str, Any], init: str | None, control: str | None) -> dict[str, Any]:
    fields = request | ({"init": init} if init else {})
    if control is None:
        return fields
    controls = fields.get("controls") or [{"adapter": "lineart"}]
    if not (isinstance(controls, list) and isinstance(controls[0], dict)):
        return fields  # which the request will refuse
    return fields | {"controls": [controls[0] | {"image": control}, *controls[1:]]}


def _frames(path: Path, count: int, early: bool = False) -> list[Image.Image]:
    """Frames of a clip, small: the first ones, or else ones from all of it."""
    wanted = range(count) if early else _spread(video_info(path).frames or count, count)
    found = []
    for i, frame in enumerate(islice(iterate_video(path), wanted[-1] + 1)):
        if i in wanted:
            frame.thumbnail((SIDE, SIDE))
            found.append(frame)
    return found


def _spread(frames: int, count: int) -> list[int]:
    """At most ``count`` frames, from the first to the last."""
    return sorted({round(i * (frames - 1) / max(count - 1, 1)) for i in range(count)})


def _title(path: Path) -> str:
    """A clip's number and the beginning of its prompt."""
    try:
        words = " ".join(clip_request(path).prompt.split())
    except MahlstickError:
        words = ""
    return f"{path.stem} · {words[:60]}"


def _figures_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _figures(path: Path, browser: gr.Request) -> str:
    """How a clip came out, with what each figure says."""
    try:
        figures: dict[str, float | None] = json.loads(_figures_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    parts = [
        f"<div><dt>{html.escape(say(f'an_{name}_figure', browser))}</dt><dd>{value:.3f}</dd></div>"
        for name, value in figures.items()
        if value is not None
    ]
    return f"<dl>{''.join(parts)}</dl>"
