"""Any fault as a sentence for the person who meets it."""

from __future__ import annotations

import logging
from pathlib import Path

import gradio as gr

from mahlstick.errors import MahlstickError
from mahlstick.page import status
from mahlstick.page.sentences import translated
from mahlstick.page.texts import say

_log = logging.getLogger(__name__)


def sentence(error: Exception, browser: gr.Request | None) -> str:
    """The sentence of an error of ours; of any other what to do about it, while the log tells the rest."""
    if isinstance(error, MahlstickError):
        return translated(str(error), browser)
    _log.exception("a job failed", exc_info=error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return say("no_memory", browser)
    return say("failed", browser, reason=type(error).__name__)


def named(error: MahlstickError, path: str | Path | None, browser: gr.Request | None) -> str:
    """The error as HTML, with a file's name in place of where it lies on the server."""
    told = str(error).replace(str(path), Path(path).name) if path else str(error)
    return status.error(translated(told, browser))
