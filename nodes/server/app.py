"""ComfyUI's HTTP and WebSocket protocol, so that its clients work with mahlstick's nodes.

ComfyUI's behaviour is the specification. Where it answers a bad request with a bare status, there is a sentence here,
in the form of its validation errors. Every path is there a second time below ``/api``.
"""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from mahlstick.errors import MahlstickError
from mahlstick.nodes.cache import Cache
from mahlstick.nodes.folders import KINDS, Folders, listed
from mahlstick.nodes.graph import InvalidGraph, parse, validate
from mahlstick.nodes.runner import engine_of
from mahlstick.nodes.schema import NodeType
from mahlstick.nodes.server import about, files
from mahlstick.nodes.server.guard import COOKIE, Guard, Limits
from mahlstick.nodes.server.queue import History, Job, Queue
from mahlstick.nodes.server.sockets import Socket, Sockets, encoded, event
from mahlstick.nodes.server.worker import Worker

_log = logging.getLogger(__name__)

_SECRETS = ("auth_token_comfy_org", "api_key_comfy_org")  # ComfyUI's page sends them for services not used here
_LONGEST_ID = 200
_PATIENCE = 10.0  # seconds that a node has to stop when the server does

_WORDS: dict[type, str] = {str: "text", float: "a number", list: "a list", dict: "an object"}

T = TypeVar("T")


def build(
    nodes: Mapping[str, NodeType],
    *,
    folders: Folders,
    cache: Cache | None = None,
    token: str | None = None,
    limits: Limits | None = None,
) -> Starlette:
    """The server as an ASGI application: workflows of ``nodes`` run below ``folders``.

    With a ``token`` every request must bring it. Without one only requests to this machine's addresses are answered,
    which is safe only where nobody else reaches the port.
    """
    limits = limits or Limits()
    token = token or None  # an empty one would let everybody in
    server = _Server(nodes, folders, cache, token, limits)
    routes = server.routes()
    return Starlette(
        routes=[*routes, Mount("/api", routes=routes)],
        lifespan=server.lifespan,
        middleware=[Middleware(Guard, token=token, limits=limits, folders=folders, refuse=_refused)],
        exception_handlers={
            HTTPException: lambda _, error: _refused(error),
            InvalidGraph: lambda _, error: _invalid(error),
            MahlstickError: lambda _, error: _fault(HTTPStatus.BAD_REQUEST, str(error)),
            Exception: lambda *_: _fault(HTTPStatus.INTERNAL_SERVER_ERROR, "This failed; the server's log says how."),
        },
    )


