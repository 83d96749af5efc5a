"""Between an answer and its connection: server-sent events, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mara_deploy.serve.errors import ApiError, as_api_error
from mara_deploy.serve.formats import Event, Format
from mara_deploy.serve.worker import PendingAnswer
from mara_runtime.answer import Generation, Piece
from mara_runtime.errors import MaraError

T = TypeVar("T")


async def events(
    form: Format, first: Piece, answer: PendingAnswer, ended: Callable[[Generation | ApiError], None]
) -> AsyncIterator[bytes]:
    """The events of a stream, from an answer whose first piece has come. An error is the last event.

    ended: called with the result, or the error.
    """
    for event in form.begin():
        yield encoded(event)
    piece = first
    while True:
        for event in form.piece(piece):
            yield encoded(event)
        if piece.result is not None:
            break
        try:
            piece = await anext(answer)
        except (ApiError, MaraError) as error:
            told = as_api_error(error)
            ended(told)
            yield encoded(form.error(told))
            return
    ended(piece.result)
    for event in form.end(piece.result):
        yield encoded(event)
    if form.closing:
        yield form.closing


def encoded(event: Event) -> bytes:
    """A server-sent event as it is sent."""
    name, data = event
    heading = b"" if name is None else b"event: %s\n" % name.encode()
    return b"%sdata: %s\n\n" % (heading, as_json(data))


def as_json(data: Any) -> bytes:
    """A value as JSON; half a surrogate pair, which no UTF-8 can hold, becomes a question mark."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class EventStream(StreamingResponse):
    """A response of server-sent events. close: called in any case when it ends. most_s: a reader that takes longer for
    all of it is cut off.
    """

    def __init__(self, content: AsyncIterator[bytes], close: Callable[[], None], most_s: float) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._close, self._most_s = close, most_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(super().__call__(scope, receive, send), self._most_s)
        finally:
            self._close()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns. Once the request's body has been read: if the client goes away before, it is cancelled,
    and ClientDisconnect is raised.
    """
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
