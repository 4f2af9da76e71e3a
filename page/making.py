"""From a click to a result: what all tabs do that make something of what is on the screen."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from mahlstick.page import status
from mahlstick.page.faults import sentence
from mahlstick.page.history import History
from mahlstick.page.jobs import Cancelled, Job, Jobs, Work
from mahlstick.page.models import Models
from mahlstick.page.parts import QUIET, Updates, Values
from mahlstick.page.texts import say


@dataclass
class Begun:
    """Work for the queue, and what is to be seen of it."""

    work: Work
    meanwhile: Updates = field(default_factory=dict)  # shown as soon as the work is in the queue
    shown: Callable[[Job, gr.Request | None], str] = status.of
    kept: list[Path] = field(default_factory=list)  # what remains though it is cancelled


class Maker:
    """A tab, or a form on one, that makes something.

    :meth:`begin` says what, :meth:`made` shows what came out, and :meth:`left` what there is otherwise.
    """

    kind = "pictures"  # what is made; a person's jobs of one kind are cancelled together
    run: gr.Button
    cancel: gr.Button
    status: gr.HTML

    def __init__(self, jobs: Jobs, history: History, session: gr.BrowserState) -> None:
        self._jobs, self._history, self._session = jobs, history, session
        self._cancels: Counter[str] = Counter()  # by owner: one may come before there is a job

    @property
    def errors(self) -> list[Any]:
        """The lines in which a fault may be said."""
        raise NotImplementedError

    @property
    def result(self) -> list[Any]:
        """What changes with what was made."""
        raise NotImplementedError

    def begin(self, values: Values, session: str, browser: gr.Request) -> Begun:
        """What to do. Raises :class:`MahlstickError` where the screen asks for what cannot be."""
        raise NotImplementedError

    def working(self, values: Values, browser: gr.Request) -> Updates:
        """What is shown while it is done."""
        return {}

    def made(self, found: Any, values: Values, session: str, browser: gr.Request) -> Updates:
        """What is shown of the work's result."""
        return self.left(values, session, browser)

    def left(self, values: Values, session: str, browser: gr.Request) -> Updates:
        """What is shown where there is none: what was made until now."""
        return {}

    def complain(self, error: Exception, values: Values, browser: gr.Request) -> Updates:
        """The fault as a sentence, beside the field that it is about."""
        return {self.line_for(error, values): status.error(sentence(error, browser))}

    def line_for(self, error: Exception, values: Values) -> gr.HTML:
        raise NotImplementedError

    def wire_run(self, inputs: list[Any], meanwhile: Sequence[Any] = ()) -> Any:
        """Has the buttons work; returns the event of a run. ``meanwhile`` is what its beginning changes besides."""
        outputs = [self._session, self.status, *self.result, *self.errors, *meanwhile]
        self.cancel.click(self.cancel_all, [self._session], None, queue=False, **QUIET)
        return self.run.click(self.make, {*inputs, self._session}, outputs, **QUIET)

    async def cancel_all(self, session: str) -> None:
        """Stops what the session has made here. It runs in the event loop as :meth:`make` does, and so comes either
        before the work is in the queue or after."""
        self._cancels[self._owner(session)] += 1
        self._jobs.cancel(self._owner(session))

    def _owner(self, session: str) -> str:
        return f"{session}/{self.kind}"

    async def make(self, values: Values, browser: gr.Request) -> AsyncIterator[Updates]:
        """What the browser is shown from the click to the result."""
        session = values[self._session] or History.new_session()
        cancels = self._cancels[owner := self._owner(session)]
        loading = {self._session: session, self.status: status.bar(say("loading", browser))}
        yield {**dict.fromkeys(self.errors, ""), **loading, **self.working(values, browser)}
        job, begun = None, None
        try:
            begun = await asyncio.to_thread(self.begin, values, session, browser)
            if self._cancels[owner] != cancels:
                raise Cancelled
            job = self._jobs.submit(begun.work, owner)
            if begun.meanwhile:
                yield begun.meanwhile
            async for shown in status.watch(self._jobs, job, browser, begun.shown):
                yield {self.status: shown}
            yield {self.status: "", **self.made(job.future.result(), values, session, browser)}
        except Cancelled:
            count = len(begun.kept) if begun is not None else 0
            told = say("cancelled_kept", browser, count=count) if count else say("cancelled", browser)
            yield {self.status: status.note(told), **self.left(values, session, browser)}
        except Exception as error:
            yield {self.status: "", **self.left(values, session, browser), **self.complain(error, values, browser)}
        finally:
            if job is not None and not job.future.done():  # the person has gone
                job.cancel()

    def offered(self, models: Models, session: str | None) -> Models:
        """With what the session has trained."""
        return models.of(self._history.results(session)) if session else models