class _Server:
    """What requests share, and their answers."""

    def __init__(
        self,
        nodes: Mapping[str, NodeType],
        folders: Folders,
        cache: Cache | None,
        token: str | None,
        limits: Limits,
    ) -> None:
        self.nodes = nodes
        self.token = token
        self.limits = limits
        self.number = 0
        self.sockets = Sockets()
        self.history = History(limits)
        self.queue = Queue(limits, changed=lambda: self.sockets.say_to_all(event("status", self.status())))
        self.worker = Worker(engine_of(nodes, cache), self.queue, self.history, self.sockets, folders)

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.sockets.open()
        self.worker.start()
        yield
        self.queue.close()
        await run_in_threadpool(self.worker.join, _PATIENCE)

    def routes(self) -> list[BaseRoute]:
        get = partial(Route, methods=["GET"])
        post = partial(Route, methods=["POST"])
        return [
            get("/", self.page),
            WebSocketRoute("/ws", self.socket),
            get("/prompt", lambda _: _json(self.status()["status"])),
            post("/prompt", self.submit),
            get("/queue", lambda _: _raw(self.queue.listed())),
            post("/queue", partial(self.tidy, self.queue.delete)),
            post("/interrupt", self.interrupt),
            get("/history", self.look_back),
            post("/history", partial(self.tidy, self.history.delete)),
            get("/history/{id}", lambda request: _raw(self.history.get(request.path_params["id"]))),
            get("/view", lambda request: files.view(request.query_params)),
            post("/upload/image", partial(self.upload, files.upload)),
            post("/upload/mask", partial(self.upload, files.upload_mask)),
            get("/object_info", lambda _: _json(self.described(self.nodes))),
            get("/object_info/{kind}", lambda request: _json(self.described([request.path_params["kind"]]))),
            get("/system_stats", lambda _: _json(about.system())),
            get("/embeddings", lambda _: _json(about.embeddings())),
            get("/models", lambda _: _json(list(KINDS))),
            get("/models/{kind}", lambda request: _json(listed(_kind(request)))),
            get("/view_metadata/{kind}", self.metadata),
            get("/extensions", lambda _: _json([])),
            get("/features", lambda _: _json(self.features())),
            post("/free", self.free),
        ]

    async def page(self, request: Request) -> Response:
        """What this is, for a person, who needs the token in the address this once."""
        response = HTMLResponse(about.page(len(self.nodes)))
        if self.token is not None and "token" in request.query_params:
            response.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
        return response

    def status(self) -> dict[str, Any]:
        return {"status": {"exec_info": {"queue_remaining": self.queue.remaining}}}

    def features(self) -> dict[str, Any]:
        return {"supports_preview_metadata": False, "max_upload_size": self.limits.upload}

    def described(self, kinds: Iterable[str]) -> dict[str, Any]:
        """Nodes in the form of ``/object_info``. One that cannot say what it is must not hide the others."""
        found = {}
        for kind in kinds:
            if kind in self.nodes:
                try:
                    found[kind] = self.nodes[kind].info
                except Exception:
                    _log.exception("%s cannot be described.", kind)
        return found

    async def submit(self, request: Request) -> Response:
        asked = await _body(request)
        if "prompt" not in asked:
            return _fault(HTTPStatus.BAD_REQUEST, "There is no prompt; send a workflow in API form.", "no_prompt")
        job = await run_in_threadpool(self.job, asked, self.numbered(asked))
        self.queue.put(job)
        return _json({"prompt_id": job.id, "number": job.number, "node_errors": {}})

    def numbered(self, asked: Mapping[str, Any]) -> float:
        """Where the job stands in the queue: as asked, before all others, or behind them."""
        number = _given(asked, "number", float, int)
        if number is not None and abs(number) < math.inf:
            return number
        self.number += 1
        return 1 - self.number if asked.get("front") else self.number - 1

    def job(self, asked: Mapping[str, Any], number: float) -> Job:
        """What is asked, as a job. Raises :class:`MahlstickError`; :class:`InvalidGraph` where it would not run."""
        id = _given(asked, "prompt_id", str) or str(uuid.uuid4())
        if len(id) > _LONGEST_ID:
            raise MahlstickError(f"prompt_id is longer than {_LONGEST_ID} characters; use a UUID.")
        graph = parse(asked["prompt"])
        targets = validate(graph, self.nodes, _given(asked, "partial_execution_targets", list))
        given = _given(asked, "extra_data", dict) or {}
        extra = {name: value for name, value in given.items() if name not in _SECRETS}
        if "client_id" in asked:
            extra["client_id"] = asked["client_id"]
        extra["create_time"] = time.time_ns() // 1_000_000
        return Job(
            id,
            number,
            graph,
            targets,
            record=json.dumps([number, id, asked["prompt"], extra, targets], separators=(",", ":")).encode(),
            client=None if extra.get("client_id") is None else str(extra["client_id"]),
            extra_pnginfo=_given(extra, "extra_pnginfo", dict),
        )

    async def tidy(self, delete: Callable[..., None], request: Request) -> Response:
        """Delete all jobs that wait or are remembered, or those named."""
        asked = await _body(request)
        if asked.get("clear"):
            delete()
        delete([str(each) for each in _given(asked, "delete", list) or []])
        return _json({})

    async def interrupt(self, request: Request) -> Response:
        asked = await _body(request) if await request.body() else {}
        self.queue.interrupt(_given(asked, "prompt_id", str))
        return _json({})

    def look_back(self, request: Request) -> Response:
        """The history, in pages."""
        return _raw(self.history.page(_count(request, "max_items"), _count(request, "offset")))

    async def upload(self, keep: Callable[[Mapping[str, Any]], dict[str, str]], request: Request) -> Response:
        async with request.form(max_files=1) as form:
            return _json(await run_in_threadpool(keep, form))

    def metadata(self, request: Request) -> Response:
        """What a model's file says of itself."""
        found = about.metadata(_kind(request), request.query_params.get("filename", ""))
        if not found:
            raise HTTPException(HTTPStatus.NOT_FOUND, "There is no such file with words about itself; name another.")
        return _json(found)

    async def free(self, request: Request) -> Response:
        asked = await _body(request)
        if asked.get("unload_models") or asked.get("free_memory"):
            self.worker.free()
        return _json({})

    async def socket(self, connection: WebSocket) -> None:
        """Tell a client of its jobs; one that comes back with its id hears at once which node runs."""
        await connection.accept()
        client = connection.query_params.get("clientId") or uuid.uuid4().hex
        socket = Socket(connection)
        with self.sockets.joined(client, socket):
            socket.say(event("status", self.status() | {"sid": client}))
            running = self.queue.running
            if running is not None and running.client == client and running.node is not None:
                socket.say(event("executing", {"node": running.node, "prompt_id": running.id}))
            await socket.listen(self.answer)

    def answer(self, message: str) -> str | None:
        """To a client that says what it can do, what the server can. All else that clients say has no meaning."""
        try:
            greets = json.loads(message)["type"] == "feature_flags"
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return event("feature_flags", self.features()) if greets else None


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Raises :class:`MahlstickError`."""
    try:
        body = json.loads(await request.body(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MahlstickError(f"The request is no JSON that can be read ({error}).") from error
    if not isinstance(body, dict):
        raise MahlstickError("The request must be a JSON object.")
    return body


def _count(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    try:
        return None if text is None else int(text)
    except ValueError:
        raise MahlstickError(f"{name} must be a whole number.") from None


def _kind(request: Request) -> str:
    kind: str = request.path_params["kind"]
    if kind not in KINDS:
        raise HTTPException(HTTPStatus.NOT_FOUND, f"{kind} is no kind of model; /models lists them.")
    return kind


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _given(asked: Mapping[str, Any], name: str, *types: type[T]) -> T | None:
    """An entry of a request, None where there is none. Raises :class:`MahlstickError` where it is no such thing."""
    value = asked.get(name)
    if value is not None and not isinstance(value, types):
        raise MahlstickError(f"{name} must be {_WORDS[types[0]]}.")
    return value


def _json(content: Any, status: int = HTTPStatus.OK) -> Response:
    return _raw(encoded(content).encode(), status)


def _raw(content: bytes, status: int = HTTPStatus.OK) -> Response:
    return Response(content, status, media_type="application/json")


def _fault(status: int, message: str, kind: str | None = None) -> Response:
    """In the form of ComfyUI's refusal of a workflow."""
    error = {"type": kind or HTTPStatus(status).name.lower(), "message": message, "details": "", "extra_info": {}}
    return _json({"error": error, "node_errors": {}}, status)


def _refused(error: HTTPException) -> Response:
    return _fault(error.status_code, error.detail)


def _invalid(error: InvalidGraph) -> Response:
    return _json({"error": error.error, "node_errors": error.node_errors}, HTTPStatus.BAD_REQUEST)
