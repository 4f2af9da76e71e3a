"""What the page says of a job and of a fault, as HTML."""

from __future__ import annotations

import asyncio
import base64
import html
import io
from collections.abc import AsyncIterator, Callable

import gradio as gr
from PIL import Image

from mahlstick.page.jobs import Cancelled, Job, Jobs
from mahlstick.page.texts import say

REFRESH = 0.15  # seconds between two looks at a job


def error(sentence: str) -> str:
    """A fault beside its field."""
    return f'<p role="alert">{html.escape(sentence)}</p>'


def note(sentence: str) -> str:
    """News that is neither progress nor a fault."""
    return f'<p class="note" role="status">{html.escape(sentence)}</p>'


def of(job: Job, browser: gr.Request | None) -> str:
    """Where a job stands that waits for no other."""
    if not job.total:
        return bar(say("loading", browser))
    if job.step == job.total:
        return bar(say("finishing", browser), 1.0, job.preview)
    sentence, left = say("painting", browser, step=job.step, total=job.total), job.seconds_left
    if left is not None:
        sentence += " · " + say("left", browser, seconds=max(1, round(left)))
    return bar(sentence, job.step / job.total, job.preview)


def waiting(jobs: Jobs, ahead: int, browser: gr.Request | None) -> str:
    """What a job waits for."""
    if jobs.trains:
        return bar(say("waiting_for_training", browser, ahead=ahead - 1))
    return bar(say("waiting", browser, ahead=ahead))


async def watch(
    jobs: Jobs, job: Job, browser: gr.Request | None, stands: Callable[[Job, gr.Request | None], str] = of
) -> AsyncIterator[str]:
    """Where the job stands, whenever that has changed, until it is done; ``stands`` says it once none is before it.
    Raises :class:`Cancelled` where it is cancelled before its turn."""
    before = ""
    while not job.future.done():
        if job.is_cancelled and not jobs.works_on(job):
            raise Cancelled
        shown = waiting(jobs, ahead, browser) if (ahead := jobs.ahead(job)) else stands(job, browser)
        if shown != before:
            yield shown
        before = shown
        await asyncio.sleep(REFRESH)


def bar(sentence: str, done: float | None = None, preview: Image.Image | None = None) -> str:
    """A progress bar, below the picture as far as it has come."""
    picture = f'<img src="{_png(preview)}" alt="">' if preview is not None else '<div class="blank"></div>'
    value = "" if done is None else f' value="{done:.3f}"'
    return (
        f'<div class="job">{picture}<p role="status">{html.escape(sentence)}</p>'
        f'<progress max="1"{value} aria-label="{html.escape(sentence)}"></progress></div>'
    )


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
