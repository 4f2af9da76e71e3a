"""The page as a whole, and its server."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from mahlstick.errors import MahlstickError
from mahlstick.page import canvas
from mahlstick.page.animate import Animate
from mahlstick.page.compare import Compare
from mahlstick.page.create import Create
from mahlstick.page.history import History
from mahlstick.page.jobs import Jobs
from mahlstick.page.limits import BodyLimit
from mahlstick.page.models import Models
from mahlstick.page.parts import QUIET
from mahlstick.page.texts import label, translations
from mahlstick.page.train import Train
from mahlstick.page.weights import Inspect
from mahlstick.page.workflows import Workflows

PORT = 7860
FILE_LIMIT = "32mb"

_STYLE = Path(__file__).with_name("style.css")
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
# Burnt sienna, from a wash to the bare pigment.
_SIENNA = gr.themes.Color(
    "#fbf4f0", "#f6e6dd", "#ecccba", "#dfab90", "#cf8562", "#bb6641", "#9c4f2e", "#803f25", "#663320", "#4f291b",
    "#331810",
)  # fmt: skip
_KEYS = """
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    document.activeElement?.blur();  // so that a number being typed counts
    const runs = [...document.querySelectorAll("#paint, #cmp-run, #an-run, #wf-run")];  // of the tab that is open
    setTimeout(() => runs.find(button => button.checkVisibility())?.click(), 50);
  }
});
"""
_THEME = "() => { document.body.classList.toggle('dark'); }"


def build(
    models: str | Path | None = None,
    out: str | Path = "out",
    device: str | None = None,
    dtype: str | None = None,
    data: str | Path | None = None,
    library: str | Path | None = None,
) -> gr.Blocks:
    """The page.

    Args:
        models: a folder with base models and adapters to choose from, beside the embedded ones.
        out: the folder for the pictures of all sessions.
        device: left open, the best there is.
        dtype: left open, what suits the device.
        data: a folder of whose folders adapters may be trained.
        library: a file with pictures that words find, to be references of image prompts.
    """
    folder = _folder(models, "--models", "give one with base models and adapters")
    examples = _folder(data, "--data", "give one with folders of pictures")
    jobs = Jobs(device, dtype)
    history = History(Path(out).expanduser().resolve() / "sessions")
    with gr.Blocks(title="mahlstick", analytics_enabled=False, fill_width=True) as page:
        session = gr.BrowserState(None, storage_key="mahlstick-session", secret="mahlstick")
        with gr.Row(elem_id="head"):
            gr.Markdown("# mahlstick", elem_id="name")
            gr.Markdown(label("tagline"), elem_id="tagline")
            gr.Button(label("theme"), size="sm", elem_id="theme", elem_classes="quiet", scale=0, min_width=110).click(
                None, None, None, js=_THEME
            )
        offered = Models(folder, library=_file(library))
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab(label("create"), id="create"):
                create = Create(offered, jobs, history, session)
            with gr.Tab(label("compare"), id="compare") as compare_tab:
                compare = Compare(create, offered, jobs, history, session, compare_tab)
            with gr.Tab(label("animate"), id="animate", visible=bool(offered.motions)) as animate_tab:
                animate = Animate(offered, jobs, history, session, animate_tab)
            with gr.Tab(label("workflows"), id="workflows"):
                workflows = Workflows(folder, jobs, history, session)
            with gr.Tab(label("train"), id="train"):
                train = Train(offered, jobs, history, session, examples, device, [create, animate])
            with gr.Tab(label("inspect"), id="inspect") as inspect_tab:
                inspect = Inspect(offered, history, session, create.model)
        inspect_tab.select(inspect.enter, session, inspect.entered, **QUIET)  # there may be new results
        entered = page.load(create.enter, session, create.entered, **QUIET)
        tabs: list[Any] = [compare, animate, workflows, train, inspect]
        for tab in tabs:
            entered.then(tab.enter, session, tab.entered, queue=False, **QUIET)
        page.load(jobs.warm_up, None, None, queue=False, **QUIET)
        wanted, made = gr.JSON(visible=False), gr.File(visible=False, file_count="multiple")
        gr.Button(visible=False).click(create.generate, wanted, made, api_name="generate", concurrency_limit=None)
        x, y = gr.JSON(visible=False), gr.JSON(visible=False)
        gr.Button(visible=False).click(
            compare.compare, [wanted, x, y], made, api_name="compare", concurrency_limit=None
        )
        if offered.motions:
            init, control = (gr.File(visible=False, label=name) for name in ("init", "control"))
            format, filmed = gr.Textbox("mp4", visible=False), gr.File(visible=False)
            gr.Button(visible=False).click(
                animate.animate, [wanted, init, control, format], filmed, api_name="animate", concurrency_limit=None
            )
        graph, changes = gr.JSON(visible=False), gr.JSON(visible=False)
        gr.Button(visible=False).click(
            workflows.run_workflow, [graph, changes], made, api_name="run_workflow", concurrency_limit=None
        )
    page.jobs, page.history, page.create, page.compare = jobs, history, create, compare
    page.animate = animate
    page.workflows, page.train, page.inspect = workflows, train, inspect
    return page


def _folder(path: str | Path | None, option: str, way_out: str) -> Path | None:
    """A folder that an option names. Raises :class:`MahlstickError` where it is none."""
    folder = Path(path).expanduser().resolve() if path is not None else None
    if folder is not None and not folder.is_dir():
        raise MahlstickError(f"{option} {path}: is no folder; {way_out}")
    return folder


def _file(library: str | Path | None) -> Path | None:
    """Raises :class:`MahlstickError` where there is none."""
    path = Path(library).expanduser().resolve() if library is not None else None
    if path is not None and not path.is_file():
        raise MahlstickError(f"--library {library}: is no file; make one with mahlstick library add")
    return path


def launch(
    page: gr.Blocks, host: str = "127.0.0.1", port: int | None = PORT, auth: tuple[str, str] | None = None
) -> str:
    """Starts the page's server in a thread and returns its address. ``port`` None takes a free one."""
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        share=False,
        show_error=True,
        max_file_size=FILE_LIMIT,
        app_kwargs={"middleware": [Middleware(BodyLimit)]},
        allowed_paths=[str(page.history.root)],
        footer_links=["api"],
        i18n=translations,
        theme=_theme(),
        css_paths=_STYLE,
        head=f"<script>{_KEYS}{canvas.SCRIPT}</script>",
    )
    return str(address)


