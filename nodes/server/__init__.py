"""The server: workflows run for clients that speak ComfyUI's protocol."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from secrets import token_urlsafe

import uvicorn

from mahlstick.errors import MahlstickError
from mahlstick.nodes.cache import Cache
from mahlstick.nodes.folders import Folders
from mahlstick.nodes.schema import NodeType
from mahlstick.nodes.server.app import build
from mahlstick.nodes.server.guard import Limits, is_loopback

__all__ = ["Limits", "build", "serve"]


def serve(
    nodes: Mapping[str, NodeType],
    *,
    folders: Folders,
    cache: Cache | None = None,
    host: str = "127.0.0.1",
    port: int = 8188,
    token: str | None = None,
    limits: Limits | None = None,
    announce: Callable[[str], object] = print,
) -> None:
    """Serve until interrupted. ``port`` 0 takes a free one. ``announce`` is told the address.

    On a ``host`` that other machines reach, a token is made where none is given, and announced.
    Raises :class:`MahlstickError` where the address cannot be had.
    """
    if not token and not is_loopback(host):
        token = token_urlsafe(24)
    app = build(nodes, folders=folders, cache=cache, token=token, limits=limits)
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_level="warning",
        access_log=False,  # it would write the token down
        ws_max_size=1 << 20,
        timeout_graceful_shutdown=5,
        server_header=False,
        proxy_headers=False,
    )
    with _listening(host, port) as listening:
        at = f"[{host}]" if ":" in host else host
        query = f"/?token={token}" if token else ""
        announce(f"mahlstick serves on http://{at}:{listening.getsockname()[1]}{query}")
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MahlstickError(f"{host}:{port} cannot be served on ({reason}); choose another host or port.") from error
