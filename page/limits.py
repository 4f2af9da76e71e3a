"""How much one request may bring."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_LIMIT = 256 * 1024 * 1024  # bytes: every canvas of the page full, and more
AXIS_LETTERS = 20_000  # of all values of an axis, as a person writes them
WORDS_LETTERS = 500  # of one value: each may take the place of many words in a prompt


class BodyLimit:
    """Refuses requests of more than ``most`` bytes, by what they say of themselves or as soon as they are over it.

    gradio limits each uploaded file, but not the JSON in which canvases and the API bring pictures.
    """

    def __init__(self, app: ASGIApp, most: int = BODY_LIMIT) -> None:
        self.app = app
        self.most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif int(dict(scope["headers"]).get(b"content-length", 0)) > self.most:
            await PlainTextResponse(self._sentence, 413)(scope, receive, send)
        else:
            await self.app(scope, self._counted(receive), send)

    @property
    def _sentence(self) -> str:
        return f"A request may have at most {self.most >> 20} MB; scale the pictures down."

    def _counted(self, receive: Receive) -> Receive:
        came = 0

        async def counted() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self.most:
                raise HTTPException(413, self._sentence)
            return message

        return counted