def serve(
    host: str = "127.0.0.1",
    port: int = PORT,
    auth: str | None = None,
    models: str | None = None,
    out: str = "out",
    device: str | None = None,
    dtype: str | None = None,
    data: str | None = None,
    library: str | None = None,
) -> None:
    """Serves the page until Ctrl-C. ``auth`` is ``user:password``."""
    user, colon, password = (auth or "").partition(":")
    if auth is not None and not (user and colon and password):
        raise MahlstickError("--auth: give user:password")
    page = build(models, out, device, dtype, data, library)
    try:
        address = launch(page, host, port, (user, password) if auth else None)
        print(f"mahlstick: {address}", flush=True)  # noqa: T201
        threading.Event().wait()
    except OSError as error:
        raise MahlstickError(f"--port {port}: is taken, or may not be opened here; give another") from error
    finally:
        page.train.close()
        page.jobs.close()
        page.close(verbose=False)


def main() -> None:
    """``python gradio_app.py``."""
    parser = argparse.ArgumentParser(description="The page of mahlstick; `mahlstick app` has more options.")
    parser.add_argument("--port", type=int, default=PORT)
    serve(port=parser.parse_args().port)


def _theme() -> gr.themes.Base:
    return gr.themes.Base(
        primary_hue=_SIENNA,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_md,
        spacing_size=gr.themes.sizes.spacing_md,
        font=_FONTS,
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        input_background_fill="white",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        input_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        button_secondary_background_fill="*neutral_100",
        button_secondary_background_fill_hover="*neutral_200",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_border_width="1px",
        input_border_width_dark="1px",
        input_shadow="none",
        input_shadow_dark="none",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
    )
