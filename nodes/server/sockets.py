"""The sockets over which clients hear of their jobs."""

from __future__ import annotations

import asyncio
import io
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from PIL.Image import Image
from starlette.websockets import WebSocket, WebSocketDisconnect

Message = str | bytes

_LINE = 10_000  # messages that may wait for a slow client before it is given up
_PREVIEWS = 4  # previews are left out where more than so many messages wait
_PREVIEW_SIDE = 512  # pixels, as ComfyUI's
_PREVIEW_EVENT = 1
_JPEG = 1


class Socket:
    """A connection. What is said waits in line, so that a client that reads slowly holds nobody up."""

    def __init__(self, connection: WebSocket) -> None:
        self._connection = connection
        self._line: asyncio.Queue[Message] = asyncio.Queue(_LINE)
        self._delivery = asyncio.create_task(self._deliver())

    def say(self, message: Message) -> None:
        if isinstance(message, bytes) and self._line.qsize() > _PREVIEWS:
            return
        try:
            self._line.put_nowait(message)
        except asyncio.QueueFull:
            self._delivery.cancel()

    async def listen(self, answer: Callable[[str], str | None]) -> None:
        """Answer what the client says, until it is gone or reads so slowly that its line is full."""
        listening = asyncio.create_task(self._listen(answer))
        try:
            await asyncio.wait({listening, self._delivery}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            listening.cancel()
            self._delivery.cancel()

    async def _listen(self, answer: Callable[[str], str | None]) -> None:
        while (message := await self._connection.receive())["type"] == "websocket.receive":
            reply = answer(message.get("text") or "")
            if reply is not None:
                self.say(reply)

    async def _deliver(self) -> None:
        with suppress(WebSocketDisconnect):
            while True:
                message = await self._line.get()
                if isinstance(message, bytes):
                    await self._connection.send_bytes(message)
                else:
                    await self._connection.send_text(message)


class Sockets:
    """The sockets of all clients, by client id. :meth:`say` may be called from any thread."""

    def __init__(self) -> None:
        self._sockets: dict[str, list[Socket]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """From now on there is an event loop, the running one."""
        self._loop = asyncio.get_running_loop()

    def has(self, client: str | None) -> bool:
        """Whether anybody hears what is said to a client."""
        return client in self._sockets

    @contextmanager
    def joined(self, client: str, socket: Socket) -> Iterator[None]:
        """Within the block the socket hears what is said to its client."""
        self._sockets.setdefault(client, []).append(socket)
        try:
            yield
        finally:
            self._sockets[client].remove(socket)
            if not self._sockets[client]:
                del self._sockets[client]

    def say(self, message: Message, client: str | None) -> None:
        """To the sockets of a client."""
        if client is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._say, message, client)

    def say_to_all(self, message: Message) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._say_to_all, message)

    def _say(self, message: Message, client: str) -> None:
        for socket in self._sockets.get(client, ()):
            socket.say(message)

    def _say_to_all(self, message: Message) -> None:
        for client in self._sockets:
            self._say(message, client)


def event(kind: str, data: Mapping[str, Any]) -> str:
    """A message of ComfyUI's protocol."""
    return encoded({"type": kind, "data": data})


def preview(picture: Image) -> bytes:
    """A picture as a binary message: the kind of event, the kind of picture, each in four bytes, and a JPEG."""
    small = picture.convert("RGB")
    small.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    buffer = io.BytesIO(struct.pack(">II", _PREVIEW_EVENT, _JPEG))
    buffer.seek(0, io.SEEK_END)
    small.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def encoded(value: Any) -> str:
    """JSON that any client can read: nodes may return anything for the page to show."""
    return json.dumps(_plain(value), separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)
