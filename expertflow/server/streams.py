"""Bodies in, streams out, and clients that go away: what an endpoint does with its connection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from expertflow.server.errors import APIError, malformed
from expertflow.server.guard import too_large

logger = logging.getLogger(__name__)

_BODY_SECONDS = 30.0
_LOOK_SECONDS = 1.0
Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body], most: int) -> Body:
    """Raises APIError for what is too large, too slow, no JSON, or not of that kind."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise APIError(
            415,
            f"content type {content_type[:100]!r} is not taken; send JSON with 'Content-Type: application/json'",
            code="unsupported_content_type",
        )
    try:
        raw = await asyncio.wait_for(_whole_body(request, most), _BODY_SECONDS)
    except asyncio.TimeoutError:
        raise APIError(
            408, f"the body did not arrive within {_BODY_SECONDS:.0f} s; send it at once", code="body_timeout"
        ) from None
    except ClientDisconnect:
        raise APIError(499, "the client went away", code="cancelled") from None
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        raise malformed(error) from None


async def _whole_body(request: Request, most: int) -> bytes:
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > most:
            raise too_large(most, f"a body of more than {most} bytes")
    return bytes(raw)


@contextlib.asynccontextmanager
async def watching(receive: Receive, gone: Callable[[], None]) -> AsyncIterator[None]:
    """Call `gone` when the client goes away within the block."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher


class EventStream(Response):
    """Server-sent events to a client that may read slowly or go away.

    events: each a whole event, in bytes. ended: is called once, however it ends. write_seconds: how long a client may
    take no byte before it is given up.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], ended: Callable[[], None], write_seconds: float):
        super().__init__()
        del self.headers["content-length"]
        self._events = events
        self._ended = ended
        self._write_seconds = write_seconds
        self._writing_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        watching = asyncio.create_task(self._watch(receive))
        try:
            await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ended()
            for task in (sending, watching):
                task.cancel()
            done = await asyncio.gather(sending, watching, return_exceptions=True)
            await self._events.aclose()  # type: ignore[attr-defined]  # an async generator's
        for result in done:
            if isinstance(result, Exception):
                raise result

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            self._writing_since = time.monotonic()
            await send({"type": "http.response.body", "body": event, "more_body": True})
            self._writing_since = None
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self, receive: Receive) -> None:
        """Ends when the client has gone, or is as good as gone."""
        asked = asyncio.ensure_future(receive())
        try:
            while True:
                done, _ = await asyncio.wait({asked}, timeout=_LOOK_SECONDS)
                if done:
                    if asked.result()["type"] == "http.disconnect":
                        return
                    asked = asyncio.ensure_future(receive())
                since = self._writing_since
                if since is not None and time.monotonic() - since > self._write_seconds:
                    logger.info("a client took no byte for %.0f s and is given up", self._write_seconds)
                    return
        finally:
            asked.cancel()
