"""Who may ask, and how much: the token, requests from other sites, the size of what is sent."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from ipaddress import ip_address
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from mahlstick.nodes.folders import Folders, using

MEGABYTE = 1 << 20
COOKIE = "mahlstick_token"


@dataclass(frozen=True)
class Limits:
    """What a server takes. ``prompt`` and ``upload``: bytes of a request. ``waiting`` jobs may wait and the last
    ``history`` ones are remembered, each lot of them in at most ``memory`` bytes of JSON."""

    prompt: int = 32 * MEGABYTE
    upload: int = 100 * MEGABYTE
    waiting: int = 10_000
    history: int = 10_000
    memory: int = 256 * MEGABYTE


class Guard:
    """Refuses what must not reach ``app``, and lets the rest through with ``folders`` as the current ones.

    Any page a person visits can make the browser send requests to this machine. Such a request says where it comes
    from, and is refused as ComfyUI refuses it. A page whose own name leads to this machine (DNS rebinding) does not say
    so: hence without a token only requests to an address or to ``localhost`` are answered.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        limits: Limits,
        folders: Folders,
        refuse: Callable[[HTTPException], ASGIApp],
    ) -> None:
        self.app = app
        self.token = token
        self.limits = limits
        self.folders = folders
        self.refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            with using(self.folders):
                await self.app(scope, self._limited(scope, receive), send)
        elif scope["type"] == "websocket":
            await WebSocketClose(1008, refusal.detail)(scope, receive, send)
        else:
            await self.refuse(refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> HTTPException | None:
        headers = Headers(scope=scope)
        name, _ = host = _host(f"//{headers.get('host', '')}")
        origin = headers.get("origin")
        foreign = origin is not None and not _same(_host(origin), host)
        if foreign or headers.get("sec-fetch-site") == "cross-site":
            return HTTPException(403, "This request comes from another site; open the server's own address.")
        if self.token is None and not _is_local(name):
            return HTTPException(403, f"{name} is no name of this machine; start the server with a token.")
        if self.token is not None and not self._knows_token(scope, headers):
            return HTTPException(
                401, "This server needs its token: as Authorization: Bearer, or as ?token= in the URL."
            )
        if int(headers.get("content-length") or 0) > self._limit(scope):
            return self._too_large(scope)
        return None

    def _knows_token(self, scope: Scope, headers: Headers) -> bool:
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        given += [bearer] if kind.lower() == "bearer" else []
        given += [_cookie(headers.get("cookie", ""))]
        return any(secrets.compare_digest(each.encode(), (self.token or "").encode()) for each in given)

    def _limit(self, scope: Scope) -> int:
        return self.limits.upload if "/upload/" in scope["path"] else self.limits.prompt

    def _too_large(self, scope: Scope) -> HTTPException:
        return HTTPException(413, f"This is more than {self._limit(scope):,} bytes; send less at once.")

    def _limited(self, scope: Scope, receive: Receive) -> Callable[[], Awaitable[Message]]:
        """``receive``, which fails once a body without a stated length grows too large."""
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > self._limit(scope):
                    raise self._too_large(scope)
            return message

        return limited


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    return host == "localhost" or (_is_address(host) and ip_address(host).is_loopback)


def _is_local(name: str | None) -> bool:
    return name is not None and (name == "localhost" or name.endswith(".localhost") or _is_address(name))


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _host(url: str) -> tuple[str | None, int | None]:
    try:
        parts = urlsplit(url)
        return parts.hostname, parts.port
    except ValueError:
        return None, None


def _same(origin: tuple[str | None, int | None], host: tuple[str | None, int | None]) -> bool:
    """A browser leaves a scheme's own port out of both, a proxy perhaps out of one."""
    return origin[0] is not None and origin[0] == host[0] and (None in (origin[1], host[1]) or origin[1] == host[1])


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""
