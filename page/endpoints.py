"""What the named endpoints of the API share: arguments that are looked at, and faults that are one sentence."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import gradio as gr

from mahlstick.errors import MahlstickError
from mahlstick.page.jobs import Jobs, Work

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_PICTURES = ("init", "mask", "image", "images", "negative")


def endpoint(ask: Callable[_Arguments, Awaitable[_Result]]) -> Callable[_Arguments, Awaitable[_Result]]:
    """An endpoint whose errors of ours reach the client as they are."""

    @wraps(ask)
    async def asked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return await ask(*args, **kwargs)
        except MahlstickError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return asked


async def answer(jobs: Jobs, work: Work) -> Any:
    """The result of work that nobody watches; it is cancelled where the client has gone."""
    job = jobs.submit(work)
    try:
        return await asyncio.shield(asyncio.wrap_future(job.future))
    finally:
        job.cancel()


def as_fields(given: Any, name: str) -> dict[str, Any]:
    """An argument's fields. Raises :class:`MahlstickError` where it is no JSON object, or names a file."""
    if not isinstance(given, dict):
        raise MahlstickError(f"{name}: is no JSON object; give its fields by their names")
    only_data(given)
    return given


def only_data(value: Any) -> None:
    """Raises :class:`MahlstickError` where a request from outside names a picture on this machine."""
    if isinstance(value, dict):
        for name, inner in value.items():
            for source in inner if isinstance(inner, list) else [inner]:
                if name in _PICTURES and isinstance(source, str) and not source.startswith("data:"):
                    raise MahlstickError(f"{name}: give the picture as a data: URL, as Request.to_json() writes it")
            only_data(inner)
    elif isinstance(value, list):
        for inner in value:
            only_data(inner)
